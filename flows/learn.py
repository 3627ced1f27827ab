"""Stage `learn`: learn channel permutations (LCP). The stage `reconstruct` prunes in the learned order."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from torch.distributed import is_torchelastic_launched

from flows.paths import HISTORY, Setting
from flows.prune import open_calibration, pruning_record
from flows.stage import Progress, run_stage
from permllm.artifacts import need_disk, replacing_folder, source_fingerprint
from permllm.lcp.distributed import Ranks, joined, open_sharded
from permllm.lcp.recipes import LearnConfig
from permllm.lcp.run import State
from permllm.lcp.trainer import EpochRecord, learn_permutations
from permllm.models.checkpoint_files import CheckpointFiles
from permllm.models.loading import ModelSource, load_model
from permllm.models.streaming import LayeredModel, LoadedModel, StreamedModel
from permllm.params import Params
from permllm.pruning.storage import pruning_bytes, save_orders
from permllm.scratch import Scratch
from permllm.sparsity.pattern import NMPattern


def learn(params: Params, setting: Setting) -> dict[str, Any] | None:
    """Learn the channel permutations of a model."""
    model_params, method, config = params.model(setting.model), params.method(setting.method), params.learn(setting.model, setting.method)
    pattern, source = NMPattern.parse(setting.pattern), model_params.model_source()
    need_disk(setting.path("prune"), pruning_bytes(CheckpointFiles.find(source.folder()), method.pruning()))  # of what follows the long run
    if model_params.processes > 1 and not is_torchelastic_launched():
        _start_together(model_params.processes, setting)
    with joined(source.device) as ranks:
        calibration = open_calibration(params, setting)
        parts = [source_fingerprint("calibration", "lcp", "models", "permutation", "pruning", "sparsity"), calibration.checksum]
        parts += [setting.pattern, method.score, asdict(config), source.dtype, str(ranks.device)]
        state_file = Scratch.open(setting.scratch("learn"), parts).folder / "state.pt" if ranks.is_first else None
        arguments = calibration.samples, calibration.statistics, pattern, method.score, config
        if not ranks.is_first:
            learn_permutations(_open(source, config, ranks), *arguments, ranks=ranks)
            return None
        with replacing_folder(setting.path("learn")) as folder:
            epochs = config.epochs * config.windows(len(calibration.statistics))
            with _recorded(folder / HISTORY, epochs, State.read(state_file).epochs) as on_epoch:
                result = learn_permutations(_open(source, config, ranks), *arguments, on_epoch, state_file, ranks=ranks)
            save_orders(folder, result.permutations, pruning_record(setting, params, calibration, asdict(config)))
    losses = {"start_loss": result.start.held_out_loss, "best_loss": result.best.held_out_loss, "best_epoch": result.best.epoch}
    return {**losses, **({"stopped": result.stopped} if result.stopped else {})}


def _start_together(processes: int, setting: Setting) -> None:
    """Become `torchrun`, which starts this stage in several processes and ends all when one fails."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    os.execv(sys.executable, [*torchrun, "-m", "flows.learn", *(word for name, value in vars(setting).items() for word in (f"--{name}", value))])


def _open(source: ModelSource, config: LearnConfig, ranks: Ranks) -> LayeredModel:
    """Open the model: divided among the processes, layer by layer where windows learn, or as a whole."""
    if ranks.count > 1:
        return open_sharded(source, ranks)
    return StreamedModel.open(source) if config.window else LoadedModel.of(load_model(source))


@contextmanager
def _recorded(path: Path, epochs: int, before: int) -> Iterator[Callable[[EpochRecord], None]]:
    """Yield what writes an epoch to the history and shows how far learning is.

    Args:
        before: epochs that an interrupted run has learned; they are told once more.
    """
    seen = count()
    with path.open("w", buffering=1) as history, Progress("learn epoch", epochs, before) as steps:

        def record_epoch(record: EpochRecord) -> None:
            history.write(json.dumps(asdict(record)) + "\n")
            if record.epoch and next(seen) >= before:
                steps.step(f"held-out loss {record.held_out_loss:.5f}")

        yield record_epoch


def main(argv: list[str] | None = None) -> None:
    """Run the stage as a command."""
    run_stage("learn", learn, ("model", "pattern", "method"), argv)


if __name__ == "__main__":
    main()
