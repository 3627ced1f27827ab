import os

import pytest
import torch

from permllm.artifacts import read_tensors, sha256
from permllm.scratch import Scratch, alone_in


def interrupted(home, parts, layers):
    """Leave some finished layers behind."""
    with pytest.raises(KeyboardInterrupt), alone_in(home):
        scratch = Scratch.open(home, parts)
        for index in range(layers):
            scratch.keep(index, {"a": torch.full((2,), float(index))}, {"number": index})
        raise KeyboardInterrupt


def test_what_an_interrupted_run_finished_is_there_again_and_gone_when_all_is_done(tmp_path):
    interrupted(tmp_path / "home", ["parts"], 2)
    (tmp_path / "result").mkdir()
    with alone_in(tmp_path / "home"):
        scratch = Scratch.open(tmp_path / "home", ["parts"])
        assert len(scratch) == 2 and scratch.record(1) == {"number": 1}
        hashes = scratch.deliver(tmp_path / "result")
    assert read_tensors(tmp_path / "result" / "layer_001.safetensors")["a"].tolist() == [1, 1]
    assert hashes == {path.name: sha256(path) for path in (tmp_path / "result").iterdir()} and len(hashes) == 2
    assert os.listdir(tmp_path) == ["result"]


def test_a_layer_without_its_record_is_not_finished(tmp_path):
    interrupted(tmp_path, ["parts"], 2)
    next(tmp_path.rglob("layer_001.json")).unlink()
    assert len(Scratch.open(tmp_path, ["parts"])) == 1


@pytest.mark.parametrize("name", ["layer_000.safetensors", "layer_000.json"])
def test_a_layer_that_is_damaged_is_done_again_with_all_that_follow(tmp_path, name):
    interrupted(tmp_path, ["parts"], 3)
    path = next(tmp_path.rglob(name))
    path.write_bytes(path.read_bytes()[:-10] + b"x" + path.read_bytes()[-9:])
    scratch = Scratch.open(tmp_path, ["parts"])
    assert len(scratch) == 0
    scratch.keep(0, {"a": torch.zeros(2)}, {"number": 0})
    assert len(scratch) == 1


def test_what_other_parts_left_is_removed(tmp_path):
    interrupted(tmp_path, ["parts"], 2)
    interrupted(tmp_path, ["other"], 1)
    assert len(Scratch.open(tmp_path, ["parts"])) == 0 and len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1


def test_what_was_half_written_is_removed(tmp_path):
    folder = Scratch.open(tmp_path, ["parts"]).folder
    (folder / ".state.pt.123.partial").write_text("half")
    Scratch.open(tmp_path, ["parts"])
    assert list(folder.iterdir()) == []


def test_two_at_one_work_are_one_too_many(tmp_path):
    with alone_in(tmp_path / "home"), pytest.raises(ValueError, match="another process is at work in"), alone_in(tmp_path / "home"):
        pass
    with alone_in(tmp_path / "home"):  # the first has ended
        pass


def test_who_fails_before_anything_is_finished_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), alone_in(tmp_path / "home"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_result_is_measured_once(tmp_path):
    measured = []
    for _ in range(2):
        scratch = Scratch.open(tmp_path, ["parts"])
        assert scratch.once("task", lambda: measured.append(1) or {"acc": 1 / 3}) == {"acc": 1 / 3}
    assert len(measured) == 1 and scratch.has("task") and not scratch.has("other")


def test_a_damaged_result_is_measured_again(tmp_path):
    scratch = Scratch.open(tmp_path, ["parts"])
    scratch.once("task", lambda: 0.25)
    path = next(tmp_path.rglob("result_task.json"))
    path.write_text(path.read_text().replace("0.25", "0.35"))
    assert scratch.once("task", lambda: 0.5) == 0.5
