"""Stages that are killed in the middle go on where they stopped, and end with the bytes of an undisturbed run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows import calibrate, prune
from permllm import memory
from permllm.calibration import capture
from permllm.pruning import layerwise
from permllm.scratch import Scratch

MODEL = {
    "source": "model/llama",
    "device": "cpu",
    "calibrate": {"text": {"files": "text/*.txt"}, "sequences": 12, "length": 32, "held_out": 4, "batch_size": 4},
    "evaluate": {"perplexity": {"text": {"files": "text/*.txt"}, "length": 32}, "zero_shot": {"tasks": {}}},
}
METHODS = {
    "wanda": {"score": "wanda"},
    "random": {"score": "wanda", "permutation": "random"},
    "sparsegpt+cp": {"update": "sparsegpt", "permutation": "cp"},
    "search-foldable": {"permutation": "search", "layout": "foldable"},
}
RUN = {"models": ["tiny"], "patterns": ["2:4"], "one_shot": list(METHODS), "learned": [], "methods": list(METHODS)}
KILL = """
import os, signal, sys
from permllm.scratch import Scratch
keep, after = Scratch.keep, int(sys.argv[1])
def keep_and_die(self, index, tensors, record):
    keep(self, index, tensors, record)
    if index + 1 == after:
        os.kill(os.getpid(), signal.SIGKILL)
Scratch.keep = keep_and_die
"""


@pytest.fixture
def project(tmp_path, monkeypatch, tiny_checkpoint):
    monkeypatch.chdir(tmp_path)
    tiny_checkpoint(tmp_path / "model", "llama")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    write_params(sequential=False)
    return tmp_path


def write_params(sequential: bool, **settings: object) -> None:
    record = {"run": RUN, "methods": METHODS, "models": {"tiny": {**MODEL, "prune": {"sequential": sequential}, **settings}}}
    Path("params.yaml").write_text(yaml.safe_dump(record))


def setting(method: str) -> list[str]:
    return ["--model", "tiny", "--pattern", "2:4", "--method", method]


def result(*parts: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path("data").joinpath(*parts).iterdir()}


def killed_after(layers: int, stage, arguments: list[str]) -> None:
    """Run a stage in a forked process that is killed as soon as so many layers are on the disk."""
    child = os.fork()
    if child == 0:
        keep = Scratch.keep

        def keep_and_die(self, index, *rest):
            keep(self, index, *rest)
            if index + 1 == layers:
                os.kill(os.getpid(), signal.SIGKILL)

        Scratch.keep = keep_and_die
        try:
            stage.main(arguments)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def counted(monkeypatch, module, name: str) -> list:
    """Return a list that grows with every call of a function."""
    calls, original = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *arguments, **named: calls.append(name) or original(*arguments, **named))
    return calls


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_prune_goes_on_with_equal_bytes_and_prunes_no_layer_twice(project, monkeypatch, method, sequential):
    write_params(sequential)
    calibrate.main(["--model", "tiny"])
    prune.main(setting(method))
    expected = result("prune", "tiny", "2:4", method)
    (project / "data/prune/tiny/2:4" / method / "manifest.json").unlink()  # so that nothing of it is taken for the new result
    killed_after(2, prune, setting(method))
    calls = counted(monkeypatch, layerwise, "prune_layer")
    prune.main(setting(method))
    assert len(calls) == 1
    assert result("prune", "tiny", "2:4", method) == expected
    assert not list(Path(".cache/prune").iterdir())


def test_prune_killed_as_a_command_goes_on_with_equal_bytes(project):
    calibrate.main(["--model", "tiny"])
    prune.main(setting("random"))
    expected = result("prune", "tiny", "2:4", "random")
    script = f"{KILL}\nfrom flows import prune\nprune.main(sys.argv[2:])"
    environment = os.environ | {"PYTHONPATH": str(Path(prune.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", script, "1", *setting("random")], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(Path(".cache/prune").rglob("layer_*.safetensors"))) == 1
    prune.main(setting("random"))
    assert result("prune", "tiny", "2:4", "random") == expected


def test_a_killed_calibrate_goes_on_with_equal_bytes(project, monkeypatch):
    calibrate.main(["--model", "tiny"])
    expected = result("calibrate", "tiny")
    killed_after(2, calibrate, ["--model", "tiny"])
    calls = counted(monkeypatch, capture, "accumulated_grams")
    calibrate.main(["--model", "tiny"])
    assert len(calls) == 1 and result("calibrate", "tiny") == expected
    assert not list(Path(".cache/calibrate").iterdir())


def test_what_other_settings_left_is_not_taken_up(project, monkeypatch):
    calibrate.main(["--model", "tiny"])
    killed_after(2, prune, setting("wanda"))
    write_params(sequential=True)
    calls = counted(monkeypatch, layerwise, "prune_layer")
    prune.main(setting("wanda"))
    assert len(calls) == 3 and not list(Path(".cache/prune").iterdir())


def test_a_new_calibration_makes_what_was_pruned_stale(project, monkeypatch):
    calibrate.main(["--model", "tiny"])
    killed_after(2, prune, setting("wanda"))
    calibrate.main(["--model", "tiny"])
    calls = counted(monkeypatch, layerwise, "prune_layer")
    prune.main(setting("wanda"))
    assert len(calls) == 3


@pytest.mark.parametrize("kept", ["disk", "device"])
def test_where_hidden_states_are_kept_changes_no_byte(project, kept):
    calibrate.main(["--model", "tiny"])
    expected = result("calibrate", "tiny")
    write_params(sequential=False, hidden_states=kept)
    calibrate.main(["--model", "tiny"])
    assert result("calibrate", "tiny") == expected


def test_unknown_places_for_hidden_states_are_refused(project):
    write_params(sequential=False, hidden_states="ram")
    with pytest.raises(SystemExit, match="unknown hidden_states 'ram': choose one of device, disk, memory"):
        calibrate.main(["--model", "tiny"])


@pytest.mark.parametrize("stage", [calibrate, prune])
def test_a_stage_that_does_not_fit_into_memory_is_refused_before_it_starts(project, monkeypatch, stage):
    calibrate.main(["--model", "tiny"])
    before = {path: path.read_bytes() for path in Path("data").rglob("*") if path.is_file()}
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 100)
    with pytest.raises(SystemExit, match=r"not enough memory for \w+ tiny: about .* GB are needed on this machine and 0.00 GB are free"):
        stage.main(["--model", "tiny"] if stage is calibrate else setting("wanda"))
    assert {path: path.read_bytes() for path in Path("data").rglob("*") if path.is_file()} == before
