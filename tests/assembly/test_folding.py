from functools import partial

import pytest
import torch

from permllm.assembly.folding import fold, fold_model
from permllm.models.adapter import Heads
from permllm.models.families import adapter_of
from permllm.permutation.permutation import Permutation

GATED = ["llama", "mistral", "qwen2", "qwen3"]


def inside_heads(heads, size, generator, swap_heads=True):
    """Draw an order that moves whole key-value heads, query heads among their own, and channels inside heads."""
    sharing, orders = heads.query // heads.key_value, []
    sources = torch.randperm(heads.key_value, generator=generator) if swap_heads else torch.arange(heads.key_value)
    for source in sources.tolist():
        inner = torch.randperm(size, generator=generator)
        query = torch.randperm(sharing, generator=generator) if swap_heads else torch.arange(sharing)
        orders += [(source * sharing + int(head)) * size + inner for head in query]
    return Permutation(torch.cat(orders))


def rms_norm(module, x):
    return torch.nn.functional.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)


def draw(model, adapter, seed=0, shared=True, swap_heads=True):
    """Return an order for every linear group, foldable if `shared`."""
    generator = torch.Generator().manual_seed(seed)
    heads, layers = Heads.of(model.config), []
    residual = Permutation.random(model.config.hidden_size, generator)
    for layer in adapter.layers(model):
        widths = {name: layer.get_submodule(group.readers[0]).in_features for name, group in adapter.linear_groups.items()}
        layers.append({name: Permutation.random(width, generator) for name, width in widths.items()})
        if shared:
            layers[-1] |= {name: residual for name, group in adapter.linear_groups.items() if not group.writers}
            size = widths["attention_out"] // heads.query
            layers[-1]["attention_out"] = inside_heads(heads, size, generator, swap_heads)
    return layers


def folded(model, layers):
    adapter, names = adapter_of(model), [name for name, _ in model.named_parameters()]
    folding = fold(adapter, Heads.of(model.config), layers, names)
    fold_model(model, folding)
    return folding


def gather_at_run_time(model, adapter, folding):
    for layer, orders in zip(adapter.layers(model), folding.gathers, strict=True):
        for name, order in orders.items():
            for path in adapter.linear_groups[name].readers:
                layer.get_submodule(path).register_forward_pre_hook(lambda _, arguments, order=order: (order.apply(arguments[0]),))


def difference(model, tokens, change):
    """Return how far a change moves the logits, all of them in float64: transformers computes RMS norms in float32 otherwise."""
    for module in model.double().modules():
        if "RMSNorm" in type(module).__name__:
            module.forward = partial(rms_norm, module)
    with torch.no_grad():
        before = model(tokens).logits
        change(model)
        return ((model(tokens).logits - before).abs().max() / before.abs().max()).item()


@pytest.mark.parametrize("swap_heads", [True, False], ids=["whole heads too", "inside heads"])
@pytest.mark.parametrize("seed", [0, 1])
def test_folding_orders_of_the_foldable_layout_leaves_the_logits_and_the_architecture(model, adapter, draw_tokens, seed, swap_heads):
    layers = draw(model, adapter, seed, swap_heads=swap_heads)
    foldings = []
    assert difference(model, draw_tokens(3, 24), lambda model: foldings.append(folded(model, layers))) < 1e-9
    assert foldings[0].is_complete


@pytest.mark.parametrize("family", GATED, indirect=True)
def test_orders_that_need_no_residual_order_are_exact(model, adapter, draw_tokens):
    layers = draw(model, adapter)
    identity = Permutation.identity(model.config.hidden_size)
    for layer in layers:
        layer |= {"attention_in": identity, "mlp_in": identity}
    assert difference(model, draw_tokens(3, 24), lambda model: folded(model, layers)) < 1e-9


@pytest.mark.parametrize("heads", [(8, 8), (8, 4), (8, 2), (8, 1)], ids=["1", "2", "4", "8"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_every_ratio_of_query_to_key_value_heads_folds(tiny_model, draw_tokens, heads, tied, bias):
    settings = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": 8, "attention_bias": bias, "mlp_bias": bias}
    model = tiny_model("llama", tie_word_embeddings=tied, **settings)
    layers = draw(model, adapter_of(model))
    foldings = []
    assert difference(model, draw_tokens(2, 24), lambda model: foldings.append(folded(model, layers))) < 1e-9
    assert foldings[0].is_complete


def test_what_cannot_be_folded_is_gathered(model, adapter, draw_tokens):
    layers = draw(model, adapter, shared=False)

    def change(model):
        folding = folded(model, layers)
        assert all(sorted(orders) == ["attention_in", "attention_out", "mlp_in"] for orders in folding.gathers)
        gather_at_run_time(model, adapter, folding)

    assert difference(model, draw_tokens(3, 24), change) < 1e-9


def test_columns_of_every_target_are_in_the_order_of_its_group(model, adapter):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    layers = draw(model, adapter, shared=False)
    folding = folded(model, layers)
    for index, layer in enumerate(layers):
        for name, group in adapter.linear_groups.items():
            for path in group.readers:
                full = adapter.path(index, f"{path}.weight")
                rows = folding.rows.get(full)
                expected = layer[name].apply(before[full] if rows is None else rows.apply(before[full], 0))
                assert torch.equal(model.get_parameter(full), expected)


def test_an_own_order_per_query_head_is_not_folded_under_grouped_queries(tiny_model):
    model = tiny_model("llama", num_attention_heads=4, num_key_value_heads=2)
    layers = draw(model, adapter_of(model))
    own = inside_heads(Heads(4, 4), 8, torch.Generator().manual_seed(1), swap_heads=False)
    layers[1]["attention_out"] = own
    folding = fold(adapter_of(model), Heads(4, 2), layers, [name for name, _ in model.named_parameters()])
    assert list(folding.gathers[1]) == ["attention_out"] and not folding.gathers[0]


def test_identity_orders_fold_to_nothing(model, adapter):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    widths = [
        {name: layer.get_submodule(group.readers[0]).in_features for name, group in adapter.linear_groups.items()} for layer in adapter.layers(model)
    ]
    folding = folded(model, [{name: Permutation.identity(width) for name, width in layer.items()} for layer in widths])
    assert folding.is_complete
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_parameter_of_another_width_is_refused_by_name(llama):
    adapter = adapter_of(llama)
    folding = fold(adapter, Heads.of(llama.config), draw(llama, adapter), [name for name, _ in llama.named_parameters()])
    with pytest.raises(ValueError, match=r"model.norm.weight of shape \(7,\) cannot be folded: 32 channels are needed"):
        folding.apply("model.norm.weight", torch.ones(7))
