"""What each process of test_distributed.py runs: learning on a sharded model, one job after another."""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from permllm.calibration.capture import dense_statistics
from permllm.calibration.samples import CalibrationSet
from permllm.lcp.distributed import Ranks, is_sharded, joined, open_sharded
from permllm.lcp.recipes import LearnConfig
from permllm.lcp.trainer import learn_permutations
from permllm.models.loading import ModelSource
from permllm.models.streaming import LoadedModel, StreamedModel
from permllm.sparsity.pattern import NMPattern


def run(job: dict, folder: Path, layered: LoadedModel, ranks: Ranks) -> dict:
    """Learn, and return the orders, the history and how much of the decoder layers was here after each epoch."""
    samples = CalibrationSet(torch.load(folder / "tokens.pt"), held_out=4)
    statistics = list(dense_statistics(StreamedModel.open(source(job, folder)), samples.tokens, 4))
    layers, kept = layered.adapter.layers(layered.model), []

    def look(record: object) -> None:
        parameters = list(layers.parameters())
        assert all(map(is_sharded, parameters))
        kept.append(sum(parameter.to_local().numel() for parameter in parameters) / sum(parameter.numel() for parameter in parameters))

    if job.get("killed") and ranks.rank == 1:
        kill_at_step(6, layers[0])
    state_file = folder / job["state"] if "state" in job else None
    config, pattern = LearnConfig(**job["settings"]), NMPattern.parse(job["pattern"])
    result = learn_permutations(layered, samples, statistics, pattern, job["score"], config, look, state_file, ranks=ranks)
    orders = [{name: permutation.order for name, permutation in layer.items()} for layer in result.permutations]
    return {"orders": orders, "history": [vars(record) for record in result.history], "stopped": result.stopped, "kept": kept}


def source(job: dict, folder: Path) -> ModelSource:
    return ModelSource(str(folder / job["family"]), device=os.environ.get("LEARN_ON", "cpu"))


def kill_at_step(number: int, layer: torch.nn.Module) -> None:
    steps = []

    def kill(*call: object) -> None:
        steps.append(torch.is_grad_enabled())
        if sum(steps) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    layer.register_forward_hook(kill)


def main(folder: Path, jobs: str) -> None:
    torch.set_num_threads(1)
    with joined(os.environ.get("LEARN_ON", "cpu")) as ranks:
        (folder / f"{jobs}.{ranks.rank}.pid").write_text(str(os.getpid()))
        models: dict[str, LoadedModel] = {}
        for name, job in json.loads((folder / f"{jobs}.json").read_text()).items():
            if job["family"] not in models:
                models[job["family"]] = open_sharded(source(job, folder), ranks)
            torch.save(run(job, folder, models[job["family"]], ranks), folder / f"{name}.{ranks.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
