import pytest
import torch

from permllm.artifacts import StaleArtifactError
from permllm.calibration.capture import dense_statistics
from permllm.calibration.samples import CalibrationSet
from permllm.calibration.storage import load_calibration, save_calibration
from permllm.models.families import adapter_of
from permllm.models.streaming import LoadedModel
from permllm.pruning.layerwise import model_weights, prune_in_parallel
from permllm.pruning.methods import PruningMethod
from permllm.sparsity.pattern import NMPattern


@pytest.fixture
def calibrated(llama, draw_tokens, tmp_path):
    """A saved calibration: its folder, samples and statistics."""
    samples = CalibrationSet(draw_tokens(4, 8), held_out=1)
    statistics = list(dense_statistics(LoadedModel(llama, adapter_of(llama)), samples.tokens, batch_size=2))
    save_calibration(tmp_path, samples, statistics, "model", {"seed": 3})
    return tmp_path, samples, statistics


def test_a_calibration_reads_back_as_it_was_written(calibrated):
    folder, samples, statistics = calibrated
    found = load_calibration(folder)
    assert torch.equal(found.samples.tokens, samples.tokens) and found.samples.held_out == 1
    assert found.model_fingerprint == "model" and len(found.statistics) == 3
    for written, read in zip(statistics, found.statistics, strict=True):
        assert read.keys() == written.keys()
        for name, group in read.items():
            assert torch.equal(group.gram, written[name].gram) and group.tokens == written[name].tokens == 32


def test_other_samples_have_another_fingerprint(calibrated, draw_tokens, tmp_path):
    folder, _, statistics = calibrated
    other = tmp_path / "other"
    save_calibration(other, CalibrationSet(draw_tokens(4, 8, seed=1)), statistics, "model", {})
    assert load_calibration(folder).fingerprint != load_calibration(other).fingerprint


def test_a_calibration_without_a_manifest_is_not_complete(calibrated):
    folder, _, _ = calibrated
    (folder / "manifest.json").unlink()
    with pytest.raises(StaleArtifactError, match="not a complete calibrate artifact"):
        load_calibration(folder)


def test_a_damaged_layer_is_named_when_it_is_read(calibrated):
    folder, _, _ = calibrated
    (folder / "layer_001.safetensors").write_bytes(b"damaged")
    statistics = load_calibration(folder).statistics
    assert statistics[0] and statistics[2]
    with pytest.raises(StaleArtifactError, match="layer_001"):
        statistics[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", [PruningMethod("wanda", "cp"), PruningMethod(update="sparsegpt")], ids=str)
def test_statistics_from_the_disk_prune_a_model_on_a_gpu(calibrated, llama, method):
    folder, _, statistics = calibrated
    adapter, pattern = adapter_of(llama), NMPattern(2, 4)
    expected = list(prune_in_parallel(model_weights(llama, adapter), adapter, statistics, pattern, method))
    found = list(prune_in_parallel(model_weights(llama.cuda(), adapter), adapter, load_calibration(folder, "cuda").statistics, pattern, method))
    for layer, other in zip(found, expected, strict=True):
        for name, group in layer.items():
            assert group.retained_score == pytest.approx(other[name].retained_score, rel=1e-4)
