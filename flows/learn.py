"""Stage `learn`: learn channel permutations (LCP), and prune the model in the learned order."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flows.paths import Setting
from flows.prune import open_calibration, pruning_record
from flows.stage import logger, run_stage
from permllm.artifacts import fingerprint, need_disk, replacing_folder, source_fingerprint
from permllm.lcp.trainer import EpochRecord, learn_permutations
from permllm.models.checkpoint_files import CheckpointFiles
from permllm.models.families import adapter_of
from permllm.models.loading import load_model
from permllm.params import Params
from permllm.pruning.layerwise import model_weights, prune_in_parallel
from permllm.pruning.storage import pruning_bytes, save_pruning
from permllm.sparsity.pattern import NMPattern

SCRATCH = Path(".cache/learn")  # of interrupted runs; outside of what DVC tracks


def learn(params: Params, setting: Setting) -> dict[str, Any]:
    """Learn channel permutations and prune a model in the learned order."""
    method, config = params.method(setting.method), params.learn(setting.model, setting.method)
    pattern = NMPattern.parse(setting.pattern)
    calibration = open_calibration(params, setting)
    source = params.model(setting.model).model_source()
    need_disk(setting.path("prune"), pruning_bytes(CheckpointFiles.find(source.folder()), method.pruning()))
    model = load_model(source)
    adapter = adapter_of(model)
    source_code = source_fingerprint("calibration", "lcp", "permutation", "pruning", "sparsity")
    state_file = SCRATCH / f"{fingerprint([source_code, calibration.fingerprint, setting.pattern, method.score, asdict(config)])}.pt"
    with (
        replacing_folder(setting.path("learn")) as history_folder,
        (history_folder / "history.jsonl").open("w", buffering=1) as history,
        tqdm(total=config.epochs, desc="learn epoch", disable=None) as bar,
    ):

        def record_epoch(record: EpochRecord) -> None:
            history.write(json.dumps(asdict(record)) + "\n")
            logger.info("learn epoch %d/%d: held-out loss %.5f", record.epoch, config.epochs, record.held_out_loss)
            bar.update(record.epoch > 0)

        result = learn_permutations(
            model, adapter, calibration.samples, calibration.statistics, pattern, method.score, config, record_epoch, state_file
        )
    weights = model_weights(model, adapter)
    layers = prune_in_parallel(weights, adapter, calibration.statistics, pattern, method.pruning(), result.permutations)
    with replacing_folder(setting.path("prune")) as folder:
        quality = save_pruning(folder, layers, pruning_record(setting, params, calibration, asdict(config)))
    state_file.unlink(missing_ok=True)
    losses = {"start_loss": result.start.held_out_loss, "best_loss": result.best.held_out_loss, "best_epoch": result.best.epoch}
    return {**quality, **losses, **({"stopped": result.stopped} if result.stopped else {})}


def main(argv: list[str] | None = None) -> None:
    """Run the stage as a command."""
    run_stage("learn", learn, ("model", "pattern", "method"), argv)


if __name__ == "__main__":
    main()
