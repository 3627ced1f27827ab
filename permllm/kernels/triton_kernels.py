"""Triton kernels and their launches, imported only where Triton is installed. The modules that call them define what they compute.

In kernels, names in capitals are known when the kernel is compiled; `_ptr` points to a tensor's first element. Rows are contiguous.
"""
# ruff: noqa: ANN001, ANN201, D103

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def gather_kernel(x_ptr, order_ptr, out_ptr, tokens, channels, x_stride, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    place = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    order = tl.load(order_ptr + place, mask=place < channels, other=0)
    inside = (token < tokens) & (place < channels)
    tl.store(out_ptr + token * channels + place, tl.load(x_ptr + token * x_stride + order, mask=inside), mask=inside)


@triton.jit
def rms_norm_kernel(x_ptr, order_ptr, weight_ptr, out_ptr, channels, x_stride, eps, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    x_ptr += token * x_stride
    place = tl.arange(0, BLOCK)
    inside = place < channels
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    scale = tl.math.rsqrt(tl.sum(x * x, axis=0) / channels + eps)
    order = tl.load(order_ptr + place, mask=inside, other=0)
    gathered = tl.load(x_ptr + order, mask=inside, other=0.0)  # the row was just read: from L1
    weight = tl.load(weight_ptr + order, mask=inside, other=0.0)
    normalised = (gathered.to(tl.float32) * scale).to(gathered.dtype)  # rounded before the weight, as LlamaRMSNorm does
    y = weight.to(tl.float32) * normalised.to(tl.float32)
    tl.store(out_ptr + token * channels + place, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def layer_norm_kernel(x_ptr, order_ptr, weight_ptr, bias_ptr, out_ptr, channels, x_stride, eps, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    x_ptr += token * x_stride
    place = tl.arange(0, BLOCK)
    inside = place < channels
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / channels
    centred = tl.where(inside, x - mean, 0.0)
    scale = tl.math.rsqrt(tl.sum(centred * centred, axis=0) / channels + eps)
    order = tl.load(order_ptr + place, mask=inside, other=0)
    gathered = tl.load(x_ptr + order, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + order, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + order, mask=inside, other=0.0).to(tl.float32)
    y = (gathered - mean) * scale * weight + bias
    tl.store(out_ptr + token * channels + place, y.to(out_ptr.dtype.element_ty), mask=inside)


def gather(x: Tensor, order: Tensor) -> Tensor:
    """Return x[:, order] of (tokens, channels)."""
    x = _with_contiguous_rows(x)
    tokens, channels = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    shape = {"TOKENS": min(8, triton.next_power_of_2(tokens)), "CHANNELS": 512}  # tokens of a program share what it reads of `order`
    with torch.cuda.device_of(x):
        gather_kernel[triton.cdiv(tokens, shape["TOKENS"]), triton.cdiv(channels, shape["CHANNELS"])](
            x, order, out, tokens, channels, x.stride(0), **shape
        )
    return out


def rms_norm(x: Tensor, order: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the root mean square norm of (tokens, channels), its channels in `order`."""
    x = _with_contiguous_rows(x)
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    with torch.cuda.device_of(x):
        rms_norm_kernel[(len(x),)](x, order, weight.contiguous(), out, x.shape[1], x.stride(0), eps, **_row_block(x.shape[1]))
    return out


def layer_norm(x: Tensor, order: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return the layer norm of (tokens, channels), its channels in `order`."""
    x = _with_contiguous_rows(x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(x):
        layer_norm_kernel[(len(x),)](x, order, weight.contiguous(), bias.contiguous(), out, x.shape[1], x.stride(0), eps, **_row_block(x.shape[1]))
    return out


def _with_contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _row_block(channels: int) -> dict[str, int]:
    """A program that holds a row, 16 channels to a thread as far as 32 warps go."""
    block = triton.next_power_of_2(channels)
    return {"BLOCK": block, "num_warps": min(32, max(1, block // 512))}
