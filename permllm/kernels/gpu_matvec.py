"""Multiply a few tokens with a packed N:M weight on a GPU, for decoding: the weight is read once and never made dense.

Decoding takes the time of reading the weights, so N:M saves time only where its zeros are not read. The kernel walks the kept
values of a group in their order; the lowest bit of the group's mask that is left is the channel of the next one. It needs
nothing of the pattern but that a group of M channels holds N values, hence any N:M.
"""

import torch
from torch import Tensor

from permllm.kernels.availability import DTYPES, why_triton_is_unavailable
from permllm.sparsity.packed import PackedWeight

MAX_TOKENS = 8
MAX_GROUP = 32  # the bits of a group are one 32-bit word


def why_unavailable(packed: PackedWeight, device: torch.device) -> str | None:
    """Return why the kernel cannot multiply with a weight on a device, or None if it can."""
    if packed.pattern.group > MAX_GROUP:
        return f"the matrix-vector kernel runs N:M with M up to {MAX_GROUP}, not {packed.pattern}"
    if packed.values.dtype not in DTYPES:
        return f"the matrix-vector kernel runs float32, float16 and bfloat16, not {packed.values.dtype}"
    return why_triton_is_unavailable(device)


def matvec(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight.dense().T + bias, accumulated in float32.

    Where the kernel is unavailable (see `why_unavailable`), or a gradient is asked for, PyTorch multiplies with the dense weight.

    Args:
        x: (..., in), 1 to 8 tokens in all, in the weight's type.
        bias: (out,).

    Returns:
        (..., out), in the weight's type.

    Raises:
        ValueError: if x has another width, type, device or number of tokens, or the bias another length.
    """
    out_channels, in_channels = weight.shape
    tokens = x.shape[:-1].numel()
    found, needed = (x.shape[-1], x.dtype, x.device), (in_channels, weight.values.dtype, weight.values.device)
    if found != needed:
        raise ValueError(f"the weight takes {needed[0]} channels in {needed[1]} on {needed[2]}, not {found[0]} in {found[1]} on {found[2]}")
    if not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(f"1 to {MAX_TOKENS} tokens are needed, not {tokens}; multiply more with the dense weight")
    if bias is not None and bias.shape != (out_channels,):
        raise ValueError(f"the bias must have shape ({out_channels},), not {tuple(bias.shape)}")
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if needs_gradient or why_unavailable(weight, x.device) is not None:
        return multiply_dense(x, weight, bias)
    from permllm.kernels import triton_kernels

    return triton_kernels.matvec(x.reshape(tokens, in_channels), weight, bias).view(*x.shape[:-1], out_channels)


def multiply_dense(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Return what `matvec` computes, of any number of tokens, with the dense weight in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.nn.functional.linear(x.to(wide), weight.dense().to(wide), None if bias is None else bias.to(wide)).to(x.dtype)
