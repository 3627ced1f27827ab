import pytest
import torch

from permllm.artifacts import StaleArtifactError, replacing_folder
from permllm.calibration.capture import dense_statistics
from permllm.models.families import adapter_of
from permllm.models.streaming import LoadedModel
from permllm.pruning.layerwise import model_weights, prune_in_parallel
from permllm.pruning.methods import PruningMethod
from permllm.pruning.storage import load_pruning, save_pruning
from permllm.sparsity.pattern import NMPattern


@pytest.fixture
def prune(llama, draw_tokens):
    """`prune(method)`: every layer of a tiny model."""
    adapter = adapter_of(llama)
    statistics = list(dense_statistics(LoadedModel(llama, adapter), draw_tokens(4, 16), batch_size=2))
    return lambda method: list(prune_in_parallel(model_weights(llama, adapter), adapter, statistics, NMPattern(2, 4), method))


@pytest.mark.parametrize(
    "method", [PruningMethod(permutation="cp"), PruningMethod(update="sparsegpt"), PruningMethod(permutation="cp", transposable=True)], ids=str
)
def test_pruned_layers_read_back_as_they_were_written(prune, method, tmp_path):
    layers = prune(method)
    save_pruning(tmp_path, iter(layers), {"pattern": "2:4"})
    saved = load_pruning(tmp_path)
    assert saved.manifest["pattern"] == "2:4"
    for written, read in zip(layers, saved, strict=True):
        assert read.keys() == written.keys()
        for name, group in read.items():
            assert group.permutation == written[name].permutation
            assert (group.retained_score, group.output_error) == (written[name].retained_score, written[name].output_error)
            for path, linear in group.linears.items():
                expected = written[name].linears[path]
                assert torch.equal(linear.mask, expected.mask)
                assert (linear.weight is None) == (expected.weight is None)
                assert linear.weight is None or torch.equal(linear.weight, expected.weight)
                assert linear.rows == expected.rows and (linear.rows is not None) == method.transposable


def test_the_summary_is_the_mean_over_all_groups(prune, tmp_path):
    layers = prune(PruningMethod())
    summary = save_pruning(tmp_path, layers, {})
    groups = [group for layer in layers for group in layer.values()]
    assert summary["retained_score"] == pytest.approx(sum(group.retained_score for group in groups) / 12)
    assert summary["output_error"] == pytest.approx(sum(group.output_error for group in groups) / 12)


def test_a_run_that_dies_in_the_middle_leaves_the_complete_one_before_it(prune, tmp_path):
    folder = tmp_path / "prune"
    layers = prune(PruningMethod())

    def dying():
        yield prune(PruningMethod("magnitude", "cp"))[0]
        raise RuntimeError("out of memory")

    with replacing_folder(folder) as new:
        save_pruning(new, layers, {})
    with pytest.raises(RuntimeError), replacing_folder(folder) as new:
        save_pruning(new, dying(), {})
    assert all(read["mlp_out"].permutation == layer["mlp_out"].permutation for read, layer in zip(load_pruning(folder), layers, strict=True))


def test_an_unfinished_folder_is_not_complete(prune, tmp_path):
    save_pruning(tmp_path, prune(PruningMethod()), {})
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(StaleArtifactError, match="not a complete prune artifact"):
        load_pruning(tmp_path)
