"""Safetensors files tensor by tensor: described, read, and written without ever holding the whole file.

A file is 8 bytes with the length of a header, the header (JSON: type, shape and place of every tensor), and the
tensors. `safe_open` maps a file, and every page touched counts as the process's memory until the file is closed; here a
tensor is copied out and its mapping closed.
"""

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from permllm.artifacts import replacing

# In the order in which safetensors lays tensors out: by alignment, so that no padding is needed, then by name.
DTYPES = {
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64,
    "F32": torch.float32, "U32": torch.uint32, "I32": torch.int32,
    "BF16": torch.bfloat16, "F16": torch.float16, "U16": torch.uint16, "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
WARMING_BYTES = 8 << 20


@dataclass(frozen=True)
class TensorSpec:
    """What a file says of a tensor.

    Attributes:
        start: of its first byte in the file; 0 for a tensor that is in none yet.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorSpec":
        """Describe a tensor in memory."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def numel(self) -> int:
        """How many entries it has."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.numel * self.dtype.itemsize


def tensor_specs(path: Path) -> dict[str, TensorSpec]:
    """Describe the tensors of a safetensors file, from its header alone.

    Raises:
        ValueError: if it holds a type that is not known.
    """
    with path.open("rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    unknown = sorted({entry["dtype"] for entry in header.values()} - DTYPES.keys())
    if unknown:
        raise ValueError(f"{path} holds tensors of type {', '.join(unknown)}, which this version cannot read")
    return {name: TensorSpec(DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0]) for name, entry in header.items()}


def read_tensor(path: Path, name: str) -> Tensor:
    """Read one tensor of a safetensors file into memory of its own."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name).clone()


def warm(path: Path, specs: Iterable[TensorSpec]) -> None:
    """Read tensors into the system's file cache, so that reading them soon waits for no disk. Takes no memory of the process."""
    with path.open("rb", buffering=0) as file:
        for spec in specs:
            file.seek(spec.start)
            left = spec.nbytes
            while left > 0 and (read := len(file.read(min(left, WARMING_BYTES)))):
                left -= read


def write_tensors_in_turn(
    path: Path, specs: Mapping[str, TensorSpec], tensor: Callable[[str], Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, one tensor in memory at a time; its bytes are those that `write_tensors` would write.

    Args:
        specs: of all tensors, by name.
        tensor: returns each of them when it is to be written, in the order of the names for each type.

    Raises:
        ValueError: if a tensor is not as its spec says. The file is then as it was.
    """
    order = list(DTYPES.values())
    names = sorted(specs, key=lambda name: (order.index(specs[name].dtype), name))
    header: dict[str, object] = {"__metadata__": dict(metadata or {})}
    start = 0
    for name in names:
        spec = specs[name]
        header[name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, start + spec.nbytes]}
        start += spec.nbytes
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in names:
            found = tensor(name).detach().cpu().contiguous()
            if (found.dtype, tuple(found.shape)) != (specs[name].dtype, specs[name].shape):
                raise ValueError(f"{name} is {found.dtype} {tuple(found.shape)}, but {path} was to hold {specs[name].dtype} {specs[name].shape}")
            file.write(found.reshape(-1).view(torch.uint8).numpy())
