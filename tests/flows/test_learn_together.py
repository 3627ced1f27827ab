"""The stage `learn` in several processes: one command, one set of files, the results of one process, no orphan."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from flows import calibrate, learn
from permllm.params import Params

MODEL = {
    "source": "model/llama",
    "device": "cpu",
    "calibrate": {"text": {"files": "text/*.txt"}, "sequences": 12, "length": 32, "held_out": 4, "batch_size": 4},
    "evaluate": {"perplexity": {"text": {"files": "text/*.txt"}, "length": 32}, "zero_shot": {"tasks": {}}},
}
METHODS = {
    "guided": {"permutation": "lcp", "learn": {"start": "cp", "epochs": 20, "batch_size": 4}},
    "windows": {"permutation": "lcp", "learn": {"recipe": "paper", "window": 1, "epochs": 2, "batch_size": 4}},
}
RUN = {"models": ["tiny"], "patterns": ["2:4"], "one_shot": [], "learned": list(METHODS), "methods": list(METHODS)}


@pytest.fixture
def project(tiny_folder: Path) -> Path:
    """A folder with params.yaml, a tiny checkpoint and its calibration, entered."""
    write_params(processes=1)
    calibrate.main(["--model", "tiny"])
    return tiny_folder


def write_params(**settings: object) -> None:
    Path("params.yaml").write_text(yaml.safe_dump({"run": RUN, "methods": METHODS, "models": {"tiny": {**MODEL, **settings}}}))


def setting(method: str) -> list[str]:
    return ["--model", "tiny", "--pattern", "2:4", "--method", method]


def orders(method: str) -> bytes:
    return Path(f"data/learn/tiny/2:4/{method}/orders.safetensors").read_bytes()


def history(method: str) -> list[dict]:
    return [json.loads(line) for line in Path(f"data/learn/tiny/2:4/{method}/history.jsonl").read_text().splitlines()]


def test_two_processes_that_are_killed_leave_no_orphan_and_end_with_the_files_of_one(project, repository):
    learn.main(setting("guided"))
    expected, losses = orders("guided"), [record["held_out_loss"] for record in history("guided")]
    shutil.rmtree("data/learn")
    write_params(processes=2)
    command = [sys.executable, "-m", "flows.learn", *setting("guided")]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    run = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not list(Path(".cache/learn").rglob("state.pt")):
        assert run.poll() is None
        time.sleep(0.01)
    workers = psutil.Process(run.pid).children()
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert len(workers) == 2
    for worker in workers:
        worker.wait(timeout=120)  # only there so that a hang fails
    assert not Path("data/learn/tiny/2:4/guided").exists()
    resumed = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert orders("guided") == expected
    assert [record["held_out_loss"] for record in history("guided")] == pytest.approx(losses, rel=1e-5)
    assert list(Path(".cache/learn").iterdir()) == [] and not list(Path("data").rglob("*.partial"))
    assert resumed.stderr.count("learn epoch 20/20") == 1  # one process speaks


def test_a_window_streams_the_model(project, monkeypatch):
    monkeypatch.setattr(learn, "load_model", lambda source: pytest.fail("the whole model was loaded"))
    learn.main(setting("windows"))
    assert [record["window"] for record in history("windows")] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("processes", "problem"),
    [(5, "learn.batch_size is 4, but 5 processes divide a batch"), (0, "processes is 0, but at least 1 has to learn")],
)
def test_processes_that_cannot_divide_a_batch_are_refused_with_the_parameters(project, processes, problem):
    write_params(processes=processes)
    with pytest.raises(ValueError, match=problem):
        Params.read()
