"""Pruning whole models is held against running the model and pruning what its linears were seen to read."""

from dataclasses import replace

import pytest
import torch

from permllm.calibration.capture import dense_statistics
from permllm.calibration.statistics import ActivationStats
from permllm.models.checkpoint_files import CheckpointFiles
from permllm.models.families import adapter_of
from permllm.models.streaming import LoadedModel
from permllm.permutation.permutation import Permutation
from permllm.pruning.layerwise import apply_layer, checkpoint_weights, model_weights, prune_in_parallel, prune_in_sequence
from permllm.pruning.methods import PruningMethod, prune_group
from permllm.sparsity.mask import is_nm_sparse
from permllm.sparsity.pattern import NMPattern

PATTERN = NMPattern(2, 4)
METHODS = [PruningMethod("wanda"), PruningMethod("ria", "cp"), PruningMethod(permutation="cp", update="sparsegpt")]


@pytest.fixture
def tokens(draw_tokens):
    return draw_tokens(6, 24)


def in_parallel(model, adapter, tokens, method):
    statistics = dense_statistics(LoadedModel(model, adapter), tokens, len(tokens))
    return list(prune_in_parallel(model_weights(model, adapter), adapter, statistics, PATTERN, method))


def observed_statistics(model, adapter, index, tokens):
    """Run the whole model as it is and return the statistics of what the linears of one layer read."""
    seen, handles = {}, []
    for path, linear in adapter.linears(adapter.layers(model)[index]).items():
        handles.append(linear.register_forward_pre_hook(lambda _, arguments, path=path: seen.update({path: arguments[0].flatten(0, -2)})))
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    inputs = {name: seen[group.readers[0]] for name, group in adapter.linear_groups.items()}
    return {name: ActivationStats(x.t() @ x / len(x), len(x)) for name, x in inputs.items()}


def assert_pruned_like(found, model, adapter, index, stats, method):
    """Compare a pruned layer with pruning its groups one by one from the given statistics.

    Channels that are always zero tie in the heuristic: permutations are compared by what they retain, masks and
    weights under the permutation found. All sequences form one batch here, so that nothing is rounded otherwise.
    """
    assert found.keys() == adapter.linear_groups.keys()
    masking = replace(method, update=None)
    for name, group in adapter.linear_groups.items():
        weights = {path: adapter.layers(model)[index].get_submodule(path).weight for path in group.readers}
        permutation = found[name].permutation
        own, under_found = (prune_group(weights, stats[name], PATTERN, masking, order).retained_score for order in (None, permutation))
        assert own == pytest.approx(under_found, rel=1e-6)
        expected = prune_group(weights, stats[name], PATTERN, method, permutation)
        assert found[name].linears.keys() == weights.keys()
        for path, linear in found[name].linears.items():
            assert torch.equal(linear.mask, expected.linears[path].mask)
            torch.testing.assert_close(linear.apply(weights[path]), expected.linears[path].apply(weights[path]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_pruning_in_parallel_sees_the_dense_model_and_leaves_it_as_it_is(model, adapter, tokens, method):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = in_parallel(model, adapter, tokens, method)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert len(layers) == 3
    for index, found in enumerate(layers):
        assert_pruned_like(found, model, adapter, index, observed_statistics(model, adapter, index, tokens), method)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_pruning_in_sequence_sees_what_the_pruned_layers_before_put_out(family, tiny_model, adapter, tokens, method):
    model, naive = tiny_model(family), tiny_model(family)
    for index, found in enumerate(prune_in_sequence(LoadedModel(model, adapter), tokens, len(tokens), PATTERN, method)):
        assert_pruned_like(found, naive, adapter, index, observed_statistics(naive, adapter, index, tokens), method)
        for group in found.values():
            for path, linear in group.linears.items():
                target = adapter.layers(naive)[index].get_submodule(path)
                target.weight.data = linear.apply(target.weight)
    assert index == 2
    assert all(torch.equal(tensor, naive.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_the_first_layer_is_pruned_alike_in_parallel_and_in_sequence_and_later_ones_are_not(llama, tiny_model, tokens):
    adapter, method = adapter_of(llama), PruningMethod("wanda")
    parallel = in_parallel(llama, adapter, tokens, method)
    sequence = list(prune_in_sequence(LoadedModel(tiny_model("llama"), adapter), tokens, 4, PATTERN, method))
    masks = [[linear.mask for layer in layers for linear in layer["mlp_out"].linears.values()] for layers in (parallel, sequence)]
    assert torch.equal(masks[0][0], masks[1][0])
    assert not torch.equal(masks[0][2], masks[1][2])


def test_applying_a_layer_changes_its_target_weights_and_nothing_else(model, adapter, tokens):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = in_parallel(model, adapter, tokens, PruningMethod())
    apply_layer(adapter.layers(model)[1], pruned[1])
    targets = {f"{adapter.path(1, path)}.weight" for path in adapter.linears(adapter.layers(model)[1])}
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == targets
    assert all(is_nm_sparse(model.get_parameter(name), PATTERN) for name in targets)


def test_statistics_of_too_few_layers_are_an_error(llama, tokens):
    adapter = adapter_of(llama)
    statistics = list(dense_statistics(LoadedModel(llama, adapter), tokens, 4))[:2]
    with pytest.raises(ValueError):
        list(prune_in_parallel(model_weights(llama, adapter), adapter, statistics, PATTERN, PruningMethod()))


def test_permutations_differ_between_layers(model, adapter, tokens):
    layers = in_parallel(model, adapter, tokens, PruningMethod("wanda", "cp"))
    orders = [group.permutation for layer in layers for group in layer.values()]
    assert not any(order == Permutation.identity(len(order)) for order in orders)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["whole", "sharded"])
def test_weights_read_from_a_checkpoint_are_those_of_the_loaded_model(model, adapter, family, tiny_checkpoint, tmp_path, options):
    files = CheckpointFiles.find(tiny_checkpoint(tmp_path, family, **options))
    layers = list(checkpoint_weights(files, adapter, 3, "cpu"))
    for found, expected in zip(layers, model_weights(model, adapter), strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(weight, expected[path]) for path, weight in found.items())


def test_weights_that_a_checkpoint_lacks_are_named(adapter, model, family, tiny_checkpoint, tmp_path):
    files = CheckpointFiles.find(tiny_checkpoint(tmp_path, family))
    with pytest.raises(ValueError, match="the checkpoint lacks") as error:
        list(checkpoint_weights(files, adapter, 4, "cpu"))
    assert all(f"{adapter.layer_path(3)}.{path}.weight" in str(error.value) for path in adapter.linears(adapter.layers(model)[0]))
