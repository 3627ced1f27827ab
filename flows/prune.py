"""Stage `prune`: prune a model with a one-shot method."""

from typing import Any

import torch

from flows.paths import Setting
from flows.stage import progress, run_stage
from permllm.artifacts import StaleArtifactError, need_disk, replacing_folder
from permllm.calibration.storage import Calibration, load_calibration
from permllm.models.adapter import Heads
from permllm.models.checkpoint_files import CheckpointFiles
from permllm.models.loading import load_adapter, load_config, resolve_device
from permllm.models.streaming import StreamedModel
from permllm.params import Params
from permllm.pruning.layerwise import checkpoint_weights, prune_in_parallel, prune_in_sequence
from permllm.pruning.layout import find_permutations
from permllm.pruning.storage import pruning_bytes, save_pruning
from permllm.sparsity.pattern import NMPattern


def prune(params: Params, setting: Setting) -> dict[str, Any]:
    """Prune a model with a one-shot method."""
    model_params, method = params.model(setting.model), params.method(setting.method).pruning()
    pattern = NMPattern.parse(setting.pattern)
    source = model_params.model_source()
    calibration = open_calibration(params, setting)
    adapter, statistics, files = load_adapter(source), calibration.statistics, CheckpointFiles.find(source.folder())
    need_disk(setting.path("prune"), pruning_bytes(files, method))
    permutations = None
    if method.layout != "free":  # orders that layers share are found for all of them first, from the dense model's activations
        weights, heads = checkpoint_weights(files, adapter, len(statistics), statistics.device), Heads.of(load_config(source))
        generator = torch.Generator().manual_seed(method.seed)
        permutations = find_permutations(method.layout, method.permutation, method.score, weights, adapter, heads, statistics, pattern, generator)
    if model_params.prune.sequential:
        tokens = calibration.samples.tokens[calibration.samples.training_rows]
        keep, batch_size = model_params.keep_hidden(), model_params.calibrate.batch_size
        layers = prune_in_sequence(StreamedModel.open(source), tokens, batch_size, pattern, method, permutations, keep)
    else:
        weights = checkpoint_weights(files, adapter, len(statistics), statistics.device)
        layers = prune_in_parallel(weights, adapter, statistics, pattern, method, permutations)
    with replacing_folder(setting.path("prune")) as folder:
        record = pruning_record(setting, params, calibration, {"sequential": model_params.prune.sequential})
        return save_pruning(folder, progress(layers, "prune layer", len(statistics)), record)


def open_calibration(params: Params, setting: Setting) -> Calibration:
    """Open the calibration of the setting's model, and refuse one of another checkpoint.

    Raises:
        StaleArtifactError: if the model changed since.
    """
    source = params.model(setting.model).model_source()
    calibration, folder = load_calibration(Setting(setting.model).path("calibrate"), resolve_device(source.device)), source.folder()
    if CheckpointFiles.find(folder).fingerprint() != calibration.model_fingerprint:
        raise StaleArtifactError(f"the calibration of {setting.model} was made from another checkpoint than {folder}; run the calibrate stage again")
    return calibration


def pruning_record(setting: Setting, params: Params, calibration: Calibration, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what the manifest of pruned layers says of their origin."""
    return {
        "model": setting.model,
        "pattern": setting.pattern,
        "method": setting.method,
        "method_settings": vars(params.method(setting.method).pruning()),
        "settings": settings,
        "seed": params.model(setting.model).calibrate.seed,
        "model_fingerprint": calibration.model_fingerprint,
        "calibration_fingerprint": calibration.fingerprint,
    }


def main(argv: list[str] | None = None) -> None:
    """Run the stage as a command."""
    run_stage("prune", prune, ("model", "pattern", "method"), argv)


if __name__ == "__main__":
    main()
