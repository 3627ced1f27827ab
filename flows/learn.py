"""Stage `learn`: learn channel permutations (LCP), and prune the model in the learned order."""

import json
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from flows.paths import Setting
from flows.prune import open_calibration, pruning_record
from flows.stage import logger, run_stage
from permllm.artifacts import need_disk, replacing_folder
from permllm.lcp.trainer import EpochRecord, learn_permutations
from permllm.models.checkpoint_files import CheckpointFiles
from permllm.models.families import adapter_of
from permllm.models.loading import load_model
from permllm.params import Params
from permllm.pruning.layerwise import model_weights, prune_in_parallel
from permllm.pruning.storage import pruning_bytes, save_pruning
from permllm.sparsity.pattern import NMPattern


def learn(params: Params, setting: Setting) -> dict[str, Any]:
    """Learn channel permutations and prune a model in the learned order."""
    method, config = params.method(setting.method), params.learn(setting.model, setting.method)
    pattern = NMPattern.parse(setting.pattern)
    calibration = open_calibration(params, setting)
    source = params.model(setting.model).model_source()
    need_disk(setting.path("prune"), pruning_bytes(CheckpointFiles.find(source.folder()), method.pruning()))
    model = load_model(source)
    adapter = adapter_of(model)
    with (
        replacing_folder(setting.path("learn")) as history_folder,
        (history_folder / "history.jsonl").open("w", buffering=1) as history,
        tqdm(total=config.epochs, desc="learn epoch", disable=None) as bar,
    ):

        def record_epoch(record: EpochRecord) -> None:
            history.write(json.dumps(asdict(record)) + "\n")
            logger.info("learn epoch %d/%d: held-out loss %.5f", record.epoch, config.epochs, record.held_out_loss)
            bar.update(record.epoch > 0)

        result = learn_permutations(model, adapter, calibration.samples, calibration.statistics, pattern, method.score, config, record_epoch)
    weights = model_weights(model, adapter)
    layers = prune_in_parallel(weights, adapter, calibration.statistics, pattern, method.pruning(), result.permutations)
    with replacing_folder(setting.path("prune")) as folder:
        quality = save_pruning(folder, layers, pruning_record(setting, params, calibration, asdict(config)))
    best = min(result.history, key=lambda record: record.held_out_loss)
    return {**quality, "start_loss": result.history[0].held_out_loss, "best_loss": best.held_out_loss, "best_epoch": best.epoch}


def main(argv: list[str] | None = None) -> None:
    """Run the stage as a command."""
    run_stage("learn", learn, ("model", "pattern", "method"), argv)


if __name__ == "__main__":
    main()
