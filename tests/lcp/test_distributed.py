"""Several processes that learn together agree with one, share the weights out, and end and resume together."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from permllm.calibration.capture import dense_statistics
from permllm.calibration.samples import CalibrationSet
from permllm.lcp.distributed import Ranks, joined
from permllm.lcp.recipes import LOGIT_SETTINGS, LearnConfig
from permllm.lcp.trainer import learn_permutations
from permllm.models.families import adapter_of
from permllm.models.loading import ModelSource, load_model
from permllm.models.streaming import LoadedModel, StreamedModel
from permllm.permutation.permutation import Permutation
from permllm.sparsity.pattern import NMPattern

GUIDED = {"optimizer": "guided", "objective": {"kl": 1.0, "cross_entropy": 1.0}, "moves": 0.5, "curvature": 1.0}
LOGITS = {"block_size": 16, "start": "cp", "logits": "identity", "learning_rate": 0.5}
LEARN = {"start": "cp", "epochs": 3, "batch_size": 4}  # of eight sequences
STEADY = {**GUIDED, "start": "search", "recompute_layers": True}
JOBS = {
    "logits": {"settings": LOGITS},
    "paper": {"settings": {"recipe": "paper", "start": "identity", "block_size": 16, "batch_size": 3, "gumbel": 0.5}, "score": "ria"},
    "soft": {"settings": {**LOGITS, "estimator": "soft", "rank": 4, "objective": "kl"}},
    "window": {"settings": {**LOGITS, "window": 1, "last_layers": 2, "layer_objective": {"smooth_l1": 0.5}, "recompute_layers": True}},
    "guided": {"settings": STEADY},
    "guided foldable": {"settings": {**GUIDED, "layout": "foldable"}, "score": "ria", "pattern": "4:8"},
    "guided by states": {"settings": {**GUIDED, "objective": {"cosine": 1.0, "relative_error": 0.5}, "window": 2}, "score": "magnitude"},
    "a last batch of one": {"settings": {**GUIDED, "batch_size": 7}},
    "opt": {"settings": GUIDED, "family": "opt"},
    "opt logits": {"settings": {**LOGITS, "objective": "cross_entropy"}, "family": "opt"},
}
THREE = {"uneven rows": {"settings": GUIDED, "score": "ria"}, "uneven rows of logits": {"settings": LOGITS}}
KILLED = {"killed": {"settings": STEADY, "state": "state.pt", "killed": True}}
RESUMED = {"resumed": {"settings": STEADY, "state": "state.pt"}}


def complete(jobs: dict) -> dict:
    """Fill in what the jobs leave open."""
    filled = {}
    for name, job in jobs.items():
        config = LearnConfig(**{**LEARN, **job["settings"]})
        assert config.optimizer != "guided" or not set(LOGIT_SETTINGS) & set(job["settings"])
        filled[name] = {"score": "wanda", "pattern": "2:4", "family": "llama", **job, "settings": asdict(config)}
    return filled


def together(repository: Path, folder: Path, name: str, jobs: dict, processes: int, **environment: str) -> subprocess.CompletedProcess:
    """Run jobs in several processes; the time limit only is there so that a hang fails."""
    (folder / f"{name}.json").write_text(json.dumps(complete(jobs)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*torchrun, str(repository / "tests/lcp/learn_together.py"), str(folder), name]
    environment = {**os.environ, "PYTHONPATH": str(repository), **environment}
    return subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable, draw_tokens: Callable) -> Path:
    """Checkpoints and tokens."""
    folder = tmp_path_factory.mktemp("together")
    for family in ("llama", "opt"):
        tiny_model(family).save_pretrained(folder / family)
    torch.save(draw_tokens(12, 16), folder / "tokens.pt")
    return folder


@pytest.fixture(scope="module")
def killed(repository: Path, folder: Path) -> subprocess.CompletedProcess:
    """The end of two processes of which the second was killed within a step of its third epoch."""
    return together(repository, folder, "killing", KILLED, processes=2)


@pytest.fixture(scope="module")
def found(repository: Path, folder: Path, killed: subprocess.CompletedProcess) -> Callable[[str], list[dict]]:
    """`found(job)`: what every process found in a run of two, or of three."""
    for name, jobs, processes in (("two", {**JOBS, **RESUMED}, 2), ("three", THREE, 3)):
        run = together(repository, folder, name, jobs, processes)
        assert run.returncode == 0, run.stderr
    return lambda job: [torch.load(folder / f"{job}.{rank}.pt") for rank in range(3 if job in THREE else 2)]


def alone(folder: Path, job: dict) -> dict:
    """Learn in this process."""
    layered, samples = LoadedModel.of(load_model(source_of(folder, job))), CalibrationSet(torch.load(folder / "tokens.pt"), held_out=4)
    statistics = list(dense_statistics(layered, samples.tokens, 4))
    config, pattern = LearnConfig(**job["settings"]), NMPattern.parse(job["pattern"])
    result = learn_permutations(layered, samples, statistics, pattern, job["score"], config)
    return {"orders": result.permutations, "history": result.history}


def source_of(folder: Path, job: dict) -> ModelSource:
    return ModelSource(str(folder / job["family"]), device="cpu")


def orders_of(found: dict) -> list[dict[str, Permutation]]:
    return [{name: Permutation(order) for name, order in layer.items()} for layer in found["orders"]]


@pytest.mark.parametrize("job", [*JOBS, *THREE])
def test_processes_find_what_one_finds(folder, found, job):
    expected = alone(folder, complete(JOBS | THREE)[job])
    assert len({record.held_out_loss for record in expected["history"]}) > 1  # something was learned
    first, *others = found(job)
    assert all(other["history"] == first["history"] and orders_of(other) == orders_of(first) for other in others)
    assert orders_of(first) == expected["orders"]
    for record, alike in zip(first["history"], map(asdict, expected["history"]), strict=True):
        for loss in ("held_out_loss", "training_loss"):
            assert record[loss] is alike[loss] is None or record[loss] == pytest.approx(alike[loss], rel=1e-5)
            record[loss] = alike[loss]
        assert record == alike


@pytest.mark.parametrize("job", JOBS)
def test_every_process_keeps_its_share_of_the_decoder_layers(found, job):
    for one in found(job):
        assert one["kept"] == pytest.approx([0.5] * len(one["kept"]), abs=0.01)


def test_a_killed_process_ends_the_others(folder, killed):
    assert killed.returncode != 0 and "SIGKILL" in killed.stderr
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((folder / f"killing.{rank}.pid").read_text()), 0)


def test_killed_processes_are_resumed_with_equal_bytes(found):
    for resumed, undisturbed in zip(found("resumed"), found("guided"), strict=True):
        assert len(resumed["kept"]) == len(undisturbed["kept"])
        assert resumed["history"] == undisturbed["history"] and orders_of(resumed) == orders_of(undisturbed)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("sequences", range(1, 8))
def test_shares_make_up_the_batch(sequences, count):
    batch = torch.randperm(sequences)
    shares = [Ranks(rank, count).share(batch) for rank in range(count)]
    assert torch.equal(torch.cat([share.rows for share in shares if share.weight]), batch)
    assert sum(share.weight for share in shares) == pytest.approx(1)
    assert all(len(share.rows) and torch.equal(batch[share.first : share.first + len(share.rows)], share.rows) for share in shares)


@pytest.mark.parametrize(("batch_size", "count", "problem"), [(2, 3, "learn.batch_size is 2, but 3 processes"), (16, 9, "k_proj has 16")])
def test_more_processes_than_can_share_are_refused_before_the_run(llama, batch_size, count, problem):
    adapter = adapter_of(llama)
    Ranks(0, 1).check(batch_size, llama, adapter)
    with pytest.raises(ValueError, match=problem):
        Ranks(0, count).check(batch_size, llama, adapter)


def test_a_device_for_all_processes_is_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="device is cpu:0, but 2 processes need one each"), joined("cpu:0"):
        pass


@pytest.mark.parametrize("job", ["window", "guided by states", "guided", "soft"])
def test_a_streamed_model_learns_what_a_loaded_one_learns(folder, job):
    job = complete(JOBS)[job]
    expected, streamed = alone(folder, job), StreamedModel.open(source_of(folder, job))
    samples = CalibrationSet(torch.load(folder / "tokens.pt"), held_out=4)
    statistics, present = list(dense_statistics(streamed, samples.tokens, 4)), []

    def look(record: object) -> None:
        layers = streamed.adapter.layers(streamed.model)
        present.append(sum(not any(parameter.is_meta for parameter in layer.parameters()) for layer in layers))

    config, pattern = LearnConfig(**job["settings"]), NMPattern.parse(job["pattern"])
    result = learn_permutations(streamed, samples, statistics, pattern, job["score"], config, look)
    assert result.permutations == expected["orders"] and result.history == expected["history"]
    assert max(present) <= (config.window or 3)
    assert all(parameter.is_meta for parameter in streamed.model.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_processes_on_gpus_find_what_one_finds_on_the_cpu(repository, folder):
    """Losses only: other arithmetic may break ties of moves in another way."""
    run = together(repository, folder, "gpus", {"on gpus": JOBS["guided"]}, 2, LEARN_ON="cuda")
    assert run.returncode == 0, run.stderr
    found = [torch.load(folder / f"on gpus.{rank}.pt", map_location="cpu") for rank in range(2)]
    assert found[0]["history"] == found[1]["history"] and orders_of(found[0]) == orders_of(found[1])
    losses = [record.held_out_loss for record in alone(folder, complete(JOBS)["guided"])["history"]]
    assert [record["held_out_loss"] for record in found[0]["history"]] == pytest.approx(losses, rel=1e-2)
