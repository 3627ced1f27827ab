"""2:4 weights on sparse tensor cores, through `torch.sparse`."""

import torch
from torch import Tensor

from permllm.sparsity.mask import is_nm_sparse
from permllm.sparsity.pattern import NMPattern

TWO_OF_FOUR = NMPattern(2, 4)
ROW_MULTIPLE, COLUMN_MULTIPLE = 32, 64  # CUTLASS; cuSPARSELt is content with 16 and 16


def why_unavailable(device: torch.device, dtype: torch.dtype, pattern: NMPattern, out_channels: int, in_channels: int) -> str | None:
    """Return why a weight cannot be run on sparse tensor cores, or None if it can."""
    if pattern != TWO_OF_FOUR:
        return f"sparse tensor cores run 2:4, not {pattern}"
    if device.type != "cuda":
        return f"sparse tensor cores need a CUDA device, not {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "sparse tensor cores need compute capability 8.0 or later"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"sparse tensor cores run float16 and bfloat16, not {dtype}"
    if out_channels % ROW_MULTIPLE or in_channels % COLUMN_MULTIPLE:
        return f"rows and columns must be multiples of {ROW_MULTIPLE} and {COLUMN_MULTIPLE}, not {out_channels} and {in_channels}"
    return None


def pack_semi_structured(weight: Tensor) -> Tensor:
    """Compress a 2:4 weight for sparse tensor cores.

    Args:
        weight: (out, in) on a CUDA device, float16 or bfloat16, 2:4 along the input channels.

    Raises:
        ValueError: if it is not 2:4; `torch.sparse` would lose values silently.
    """
    if not is_nm_sparse(weight, TWO_OF_FOUR):
        raise ValueError("the weight is not 2:4 along its input channels; permute it into the order that its mask was chosen in")
    return torch.sparse.to_sparse_semi_structured(weight)
