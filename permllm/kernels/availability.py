"""Where the Triton kernels serve. Everywhere else PyTorch computes what defines them."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_triton_is_unavailable(device: torch.device) -> str | None:
    """Return why Triton kernels cannot be run on a device, or None if they can."""
    if device.type != "cuda":
        return f"Triton kernels need a CUDA device, not {device.type}"
    if not _is_installed():
        return "Triton kernels need the package triton, which is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "Triton kernels need compute capability 8.0 or later"
    return None


def triton_serves(*tensors: Tensor) -> bool:
    """Return whether kernels can take these tensors: floats on one CUDA device whose gradients nobody asks for."""
    device = tensors[0].device
    return (
        device.type == "cuda"
        and all(tensor.device == device and tensor.dtype in DTYPES for tensor in tensors)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and why_triton_is_unavailable(device) is None
    )


@cache
def _is_installed() -> bool:
    return find_spec("triton") is not None
