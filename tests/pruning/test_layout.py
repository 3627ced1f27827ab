import pytest
import torch

from permllm.assembly.folding import fold
from permllm.calibration.capture import dense_statistics
from permllm.models.adapter import Heads
from permllm.models.families import adapter_of
from permllm.models.streaming import LoadedModel
from permllm.permutation.permutation import Permutation
from permllm.pruning.layerwise import model_weights, prune_in_parallel
from permllm.pruning.layout import Member, SharedOrder, find_permutations, group_widths, shared_orders, spread
from permllm.pruning.methods import PruningMethod
from permllm.pruning.permutations import PERMUTATIONS
from permllm.sparsity.pattern import NMPattern

PATTERN = NMPattern(2, 4)


@pytest.fixture
def statistics(model, adapter, draw_tokens):
    return list(dense_statistics(LoadedModel(model, adapter), draw_tokens(8, 32), 4))


def found(model, adapter, statistics, layout, permutation, score="wanda", pattern=PATTERN):
    weights, heads, generator = list(model_weights(model, adapter)), Heads.of(model.config), torch.Generator().manual_seed(0)
    return find_permutations(layout, permutation, score, weights, adapter, heads, statistics, pattern, generator)


@pytest.mark.parametrize("permutation", sorted(PERMUTATIONS))
@pytest.mark.parametrize("text", ["2:4", "4:8"])
def test_orders_of_the_foldable_layout_fold_completely(model, adapter, statistics, permutation, text):
    layers = found(model, adapter, statistics, "foldable", permutation, pattern=NMPattern.parse(text))
    folding = fold(adapter, Heads.of(model.config), layers, [name for name, _ in model.named_parameters()])
    assert folding.is_complete
    if permutation != "identity":
        assert any(order != Permutation.identity(len(order)) for layer in layers for order in layer.values())


@pytest.mark.parametrize("permutation", sorted(PERMUTATIONS))
def test_the_free_layout_is_what_every_group_finds_by_itself(model, adapter, statistics, permutation):
    layers = found(model, adapter, statistics, "free", permutation)
    pruned = prune_in_parallel(model_weights(model, adapter), adapter, statistics, PATTERN, PruningMethod("wanda", permutation))
    for orders, layer in zip(layers, pruned, strict=True):
        assert all(orders[name].canonical(4) == group.permutation for name, group in layer.items())


@pytest.mark.parametrize("family", ["llama", "opt"], indirect=True)
def test_searching_for_shared_orders_lowers_the_output_error(model, adapter, statistics):
    errors = {}
    for permutation in ("random", "cp", "search"):
        layers = found(model, adapter, statistics, "foldable", permutation)
        pruned = list(prune_in_parallel(model_weights(model, adapter), adapter, statistics, PATTERN, PruningMethod(), layers))
        errors[permutation] = sum(group.output_error for layer in pruned for group in layer.values())
        assert all(layer["attention_in"].permutation == pruned[0]["mlp_in"].permutation for layer in pruned)
    assert errors["search"] < errors["cp"] < errors["random"]


def test_orders_of_different_groups_never_share_memory(model, adapter, statistics):
    layers = found(model, adapter, statistics, "foldable", "cp")
    assert len({order.order.data_ptr() for layer in layers for order in layer.values()}) == len(layers) * len(layers[0])


def test_a_member_of_several_channels_converts_orders_both_ways():
    channels = torch.tensor([4, 5, 6, 7, 12, 13, 14, 15])
    member, own = Member(0, "attention_out", channels), torch.tensor([1, 3, 0, 2, 6, 4, 7, 5])
    order = member.group_order(own, torch.arange(16))
    assert torch.equal(order[channels], channels[own]) and torch.equal(order[:4], torch.arange(4))
    assert torch.equal(member.own_order(order), own)


def test_query_heads_of_one_key_value_head_move_alike(tiny_model):
    model = tiny_model("llama", num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    adapter = adapter_of(model)
    widths = group_widths(model_weights(model, adapter), adapter)
    shared = shared_orders("foldable", adapter, widths, Heads.of(model.config), PATTERN)
    attention = [one for one in shared if one.members[0].group == "attention_out"]
    assert [(one.width, one.block, len(one.members)) for one in attention] == [(16, 8, 2)] * 3
    assert [member.channels.tolist() for member in attention[0].members] == [[*range(8), *range(16, 24)], [*range(8, 16), *range(24, 32)]]
    order = Permutation.within_blocks(torch.stack([torch.randperm(8) for _ in range(2)]))
    spread_order = spread([attention[0]], [order], widths)[0]["attention_out"].order.view(4, 8)
    assert torch.equal(spread_order[0] + 8, spread_order[1]) and torch.equal(spread_order[2] + 8, spread_order[3])


def test_groups_that_do_not_divide_a_head_are_refused(tiny_model):
    model = tiny_model("llama", head_dim=8)
    adapter = adapter_of(model)
    widths = group_widths(model_weights(model, adapter), adapter)
    with pytest.raises(ValueError, match="keeps channels inside heads of 8, which groups of 16 do not divide"):
        shared_orders("foldable", adapter, widths, Heads.of(model.config), NMPattern(8, 16))
    assert all(isinstance(one, SharedOrder) for one in shared_orders("free", adapter, widths, Heads.of(model.config), NMPattern(8, 16)))


def test_an_unknown_layout_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown layout 'folded': choose one of foldable, free"):
        PruningMethod(layout="folded")
