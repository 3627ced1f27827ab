"""The graph under DVC on a tiny model: nothing runs twice, one change reruns what it touches, a kill loses nothing."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow

PARAMS = {
    "run": {"models": ["tiny"], "patterns": ["2:4"], "one_shot": ["wanda"], "learned": ["permllm"], "methods": ["wanda", "permllm"]},
    "methods": {"wanda": {"score": "wanda"}, "permllm": {"score": "wanda", "permutation": "lcp", "learn": {"start": "cp"}}},
    "models": {
        "tiny": {
            "source": "data/models/llama",
            "dtype": "float32",
            "device": "cpu",
            "calibrate": {"text": {"files": "data/prose/*.txt"}, "sequences": 12, "length": 32, "held_out": 4, "batch_size": 4},
            "prune": {"sequential": False},
            "learn": {"epochs": 150, "batch_size": 4},
            "benchmark": {"tokens": [1], "seconds": 0.001},
            "evaluate": {"perplexity": {"text": {"files": "data/prose/*.txt"}, "length": 32}, "zero_shot": {"tasks": {}}},
        }
    },
}
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
LEARNED = Path("data/learn/tiny/2:4/permllm")


@pytest.fixture(scope="module")
def project(tmp_path_factory, repository):
    """A copy of the pipeline with a tiny model and its own parameters, all stages run once."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("flows", "permllm"):
        shutil.copytree(repository / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(repository / name, folder / name)
    (folder / "data" / "prose").mkdir(parents=True)
    (folder / "data" / "prose" / "a_1.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return folder


@pytest.fixture
def ready(project, tiny_checkpoint, monkeypatch):
    """The project, entered; the first test that asks runs it."""
    monkeypatch.chdir(project)
    if not Path("dvc.lock").exists():
        tiny_checkpoint(project / "data" / "models", "llama")
        write_params(PARAMS)
        subprocess.run(["git", "init", "--quiet"], check=True)
        dvc("init", "--quiet")
        assert "Running stage 'report'" in dvc("repro")
    return project


def dvc(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write_params(params: dict) -> None:
    Path("params.yaml").write_text(yaml.safe_dump(params))


def executed(output: str) -> list[str]:
    """Return the stages that DVC ran."""
    return re.findall(r"Running stage '(.*)':", output)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_second_run_executes_nothing(ready):
    assert "Running stage" not in dvc("repro")
    assert not Path("data/metrics/report.json").exists()  # of what no model is behind: it would be out of date with itself


def test_without_learned_methods_the_report_needs_none(ready):
    write_params({**PARAMS, "run": {**PARAMS["run"], "learned": [], "methods": ["wanda"]}})
    Path("data/learn").rename("learned")
    try:
        assert executed(dvc("repro")) == ["report"]
    finally:
        Path("learned").rename("data/learn")
        write_params(PARAMS)
    assert executed(dvc("repro")) == ["report"]


def test_changing_one_method_reruns_that_method_alone_and_changing_it_back_reruns_none(ready):
    stages = [f"{stage}@tiny-2:4-wanda" for stage in ("prune", "assemble", "evaluate")]
    undisturbed = content(Path("data/prune/tiny/2:4/wanda"))
    wanda = {**PARAMS["methods"], "wanda": {"score": "ria"}}
    write_params({**PARAMS, "methods": wanda})
    ran = executed(dvc("repro"))
    assert content(Path("data/prune/tiny/2:4/wanda")) != undisturbed
    write_params(PARAMS)
    back = dvc("repro")
    assert ran == [*stages, "report"]
    assert executed(back) == ["report"]  # its outputs are in git instead of DVC's cache
    assert all(f"Stage '{name}' is cached - skipping run" in back for name in stages)
    assert content(Path("data/prune/tiny/2:4/wanda")) == undisturbed


def test_what_a_failed_stage_had_made_before_is_put_back_as_its_message_says(ready):
    undisturbed = content(Path("data/prune/tiny/2:4/wanda"))
    write_params({**PARAMS, "methods": {**PARAMS["methods"], "wanda": {"score": "wanda", "permutation": "none"}}})
    failed = subprocess.run([sys.executable, "-m", "dvc", "repro", "prune@tiny-2:4-wanda"], capture_output=True, text=True, env=ENVIRONMENT)
    write_params(PARAMS)
    (command,) = re.findall(r"dvc (checkout .*)`", failed.stderr)
    assert not Path("data/prune/tiny/2:4/wanda").exists()
    dvc(*command.split())
    assert content(Path("data/prune/tiny/2:4/wanda")) == undisturbed


def test_learning_that_was_killed_finishes_with_the_same_result_and_leaves_no_orphan(ready):
    undisturbed = content(LEARNED)
    history = Path("data/learn/tiny/2:4/.permllm.partial/history.jsonl")
    run = subprocess.Popen([sys.executable, "-m", "dvc", "repro", "--force", "--single-item", "learn@tiny-2:4-permllm"], env=ENVIRONMENT)
    deadline = time.monotonic() + 60
    while not (history.exists() and len(history.read_text().splitlines()) > 3):
        assert time.monotonic() < deadline and run.poll() is None, "learning did not start"
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    dvc("checkout", "learn@tiny-2:4-permllm")
    assert content(LEARNED) == undisturbed  # what was there can be put back
    while is_learning(ready):
        assert time.monotonic() < deadline, "the stage outlived dvc"
        time.sleep(0.05)
    dvc("repro", "--force", "--single-item", "learn@tiny-2:4-permllm")
    assert content(LEARNED) == undisturbed
    assert not history.parent.exists()


def is_learning(folder: Path) -> bool:
    """Whether a process of the stage runs in the folder."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"flows.learn" in (process / "cmdline").read_bytes() and (process / "cwd").readlink() == folder:
                return True
        except OSError:  # it ended meanwhile, or belongs to somebody else
            continue
    return False
