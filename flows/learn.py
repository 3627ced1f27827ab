"""Stage `learn`: learn channel permutations (LCP), and prune the model in the learned order."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.distributed import is_torchelastic_launched
from tqdm import tqdm

from flows.paths import Setting
from flows.prune import open_calibration, pruning_record
from flows.stage import logger, run_stage
from permllm.artifacts import fingerprint, need_disk, replacing_folder, source_fingerprint
from permllm.calibration.storage import Calibration
from permllm.lcp.distributed import Ranks, joined, open_sharded
from permllm.lcp.recipes import LearnConfig
from permllm.lcp.trainer import EpochRecord, LearnResult, learn_permutations
from permllm.models.checkpoint_files import CheckpointFiles
from permllm.models.loading import DTYPES, ModelSource, load_adapter, load_model, resolve_device
from permllm.models.streaming import LayeredModel, LoadedModel, StreamedModel
from permllm.params import Params
from permllm.pruning.layerwise import checkpoint_weights, prune_in_parallel
from permllm.pruning.storage import pruning_bytes, save_pruning
from permllm.sparsity.pattern import NMPattern

SCRATCH = Path(".cache/learn")  # of interrupted runs; outside of what DVC tracks


def learn(params: Params, setting: Setting) -> dict[str, Any] | None:
    """Learn channel permutations and prune a model in the learned order."""
    model_params, method, config = params.model(setting.model), params.method(setting.method), params.learn(setting.model, setting.method)
    pattern, source = NMPattern.parse(setting.pattern), model_params.model_source()
    need_disk(setting.path("prune"), pruning_bytes(CheckpointFiles.find(source.folder()), method.pruning()))
    if model_params.processes > 1 and not is_torchelastic_launched():
        _start_together(model_params.processes, setting)
    with joined(source.device) as ranks:
        calibration = open_calibration(params, setting)
        source_code = source_fingerprint("calibration", "lcp", "permutation", "pruning", "sparsity")
        state_file = SCRATCH / f"{fingerprint([source_code, calibration.fingerprint, setting.pattern, method.score, asdict(config)])}.pt"
        with _record(setting, config) if ranks.is_first else nullcontext(_ignore) as on_epoch:
            arguments = calibration.samples, calibration.statistics, pattern, method.score, config, on_epoch, state_file
            result = learn_permutations(_open(source, config, ranks), *arguments, ranks=ranks)
    if not ranks.is_first:
        return None
    quality = _prune(params, setting, calibration, config, result)
    state_file.unlink(missing_ok=True)
    losses = {"start_loss": result.start.held_out_loss, "best_loss": result.best.held_out_loss, "best_epoch": result.best.epoch}
    return {**quality, **losses, **({"stopped": result.stopped} if result.stopped else {})}


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
def _record(setting: Setting, config: LearnConfig) -> Iterator[Callable[[EpochRecord], None]]:
    """Yield what writes the epochs to the history, to the log and to a progress bar."""
    with (
        replacing_folder(setting.path("learn")) as folder,
        (folder / "history.jsonl").open("w", buffering=1) as history,
        tqdm(total=config.epochs, desc="learn epoch", disable=None) as bar,
    ):

        def record_epoch(record: EpochRecord) -> None:
            history.write(json.dumps(asdict(record)) + "\n")
            logger.info("learn epoch %d/%d: held-out loss %.5f", record.epoch, config.epochs, record.held_out_loss)
            bar.update(record.epoch > 0)

        yield record_epoch


def _ignore(record: EpochRecord) -> None:
    """Leave the epochs to the first process."""


def _prune(params: Params, setting: Setting, calibration: Calibration, config: LearnConfig, result: LearnResult) -> dict[str, Any]:
    """Prune the checkpoint in the learned order, a decoder layer at a time."""
    source, method = params.model(setting.model).model_source(), params.method(setting.method).pruning()
    adapter, statistics = load_adapter(source), calibration.statistics
    stored = checkpoint_weights(CheckpointFiles.find(source.folder()), adapter, len(statistics), resolve_device(source.device))
    weights = ({path: weight.to(DTYPES[source.dtype]) for path, weight in layer.items()} for layer in stored)
    layers = prune_in_parallel(weights, adapter, statistics, NMPattern.parse(setting.pattern), method, result.permutations)
    with replacing_folder(setting.path("prune")) as folder:
        return save_pruning(folder, layers, pruning_record(setting, params, calibration, asdict(config)))


def main(argv: list[str] | None = None) -> None:
    """Run the stage as a command."""
    run_stage("learn", learn, ("model", "pattern", "method"), argv)


if __name__ == "__main__":
    main()
