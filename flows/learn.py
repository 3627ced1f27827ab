"""Stage `learn`: learn channel permutations (LCP), and prune the model in the learned order."""

import json
from dataclasses import asdict
from itertools import count, islice
from typing import Any

import torch

from flows.paths import HISTORY, Setting
from flows.prune import open_calibration, pruning_record
from flows.stage import Progress, progress, run_stage
from permllm.artifacts import need_disk, replacing_folder, source_fingerprint
from permllm.lcp.run import State
from permllm.lcp.trainer import EpochRecord, learn_permutations
from permllm.models.checkpoint_files import CheckpointFiles
from permllm.models.families import adapter_of
from permllm.models.loading import load_model
from permllm.params import Params
from permllm.pruning.layerwise import model_weights, prune_in_parallel
from permllm.pruning.storage import FinishedLayers, pruning_bytes, save_pruning
from permllm.scratch import Scratch
from permllm.sparsity.pattern import NMPattern


def learn(params: Params, setting: Setting) -> dict[str, Any]:
    """Learn channel permutations and prune a model in the learned order."""
    method, config = params.method(setting.method), params.learn(setting.model, setting.method)
    pattern, pruning = NMPattern.parse(setting.pattern), method.pruning()
    calibration = open_calibration(params, setting)
    source = params.model(setting.model).model_source()
    need_disk(setting.path("prune"), pruning_bytes(CheckpointFiles.find(source.folder()), pruning))
    model = load_model(source)
    adapter, statistics = adapter_of(model), calibration.statistics
    parts = [source_fingerprint("calibration", "lcp", "models", "permutation", "pruning", "sparsity"), calibration.checksum]
    parts += [setting.pattern, vars(pruning), asdict(config), source.dtype, str(model.device)]
    scratch = Scratch.open(setting.scratch("learn"), parts)
    state_file = scratch.folder / "state.pt"
    epochs, before = config.epochs * config.windows(len(statistics)), State.read(state_file).epochs
    with (
        replacing_folder(setting.path("learn")) as history_folder,
        (history_folder / HISTORY).open("w", buffering=1) as history,
        Progress("learn epoch", epochs, before) as steps,
    ):
        seen = count()

        def record_epoch(record: EpochRecord) -> None:
            history.write(json.dumps(asdict(record)) + "\n")
            if record.epoch and next(seen) >= before:
                steps.step(f"held-out loss {record.held_out_loss:.5f}")

        samples = calibration.samples
        result = learn_permutations(model, adapter, samples, statistics, pattern, method.score, config, record_epoch, state_file)
    finished, generator = FinishedLayers(scratch), torch.Generator().manual_seed(pruning.seed)
    done = len(finished)
    finished.restore(generator)
    rest = islice(model_weights(model, adapter), done, None), adapter, (statistics[index] for index in range(done, len(statistics)))
    layers = prune_in_parallel(*rest, pattern, pruning, result.permutations[done:], generator)
    with replacing_folder(setting.path("prune")) as folder:
        record = pruning_record(setting, params, calibration, asdict(config))
        quality = save_pruning(folder, progress(layers, "prune layer", len(statistics), done), record, scratch, generator)
    losses = {"start_loss": result.start.held_out_loss, "best_loss": result.best.held_out_loss, "best_epoch": result.best.epoch}
    return {**quality, **losses, **({"stopped": result.stopped} if result.stopped else {})}


def main(argv: list[str] | None = None) -> None:
    """Run the stage as a command."""
    run_stage("learn", learn, ("model", "pattern", "method"), argv)


if __name__ == "__main__":
    main()
