"""Stages that are killed in the middle go on where they stopped, and end with the bytes of an undisturbed run."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from flows import assemble, calibrate, evaluate, learn, prune, reconstruct, stage
from permllm import memory
from permllm.calibration import capture
from permllm.evaluation import evaluate as evaluation
from permllm.evaluation import zero_shot
from permllm.lcp import run as learning
from permllm.lcp.run import Run, State
from permllm.pruning import layerwise
from permllm.scratch import Scratch, alone_in

TASKS = {name: {"files": "questions.jsonl"} for name in ("openbookqa", "arc_easy")}
QUESTIONS = [{"query": f"The fox number {number} jumps", "choices": ["over the dog", "so lazy"], "gold": number % 2} for number in range(4)]
MODEL = {
    "source": "model/llama",
    "device": "cpu",
    "calibrate": {"text": {"files": "text/*.txt"}, "sequences": 12, "length": 32, "held_out": 4, "batch_size": 4},
    "learn": {"epochs": 3, "batch_size": 4},
    "evaluate": {"perplexity": {"text": {"files": "text/*.txt"}, "length": 32}, "zero_shot": {"tasks": TASKS}},
}
METHODS = {
    "wanda": {"score": "wanda"},
    "random": {"score": "wanda", "permutation": "random"},
    "sparsegpt+cp": {"update": "sparsegpt", "permutation": "cp"},
    "search-foldable": {"permutation": "search", "layout": "foldable"},
}
LEARNED = {"permllm": {"score": "wanda", "permutation": "lcp", "learn": {"start": "cp"}}}
RUN = {"models": ["tiny"], "patterns": ["2:4"], "one_shot": list(METHODS), "learned": list(LEARNED), "methods": [*METHODS, *LEARNED]}
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
def project(tiny_folder: Path) -> Path:
    (tiny_folder / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    write_params(sequential=False)
    return tiny_folder


def write_params(sequential: bool, **settings: object) -> None:
    record = {"run": RUN, "methods": METHODS | LEARNED, "models": {"tiny": {**MODEL, "prune": {"sequential": sequential}, **settings}}}
    Path("params.yaml").write_text(yaml.safe_dump(record))


def setting(method: str) -> list[str]:
    return ["--model", "tiny", "--pattern", "2:4", "--method", method]


def result(*parts: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path("data").joinpath(*parts).iterdir()}


def killed(stage, arguments: list[str], owner, name: str, when) -> None:
    """Run a stage in a forked process that is killed when a method of `owner` has run and `when` says so of its arguments."""
    child = os.fork()
    if child == 0:
        original = getattr(owner, name)

        def run_and_die(*given):
            found = original(*given)
            if when(*given):
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        setattr(owner, name, run_and_die)
        try:
            stage.main(arguments)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def killed_after(layers: int, stage, arguments: list[str]) -> None:
    """Kill a stage as soon as so many layers are on the disk."""
    killed(stage, arguments, Scratch, "keep", lambda _, index, *rest: index + 1 == layers)


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
    write_params(sequential=False, calibrate={**MODEL["calibrate"], "seed": 1})
    calibrate.main(["--model", "tiny"])
    calls = counted(monkeypatch, layerwise, "prune_layer")
    prune.main(setting("wanda"))
    assert len(calls) == 3


@pytest.fixture
def learned(project):
    """What learning leaves when nothing disturbs it, by name; it is removed again."""
    calibrate.main(["--model", "tiny"])
    learn.main(setting("permllm"))
    expected = result("learn", "tiny", "2:4", "permllm")
    shutil.rmtree("data/learn")
    return expected


def learned_again() -> dict:
    learn.main(setting("permllm"))
    assert not list(Path(".cache/learn").iterdir())
    return result("learn", "tiny", "2:4", "permllm")


def test_learning_that_is_killed_goes_on_with_equal_bytes(learned, monkeypatch):
    killed(learn, setting("permllm"), State, "write", lambda state: state.epochs == 2)
    steps = counted(monkeypatch, Run, "_step")
    assert learned_again() == learned and len(steps) == 2  # of the third epoch


def test_a_reconstruction_that_is_killed_goes_on_with_equal_bytes(learned, monkeypatch):
    learn.main(setting("permllm"))
    reconstruct.main(setting("permllm"))
    expected = result("prune", "tiny", "2:4", "permllm")
    shutil.rmtree("data/prune")
    killed_after(2, reconstruct, setting("permllm"))
    layers = counted(monkeypatch, layerwise, "prune_layer")
    reconstruct.main(setting("permllm"))
    assert result("prune", "tiny", "2:4", "permllm") == expected and len(layers) == 1


def test_orders_of_another_calibration_are_refused(learned):
    learn.main(setting("permllm"))
    write_params(sequential=False, calibrate={**MODEL["calibrate"], "seed": 1})
    calibrate.main(["--model", "tiny"])
    with pytest.raises(SystemExit, match="were learned from another calibration; run the learn stage again"):
        reconstruct.main(setting("permllm"))


def test_learning_that_is_killed_while_it_writes_its_state_leaves_nothing_half_written(learned):
    killed(learn, setting("permllm"), learning.torch, "save", lambda state, _: len(state["history"]) == 2)
    assert len(list(Path(".cache/learn").rglob("*.partial"))) == 1
    assert learned_again() == learned


def test_a_damaged_state_is_not_taken_up(learned, capsys):
    killed(learn, setting("permllm"), State, "write", lambda state: state.epochs == 2)
    state = next(Path(".cache/learn").rglob("state.pt"))
    content = state.read_bytes()
    best = content.index(torch.load(state)["orders"][0]["mlp_out"].numpy().tobytes())
    state.write_bytes(content[:best] + bytes([content[best] ^ 1]) + content[best + 1 :])
    assert learned_again() == learned
    assert "state.pt is damaged (its checksum is of other contents): learning begins again" in capsys.readouterr().err


def test_what_other_settings_learned_is_not_taken_up(learned, monkeypatch):
    killed(learn, setting("permllm"), State, "write", lambda state: state.epochs == 2)
    write_params(sequential=False, learn={**MODEL["learn"], "seed": 1})
    steps = counted(monkeypatch, Run, "_step")
    learn.main(setting("permllm"))
    assert len(steps) == 6 and not list(Path(".cache/learn").iterdir())


def test_an_evaluation_that_is_killed_measures_nothing_twice(project, monkeypatch):
    metrics = Path("data/metrics/evaluate/tiny/dense.json")
    dense = ["--model", "tiny", "--method", "dense"]
    evaluate.main(dense)
    expected = json.loads(metrics.read_text())
    metrics.unlink()
    killed(evaluate, dense, Scratch, "once", lambda _, name, *rest: name == "arc_easy")
    perplexities, tasks = counted(monkeypatch, evaluation, "perplexity"), counted(monkeypatch, zero_shot, "accuracies")
    evaluate.main(dense)
    assert perplexities == [] and tasks == ["accuracies"]  # openbookqa
    assert {**json.loads(metrics.read_text()), "seconds": 0} == {**expected, "seconds": 0}
    assert expected["zero_shot"].keys() == TASKS.keys() and not list(Path(".cache/evaluate").iterdir())


def test_another_checkpoint_is_evaluated_from_the_start(project, monkeypatch):
    dense = ["--model", "tiny", "--method", "dense"]
    killed(evaluate, dense, Scratch, "once", lambda _, name, *rest: name == "perplexity")
    weights = Path("model/llama/model.safetensors")
    tensors = load_file(weights)
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1}, weights, {"format": "pt"})
    perplexities = counted(monkeypatch, evaluation, "perplexity")
    evaluate.main(dense)
    assert len(perplexities) == 1


def test_what_killed_stages_keep_goes_away_after_their_metrics_are_written(project, monkeypatch):
    calibrate.main(["--model", "tiny"])
    killed(prune, setting("wanda"), stage, "write_json", lambda *rest: True)
    calls = counted(monkeypatch, layerwise, "prune_layer")
    prune.main(setting("wanda"))
    assert calls == [] and not list(Path(".cache/prune").iterdir())


@pytest.mark.parametrize("chosen", [calibrate, prune, learn, assemble, evaluate])
def test_a_second_process_at_one_setting_is_refused(project, chosen):
    calibrate.main(["--model", "tiny"])
    name = chosen.__name__.rpartition(".")[2]
    arguments = ["--model", "tiny"] if chosen is calibrate else setting("permllm" if chosen is learn else "wanda")
    home = Path(".cache") / name / "_".join(arguments[1::2])
    before = sorted(Path("data").rglob("*"))
    with alone_in(home), pytest.raises(SystemExit, match=f"another process is at work in {home}; wait until it has ended, or stop it"):
        chosen.main(arguments)
    assert sorted(Path("data").rglob("*")) == before


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("reader", "file", "said"),
    [
        (prune, "calibrate/tiny/layer_001.safetensors", "another SHA-256 than its manifest.*run the calibrate stage again"),
        (prune, "calibrate/tiny/samples.safetensors", "another SHA-256 than its manifest.*run the calibrate stage again"),
        (prune, "calibrate/tiny/manifest.json", "manifest.json.*run the calibrate stage again"),
        (learn, "calibrate/tiny/layer_002.safetensors", "another SHA-256 than its manifest.*run the calibrate stage again"),
        (assemble, "prune/tiny/2:4/wanda/layer_002.safetensors", "another SHA-256 than its manifest.*run the prune stage again"),
        (evaluate, "assemble/tiny/2:4/wanda/model.safetensors", r"not as it was written: model\..* changed; run the assemble stage again"),
        (evaluate, "assemble/tiny/2:4/wanda/config.json", "not as it was written: config.json changed"),
        (evaluate, "assemble/tiny/2:4/wanda/permllm/hashes.json", "another SHA-256 than its manifest.*run the assemble stage again"),
    ],
)
def test_a_flipped_bit_is_found_by_who_reads_it(project, reader, file, said):
    calibrate.main(["--model", "tiny"])
    prune.main(setting("wanda"))
    assemble.main(setting("wanda"))
    flip(Path("data") / file, -20)
    with pytest.raises(SystemExit, match=said):
        reader.main(setting("permllm" if reader is learn else "wanda"))


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


@pytest.mark.parametrize("chosen", [calibrate, prune])
def test_a_stage_that_does_not_fit_into_memory_is_refused_before_it_starts(project, monkeypatch, chosen):
    calibrate.main(["--model", "tiny"])
    before = {path: path.read_bytes() for path in Path("data").rglob("*") if path.is_file()}
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 100)
    with pytest.raises(SystemExit, match=r"not enough memory for \w+ tiny: about .* GB are needed on this machine and 0.00 GB are free"):
        chosen.main(["--model", "tiny"] if chosen is calibrate else setting("wanda"))
    assert {path: path.read_bytes() for path in Path("data").rglob("*") if path.is_file()} == before
