import os

import pytest
import torch

from permllm.artifacts import write_tensors
from permllm.tensor_files import DTYPES, TensorSpec, read_tensor, tensor_specs, warm, write_tensors_in_turn


@pytest.fixture
def tensors():
    """Tensors of every type, in no order, one of them empty and one without dimensions."""
    found = {f"{letter}.{name}": torch.arange(15).reshape(3, 5).to(dtype) for name, dtype in DTYPES.items() for letter in "zé"}
    return found | {"empty": torch.empty(0, 4), "scalar": torch.tensor(3.0)}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_file_written_in_turn_has_the_bytes_of_one_written_at_once(tensors, tmp_path, metadata):
    write_tensors(tmp_path / "once", tensors, metadata)
    write_tensors_in_turn(tmp_path / "turn", {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}, tensors.__getitem__, metadata)
    assert (tmp_path / "turn").read_bytes() == (tmp_path / "once").read_bytes()


def test_specs_and_tensors_read_back(tensors, tmp_path):
    write_tensors(tmp_path / "file", tensors)
    specs = tensor_specs(tmp_path / "file")
    assert {name: (spec.dtype, spec.shape, spec.nbytes) for name, spec in specs.items()} == {
        name: (tensor.dtype, tuple(tensor.shape), tensor.nbytes) for name, tensor in tensors.items()
    }
    raw = (tmp_path / "file").read_bytes()
    for name, tensor in tensors.items():
        assert raw[specs[name].start :][: tensor.nbytes] == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert torch.equal(read_tensor(tmp_path / "file", name).reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_a_tensor_that_is_not_as_announced_leaves_the_file_as_it_was(tmp_path):
    (tmp_path / "file").write_text("before")
    with pytest.raises(ValueError, match=r"a is torch.float32 \(3,\), but .*file was to hold torch.float32 \(2,\)"):
        write_tensors_in_turn(tmp_path / "file", {"a": TensorSpec(torch.float32, (2,))}, lambda _: torch.zeros(3))
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "before"


def test_warming_reads_past_the_end_of_no_file(tmp_path):
    write_tensors(tmp_path / "file", {"a": torch.zeros(100)})
    warm(tmp_path / "file", [TensorSpec(torch.float32, (1000,), start=50)])
