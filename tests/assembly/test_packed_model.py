"""`permllm.load` gives a model that answers as the masked one does."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

import permllm
from permllm.assembly.packed import write_packed
from permllm.assembly.packed_format import PackedFormatError, PackedManifest
from permllm.kernels.gathering_norm import GatheringNorm
from permllm.kernels.packed_linear import PackedLinear
from permllm.models.families import adapter_for

NEW_TOKENS = 8


def greedy(model, tokens):
    return model.generate(tokens, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True)


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def load_both(folder, masked, dtype=None):
    write_packed(masked, folder / "packed")
    return permllm.load(folder / "packed", dtype=dtype), AutoModelForCausalLM.from_pretrained(masked, dtype=dtype).eval()


@pytest.mark.parametrize("pattern", ["2:4", "3:8"])
def test_logits_and_greedy_tokens_are_those_of_the_masked_model(family, pattern, write_masked, draw_tokens, tmp_path):
    packed, stock = load_both(tmp_path, write_masked(tmp_path, family, pattern))
    tokens = draw_tokens(2, 6)
    assert type(packed) is type(stock) and packed.dtype == stock.dtype and not packed.training
    torch.testing.assert_close(logits(packed, tokens), logits(stock, tokens), atol=2e-5, rtol=1e-4)
    assert torch.equal(greedy(packed, tokens), greedy(stock, tokens))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "shard": "20KB"}),
        ("opt", {"tie_word_embeddings": True}),
        ("opt", {"tie_word_embeddings": False, "permutation": "random"}),
        ("qwen2", {"permutation": "random", "update": "sparsegpt"}),
        ("qwen3", {"layout": "foldable"}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0}}),
    ],
    ids=["tied, biases, shards", "tied", "untied, random orders", "gathered heads", "all folded", "scaled rotary embeddings"],
)
def test_every_kind_of_model_answers_alike(name, settings, write_masked, draw_tokens, tmp_path):
    packed, stock = load_both(tmp_path, write_masked(tmp_path, name, **settings))
    tokens = draw_tokens(2, 6)
    torch.testing.assert_close(logits(packed, tokens), logits(stock, tokens), atol=2e-5, rtol=1e-4)
    assert torch.equal(greedy(packed, tokens), greedy(stock, tokens))
    assert (packed.get_input_embeddings().weight is packed.get_output_embeddings().weight) == bool(settings.get("tie_word_embeddings"))


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_bfloat16_logits_are_close(name, write_masked, draw_tokens, tmp_path):
    packed, stock = load_both(tmp_path, write_masked(tmp_path, name, dtype=torch.bfloat16))
    exact = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "masked", dtype=torch.float32), draw_tokens(2, 6))
    own, others = ((logits(model, draw_tokens(2, 6)).float() - exact).abs().max() for model in (packed, stock))
    assert packed.dtype == torch.bfloat16 and own <= 2 * others  # no further from float32 than rounding brings the stock model


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_type_can_be_chosen(dtype, write_masked, draw_tokens, tmp_path):
    packed, stock = load_both(tmp_path, write_masked(tmp_path, "llama"), dtype)
    assert packed.dtype == packed.config.dtype == torch.bfloat16 and {tensor.dtype for tensor in packed.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(packed, draw_tokens(1, 6)), logits(stock, draw_tokens(1, 6)), atol=0.1, rtol=0.1)


def test_norms_gather_where_they_can_and_linears_elsewhere(family, write_masked, tmp_path):
    packed, _ = load_both(tmp_path, write_masked(tmp_path, family, permutation="random"))
    adapter = adapter_for(type(packed).__name__)
    for layer in adapter.layers(packed):
        assert all(isinstance(linear, PackedLinear) for linear in adapter.linears(layer).values())
        for name in ("attention_in", "mlp_in"):
            norm = adapter.gathering_norm(layer, name)
            assert norm is None or isinstance(layer.get_submodule(norm), GatheringNorm)
            assert all((layer.get_submodule(path).order is None) == (norm is not None) for path in adapter.linear_groups[name].readers)
        assert all(layer.get_submodule(path).order is not None for path in adapter.linear_groups["attention_out"].readers)
        assert all(layer.get_submodule(path).order is None for path in adapter.linear_groups["mlp_out"].readers)


def test_settings_of_generation_come_with_the_model(write_masked, edit, tmp_path):
    masked = write_masked(tmp_path, "llama")
    edit(masked / "generation_config.json", lambda config: config.update(top_k=7))
    packed, _ = load_both(tmp_path, masked)
    assert packed.generation_config.top_k == 7


def test_a_stock_checkpoint_is_refused_with_advice(write_masked, tmp_path):
    with pytest.raises(ValueError, match=r"not a packed checkpoint.*transformers\.AutoModelForCausalLM"):
        permllm.load(write_masked(tmp_path, "llama"))


def test_a_type_that_does_not_exist_is_refused(write_masked, tmp_path):
    write_packed(write_masked(tmp_path, "llama"), tmp_path / "packed")
    with pytest.raises(ValueError, match="unknown dtype 'int4'"):
        permllm.load(tmp_path / "packed", dtype="int4")


def test_a_manifest_that_does_not_fit_the_configuration_is_refused(write_masked, tmp_path):
    write_packed(write_masked(tmp_path, "llama"), tmp_path / "packed")
    manifest = PackedManifest.read(tmp_path / "packed")
    dataclasses.replace(manifest, architecture="OPTForCausalLM").write(tmp_path / "packed")
    with pytest.raises(PackedFormatError, match=r"holds a OPTForCausalLM, but its config\.json names LlamaForCausalLM"):
        permllm.load(tmp_path / "packed")
    dataclasses.replace(manifest, gathers=manifest.gathers[1:]).write(tmp_path / "packed")
    with pytest.raises(PackedFormatError, match="gathers for 2 decoder layers, not 3"):
        permllm.load(tmp_path / "packed")


def test_saving_a_packed_model_as_a_stock_checkpoint_is_refused(write_masked, tmp_path):
    write_packed(write_masked(tmp_path, "llama"), tmp_path / "packed")
    with pytest.raises(ValueError, match="permllm unpack"):
        permllm.load(tmp_path / "packed").save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
