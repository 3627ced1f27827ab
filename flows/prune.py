"""Stage `prune`: prune a model with a one-shot method. What it shares with `reconstruct`: pruning resumed layer by layer."""

from functools import partial
from typing import Any

import torch

from flows.paths import Setting
from flows.stage import progress, run_stage
from permllm.artifacts import StaleArtifactError, need_disk, replacing_folder, source_fingerprint
from permllm.calibration.storage import Calibration, load_calibration
from permllm.footprint import ModelSize, prune_needs
from permllm.memory import need_memory
from permllm.models.adapter import Heads
from permllm.models.checkpoint_files import CheckpointFiles
from permllm.models.loading import DTYPES, load_adapter, load_config, resolve_device
from permllm.models.streaming import StreamedModel
from permllm.params import Params
from permllm.pruning.layerwise import checkpoint_weights, prune_in_parallel, prune_in_sequence
from permllm.pruning.layout import find_permutations
from permllm.pruning.storage import FinishedLayers, SavedOrders, kept_orders, pruning_bytes, save_pruning
from permllm.scratch import Scratch
from permllm.sparsity.pattern import NMPattern


def prune(params: Params, setting: Setting) -> dict[str, Any]:
    """Prune a model with a one-shot method."""
    return prune_layers(params, setting, "prune", open_calibration(params, setting))


def prune_layers(params: Params, setting: Setting, stage: str, calibration: Calibration, learned: SavedOrders | None = None) -> dict[str, Any]:
    """Prune a model layer by layer, as the stage of that name.

    Args:
        learned: the orders of its channels, for a method that learns them.
    """
    model_params, method = params.model(setting.model), params.method(setting.method).pruning()
    pattern = NMPattern.parse(setting.pattern)
    source = model_params.model_source()
    config = model_params.prune
    adapter, statistics, files = load_adapter(source), calibration.statistics, CheckpointFiles.find(source.folder())
    device, home = resolve_device(source.device), setting.scratch(stage)
    size = ModelSize.of(files.shapes, adapter, DTYPES[source.dtype])
    needs = prune_needs(size, method, config.sequential, model_params.calibrate, model_params.hidden_states)
    need_memory(f"{stage} {setting.model}", device, *needs)
    for folder in (setting.path("prune"), home):
        need_disk(folder, pruning_bytes(files, method))
    weights = checkpoint_weights(files, adapter, len(statistics), device)
    method.check_outputs({path: files.shapes[name][0] for path, name in weights.names.items()}, pattern)
    parts = [source_fingerprint("calibration", "models", "permutation", "pruning", "sparsity"), calibration.checksum]
    parts += [setting.pattern, vars(method), vars(config), source.dtype, str(device), model_params.calibrate.batch_size]
    parts.append(learned and learned.manifest["checksum"])
    scratch = Scratch.open(home, parts)
    with replacing_folder(setting.path("prune")) as folder:
        finished, generator, permutations = FinishedLayers(scratch), torch.Generator().manual_seed(method.seed), learned and learned.orders()
        done = len(finished)
        finished.restore(generator)
        # orders that layers share are found for all of them first, from the dense model's activations
        if permutations is None and method.layout != "free":
            found_by = torch.Generator().manual_seed(method.seed)
            arguments = weights, adapter, Heads.of(load_config(source)), statistics, pattern, found_by
            find = partial(find_permutations, method.layout, method.permutation, method.score, *arguments)
            permutations = kept_orders(scratch.folder / "orders.safetensors", find)
        if config.sequential:
            model, tokens = StreamedModel.open(source), calibration.samples.tokens[calibration.samples.training_rows]
            batch_size, keep = model_params.calibrate.batch_size, model_params.keep_hidden()
            layers = prune_in_sequence(model, tokens, batch_size, pattern, method, permutations, keep, generator, finished)
        else:
            left = range(done, len(statistics))
            rest = (weights[index] for index in left), adapter, (statistics[index] for index in left)
            layers = prune_in_parallel(*rest, pattern, method, permutations and permutations[done:], generator)
        record = pruning_record(setting, params, calibration, {"sequential": config.sequential})
        return save_pruning(folder, progress(layers, "prune layer", len(statistics), done), record, scratch, generator)


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
