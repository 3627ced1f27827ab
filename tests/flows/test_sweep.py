"""A sweep over two workers with a clone each: parts are shared through the remote, and a killed worker's go to the other."""

import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

METHODS = {
    "magnitude": {"score": "magnitude"},
    "wanda": {"score": "wanda"},
    "ria": {"score": "ria"},
    "wanda+cp": {"score": "wanda", "permutation": "cp"},
}
TEXT = {"files": "data/prose/*.txt"}
MODEL = {
    "source": "data/models/llama",
    "dtype": "float32",
    "device": "cpu",
    "calibrate": {"text": TEXT, "sequences": 12, "length": 32, "held_out": 4, "batch_size": 4},
    "prune": {"sequential": False},
    "evaluate": {"perplexity": {"text": TEXT, "length": 32}, "zero_shot": {"tasks": {}}},
}
RUN = {"models": ["tiny"], "patterns": ["2:4", "4:8"], "one_shot": list(METHODS), "learned": [], "methods": list(METHODS)}
IDENTITY = {f"GIT_{who}_{what}": "test@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


@pytest.fixture
def clones(tmp_path: Path, repository: Path, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Three clones of the project with a tiny model and a common DVC remote; every stage that runs adds a line to `stages`."""
    origin = tmp_path / "origin"
    for name in ("flows", "permllm"):
        shutil.copytree(repository / name, origin / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".dvcignore", ".gitignore"):
        shutil.copy(repository / name, origin)
    graph = yaml.safe_load((repository / "dvc.yaml").read_text())
    for stage in graph["stages"].values():
        stage["cmd"] = f"echo $DVC_STAGE >> {tmp_path}/stages && {stage['cmd']}"
    (origin / "dvc.yaml").write_text(yaml.safe_dump(graph, sort_keys=False))
    (origin / "params.yaml").write_text(yaml.safe_dump({"run": RUN, "methods": METHODS, "models": {"tiny": MODEL}}))
    tiny_checkpoint(origin / "data" / "models", "llama")
    (origin / "data" / "prose").mkdir()
    (origin / "data" / "prose" / "a_1.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    (tmp_path / "remote").mkdir()
    dvc = [sys.executable, "-m", "dvc"]
    for command in (
        ["git", "init", "--quiet"],
        [*dvc, "init", "--quiet"],
        [*dvc, "remote", "add", "--quiet", "shared", str(tmp_path / "remote")],
        ["git", "add", "."],
        ["git", "commit", "--quiet", "--message", "start"],
    ):
        subprocess.run(command, cwd=origin, check=True, env=os.environ | IDENTITY)
    for name in ("first", "second"):
        subprocess.run(["git", "clone", "--quiet", origin, tmp_path / name], check=True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return [origin, tmp_path / "first", tmp_path / "second"]


def runs_of(folder: Path) -> Counter[str]:
    """Return how often each stage was run, wherever it was."""
    path = folder / "stages"
    return Counter(path.read_text().split()) if path.exists() else Counter()


def stage_of(worker: psutil.Process) -> psutil.Process | None:
    """Return the stage that a worker runs now."""
    for process in worker.children(recursive=True):
        try:
            if "flows.prune" in process.cmdline() and "flows.processes" not in process.cmdline():
                return process
        except psutil.Error:  # it has ended meanwhile
            continue
    return None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_a_sweep_ends_complete_though_one_of_two_workers_is_killed_halfway(clones: list[Path], server: Any, tmp_path: Path):
    origin, *folders = clones
    workers = [server.start_worker(folder) for folder in folders]
    before = {run["id"] for run in server.find("flow_runs")}
    sweep = server.start("sweep", "flows.sweep", "--targets", "prune", "--remote", "shared", folder=origin)

    deadline = time.monotonic() + 300
    while not (sum(runs_of(tmp_path).values()) > 4 and stage_of(workers[0])):
        assert time.monotonic() < deadline and sweep.poll() is None, server.log("sweep").read_text()
        time.sleep(0.05)
    left = workers[0].children(recursive=True)
    workers[0].kill()
    assert psutil.wait_procs(left, timeout=20)[1] == []
    assert sweep.wait(timeout=300) == 0, server.log("sweep").read_text()

    runs = runs_of(tmp_path)
    assert runs.keys() == {"calibrate@tiny", *(f"prune@tiny-{pattern}-{method}" for pattern in RUN["patterns"] for method in METHODS)}
    assert max(runs.values()) <= 2
    assert sum(runs.values()) <= len(runs) + 1  # what the killed worker had begun
    pruned = [origin / "data" / "prune" / "tiny" / pattern / method / "manifest.json" for pattern in RUN["patterns"] for method in METHODS]
    assert all(path.is_file() for path in pruned)
    crashed = [run["name"] for run in server.find("flow_runs") if run["state_type"] == "CRASHED" and run["id"] not in before]
    assert len(crashed) == 1
