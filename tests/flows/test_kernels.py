"""The command that measures kernels keeps the rows of other devices and writes table and figure."""

import json

import pytest

from flows import kernels


def run(tmp_path, *more):
    arguments = ["--shapes", "64x32", "--patterns", "2:4", "--tokens", "1", "--seconds", "0.001", "--device", "cpu", "--dtype", "float32"]
    kernels.main([*arguments, "--no-compile", "--no-model", "--results", str(tmp_path), *more])
    return json.loads((tmp_path / "kernels.json").read_text())


def test_rows_of_this_device_are_replaced_and_others_stay(tmp_path):
    other = {"device": "another", "kernel": "dense", "out": 1, "in": 1, "tokens": 1, "pattern": "2:4", "dtype": "float32", "ms": 1.0, "speedup": 1.0}
    (tmp_path / "kernels.json").write_text(json.dumps([other]))
    first = run(tmp_path)
    second = run(tmp_path)
    assert first[0] == second[0] == other and len(first) == len(second) > 4
    assert all("flows.kernels" in row["command"] and row["versions"] for row in second[1:])
    assert "| 64 x 32 | 1 |" in (tmp_path / "kernels.md").read_text()
    assert (tmp_path / "kernels.png").read_bytes()[:4] == b"\x89PNG"


def test_a_wrong_device_is_said_before_anything_is_measured(tmp_path):
    with pytest.raises(SystemExit, match="permllm kernels: device 'cuda:9' is not on this machine"):
        run(tmp_path, "--device", "cuda:9")
    assert not list(tmp_path.iterdir())
