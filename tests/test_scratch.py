import os

import pytest
import torch

from permllm.artifacts import read_tensors
from permllm.scratch import Scratch


def interrupted(home, parts, layers):
    """Leave some finished layers behind."""
    with pytest.raises(KeyboardInterrupt), Scratch.open(home, parts) as scratch:
        for index in range(layers):
            scratch.keep(index, {"a": torch.full((2,), float(index))}, {"number": index})
        raise KeyboardInterrupt


def test_what_an_interrupted_run_finished_is_there_again_and_gone_when_all_is_done(tmp_path):
    interrupted(tmp_path / "home", ["parts"], 2)
    (tmp_path / "result").mkdir()
    with Scratch.open(tmp_path / "home", ["parts"]) as scratch:
        assert len(scratch) == 2 and scratch.record(1) == {"number": 1}
        scratch.deliver(tmp_path / "result")
    assert read_tensors(tmp_path / "result" / "layer_001.safetensors")["a"].tolist() == [1, 1]
    assert os.listdir(tmp_path) == ["result"]


def test_a_layer_without_its_record_is_not_finished(tmp_path):
    interrupted(tmp_path, ["parts"], 2)
    next(tmp_path.rglob("layer_001.json")).unlink()
    with Scratch.open(tmp_path, ["parts"]) as scratch:
        assert len(scratch) == 1


def test_what_other_parts_left_is_removed(tmp_path):
    interrupted(tmp_path, ["parts"], 2)
    interrupted(tmp_path, ["other"], 1)
    with Scratch.open(tmp_path, ["parts"]) as scratch:
        assert len(scratch) == 0 and len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1


def test_two_at_one_work_are_one_too_many(tmp_path):
    with Scratch.open(tmp_path, ["parts"]), pytest.raises(ValueError, match="another process is at work in"), Scratch.open(tmp_path, ["parts"]):
        pass
    with Scratch.open(tmp_path, ["parts"]):  # the first has ended
        pass
