"""A run that was interrupted goes on from its state file and ends with equal bytes."""

import json
import signal
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

from permllm.lcp import group_permutations, trainer

pytestmark = pytest.mark.parametrize("family", ["llama"], indirect=True)
VARIANTS = {
    "adamw": {},
    "scion": {"optimizer": "scion", "learning_rate": 0.3},
    "gumbel": {"gumbel": 0.5},
    "window": {"window": 1, "epochs": 2},
    "random window": {"start": "random", "logits": "uniform", "window": 2, "gumbel": 0.5, "estimator": "soft", "epochs": 2},
    "low rank": {"rank": 4},
    "patience": {"patience": 1},
    "guided": {"optimizer": "guided", "objective": "kl", "moves": 0.5, "curvature": 1.0},
    "guided window": {"optimizer": "guided", "window": 2, "moves": 0.5, "curvature": 1.0, "start": "random", "epochs": 2},
    "search": {"start": "search", "objective": "kl", "recompute_layers": True, "epochs": 2},
}


@pytest.fixture
def state_file(tmp_path):
    return tmp_path / "state" / "learning.pt"


def stop_after(records, problem=KeyboardInterrupt):
    """Return an `on_epoch` that raises at its last record but keeps what it saw."""
    seen = []

    def on_epoch(record):
        seen.append(record)
        if len(seen) == records:
            raise problem

    return on_epoch, seen


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_interrupted_after_an_epoch_ends_as_if_it_had_not_been(learn, state_file, variant):
    """After the start, in the middle (for windows: of the second one), and at the very end."""
    expected = learn(**VARIANTS[variant])
    assert not state_file.exists()
    for records in (1, len(expected.history) // 2 + 1, len(expected.history)):
        on_epoch, _ = stop_after(records)
        with pytest.raises(KeyboardInterrupt):
            learn(on_epoch=on_epoch, state_file=state_file, **VARIANTS[variant])
        seen = []
        result = learn(on_epoch=seen.append, state_file=state_file, **VARIANTS[variant])
        assert result.permutations == expected.permutations
        assert result.history == expected.history == seen
        state_file.unlink()


def test_a_run_interrupted_again_and_again_ends_all_the_same(learn, state_file):
    settings = {"window": 2, "gumbel": 0.5, "epochs": 2}
    expected = learn(**settings)
    for records in range(1, len(expected.history) + 1):  # every try ends one epoch further on
        on_epoch, seen = stop_after(records)
        with pytest.raises(KeyboardInterrupt):
            learn(on_epoch=on_epoch, state_file=state_file, **settings)
        assert seen == expected.history[:records]
    result = learn(state_file=state_file, **settings)
    assert result.permutations == expected.permutations and result.history == expected.history


def test_keeping_the_state_changes_nothing(learn, state_file):
    expected, result = learn(gumbel=0.5), learn(gumbel=0.5, state_file=state_file)
    assert result.permutations == expected.permutations and result.history == expected.history


def test_a_run_interrupted_within_an_epoch_repeats_that_epoch(learn, state_file, monkeypatch):
    settings, steps = {"gumbel": 0.5, "optimizer": "scion", "learning_rate": 0.3}, []
    expected = learn(**settings)
    original = group_permutations.LearnedGroups.pull_back

    def interrupt(groups):
        steps.append(original(groups))
        if len(steps) == 4:  # the second of the two steps of epoch 2
            raise KeyboardInterrupt

    monkeypatch.setattr(group_permutations.LearnedGroups, "pull_back", interrupt)
    with pytest.raises(KeyboardInterrupt):
        learn(state_file=state_file, **settings)
    result = learn(state_file=state_file, **settings)
    assert len(steps) == 4 + 4  # all but the two of epoch 1
    assert result.permutations == expected.permutations and result.history == expected.history


def test_a_run_interrupted_between_two_windows_does_not_learn_the_first_again(learn, state_file, monkeypatch):
    """The state file then says that a window is finished, and nothing of the next."""
    expected, targets, original = learn(window=1), [], trainer._target

    def interrupt(*arguments):
        targets.append(arguments)
        if len(targets) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(trainer, "_target", interrupt)
    with pytest.raises(KeyboardInterrupt):
        learn(window=1, state_file=state_file)
    seen = []
    result = learn(window=1, state_file=state_file, on_epoch=seen.append)
    assert len(targets) == 4  # the first window, the interrupted one, and the last two
    assert result.permutations == expected.permutations
    assert result.history == expected.history == seen


@pytest.mark.parametrize("settings", [{}, {"window": 1}], ids=["all", "window"])
def test_the_state_of_a_finished_run_is_its_result(learn, state_file, monkeypatch, settings):
    expected, seen = learn(state_file=state_file, **settings), []
    before = state_file.read_bytes()
    monkeypatch.setattr(trainer.Run, "_step", lambda *arguments: pytest.fail("a finished run learned again"))
    result = learn(state_file=state_file, on_epoch=seen.append, **settings)
    assert result.permutations == expected.permutations
    assert result.history == expected.history == seen
    assert state_file.read_bytes() == before


def test_a_state_that_is_half_written_never_takes_the_place_of_a_whole_one(learn, state_file, monkeypatch):
    expected, writes, original = learn(), [], torch.save

    def interrupt(state, path):
        writes.append(path)
        if len(writes) == 3:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        original(state, path)

    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        learn(state_file=state_file)
    assert [path.name for path in state_file.parent.iterdir()] == [state_file.name]
    result = learn(state_file=state_file)
    assert result.permutations == expected.permutations and result.history == expected.history


def test_a_run_that_broke_breaks_again_when_it_is_resumed(learn, state_file):
    settings = {"learning_rate": 1e25, "batch_size": 8, "epochs": 6}
    broken = learn(state_file=state_file, **settings)
    again = learn(state_file=state_file, **settings)
    assert broken.stopped and again.stopped == broken.stopped
    assert again.permutations == broken.permutations and again.history == broken.history


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from conftest import build
from permllm.calibration.capture import dense_statistics
from permllm.calibration.samples import CalibrationSet
from permllm.lcp.recipes import LearnConfig
from permllm.lcp.trainer import learn_permutations
from permllm.models.families import adapter_of
from permllm.models.streaming import LoadedModel
from permllm.sparsity.pattern import NMPattern
import json

model = build("llama")
adapter, config = adapter_of(model), LearnConfig(**json.loads(sys.argv[3]))
samples = CalibrationSet(torch.load(sys.argv[4]), held_out=4)
statistics = list(dense_statistics(LoadedModel(model, adapter), samples.tokens, 4))
steps = []


def kill(*call):
    steps.append(torch.is_grad_enabled())
    if sum(steps) == 6:
        os.kill(os.getpid(), signal.SIGKILL)


adapter.layers(model)[0].register_forward_hook(kill)
learn_permutations(LoadedModel(model, adapter), samples, statistics, NMPattern(2, 4), "wanda", config, state_file=Path(sys.argv[2]))
"""


def test_a_killed_process_is_resumed_by_another(learn, config, samples, state_file, tmp_path, repository):
    """Killed within a step of epoch 3, it leaves the state after epoch 2; no handler of ours runs."""
    settings = {"gumbel": 0.5, "start": "search", "objective": "kl"}
    torch.save(samples.tokens, tmp_path / "tokens.pt")
    arguments = [repository / "tests", state_file, json.dumps(asdict(config(**settings))), tmp_path / "tokens.pt"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)], cwd=repository, check=False, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    expected, seen = learn(**settings), []
    on_epoch, _ = stop_after(3)
    assert len(torch.load(state_file)["history"]) == 3
    with pytest.raises(KeyboardInterrupt):
        learn(on_epoch=on_epoch, state_file=state_file, **settings)  # those of the process before come first
    result = learn(on_epoch=seen.append, state_file=state_file, **settings)
    assert result.permutations == expected.permutations
    assert result.history == expected.history == seen
