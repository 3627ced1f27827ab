import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from permllm.models.adapter import check_finite, is_finite
from permllm.models.families import FAMILIES, adapter_for, adapter_of
from permllm.models.loading import ModelSource, load_adapter


def test_the_groups_cover_every_linear_of_the_decoder_layers(model, adapter):
    layers = adapter.decoder_layers
    expected = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.startswith(f"{layers}.")}
    assert set(adapter.paths(3)) == set(adapter.widths(model)) == expected
    assert all(width == model.get_submodule(path).in_features for path, width in adapter.widths(model).items())


def test_linears_of_a_group_and_no_others_read_the_same_tensor(model, adapter, draw_tokens):
    seen = {}
    layer = adapter.layers(model)[1]
    for path, linear in adapter.linears(layer).items():
        linear.register_forward_pre_hook(lambda _, arguments, path=path: seen.update({path: arguments[0]}))
    model(draw_tokens(1, 4))
    groups = {tuple(sorted(path for path in seen if seen[path] is x)) for x in seen.values()}
    assert groups == {tuple(sorted(group.readers)) for group in adapter.linear_groups.values()}


def test_reordering_what_the_writers_put_out_reorders_what_the_readers_get(model, adapter, draw_tokens):
    """`attention_out` only inside a head: value channels swap with their neighbour, in every head alike."""
    tokens = draw_tokens(2, 12)
    before = model(tokens).logits
    layer = adapter.layers(model)[1]
    for group in (adapter.linear_groups[name] for name in ("attention_out", "mlp_out")):
        for path, linear in ((path, layer.get_submodule(path)) for path in (*group.writers, *group.readers)):
            is_writer = path in group.writers
            order = torch.arange(linear.out_features if is_writer else linear.in_features).view(-1, 2).flip(1).flatten()
            linear.weight.data = linear.weight[order] if is_writer else linear.weight[:, order]
            if is_writer and linear.bias is not None:
                linear.bias.data = linear.bias[order]
    torch.testing.assert_close(model(tokens).logits, before, atol=1e-5, rtol=1e-5)


def test_adapters_are_found_by_the_configuration_and_by_the_class_alike(model):
    assert adapter_for(model.config.architectures[0]) is adapter_of(model)


def test_an_unknown_architecture_lists_the_supported_ones():
    with pytest.raises(ValueError, match="unknown architecture 'GPT2LMHeadModel'") as error:
        adapter_of(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8, n_positions=8)))
    assert all(name in str(error.value) for name in FAMILIES)
    with pytest.raises(ValueError, match=r"unknown architecture 'GPT2LMHeadModel'.*LlamaForCausalLM"):
        adapter_for("GPT2LMHeadModel")


def test_a_configuration_without_an_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"unknown architecture '\(none\)'"):
        load_adapter(ModelSource(str(tmp_path)))


def test_the_audit_refuses_what_the_family_does_not_know_and_names_all_of_it(llama):
    layers = llama.model.layers
    layers[0].mlp.experts = nn.Module()
    layers[0].mlp.experts.register_parameter("gate_up_proj", nn.Parameter(torch.zeros(2, 4, 4)))
    layers[1].mlp.router = nn.Linear(8, 2)
    del layers[2].self_attn.o_proj
    with pytest.raises(ValueError, match="LlamaForCausalLM does not match its family") as error:
        adapter_of(llama)
    for problem in (
        "model.layers.0.mlp.experts.gate_up_proj has shape (2, 4, 4): mixture-of-experts weights are not supported",
        "model.layers.1.mlp.router is a linear layer that no group covers",
        "model.layers.2.self_attn.o_proj is missing or not a linear layer",
    ):
        assert problem in str(error.value)


def test_weights_that_are_not_finite_are_all_named(model, adapter):
    path = adapter.linear_groups["mlp_out"].readers[0]
    adapter.layers(model)[0].get_submodule(path).weight[0, 0] = float("nan")
    adapter.layers(model)[2].get_submodule(path).weight[0, 0] = float("-inf")
    with pytest.raises(ValueError, match="weights hold NaN or infinity") as error:
        check_finite(model)
    assert adapter.path(0, path) in str(error.value) and adapter.path(2, path) in str(error.value)
    assert adapter.path(1, path) not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_is_finite_finds_one_broken_entry_anywhere(dtype, broken):
    tensor = torch.randn(7, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert is_finite(tensor)
    for place in (0, 1000, 2099):
        damaged = tensor.clone()
        damaged.view(-1)[place] = broken
        assert not is_finite(damaged)


def test_is_finite_accepts_the_largest_numbers_of_the_type():
    assert is_finite(torch.tensor([65504.0, 60000.0], dtype=torch.float16))
    assert is_finite(torch.tensor([-65504.0, 65504.0], dtype=torch.float16))
