"""Triton kernels and their launches, imported only where Triton is installed. The modules that call them define what they compute.

In kernels, names in capitals are known when the kernel is compiled; `_ptr` points to a tensor's first element. Rows are contiguous.
"""
# ruff: noqa: ANN001, ANN201, D103

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from permllm.sparsity.packed import PackedWeight

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their bytes


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


@triton.jit
def matvec_kernel(
    x_ptr,
    values_ptr,
    bits_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    out_channels,
    x_stride,
    ROW_GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    # Indices beyond the end repeat the last token, row or group, so that most loads need no mask. The minimum over groups also
    # hides from the compiler that neighbours are contiguous: with one group to a lane, values, bits and positions lie in the same
    # threads, while wider loads make it shuffle them through shared memory, with a barrier in every turn of the loop.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    weight_row = tl.minimum(row, out_channels - 1)[:, None].to(tl.int64)
    ROW_BYTES: tl.constexpr = (ROW_GROUPS * GROUP + 7) // 8
    bit_rows = bits_ptr + weight_row * ROW_BYTES
    value_rows = values_ptr + weight_row * (ROW_GROUPS if WHOLE else ROW_GROUPS * KEPT)
    x_rows = x_ptr + tl.minimum(token, tokens - 1)[:, None, None].to(tl.int64) * x_stride
    FLOAT: tl.constexpr = x_ptr.dtype.element_ty
    BITS: tl.constexpr = FLOAT.primitive_bitwidth
    INTEGER: tl.constexpr = tl.int32 if BITS == 32 else tl.int16
    WORD: tl.constexpr = tl.uint32 if SPAN <= 4 else tl.uint64
    total = tl.zeros((TOKENS, ROWS, GROUPS), dtype=tl.float32)
    for start in range(0, ROW_GROUPS, GROUPS):
        group = (start + tl.arange(0, GROUPS))[None, :]
        inside = (group < ROW_GROUPS) | (ROW_GROUPS % GROUPS == 0)
        group = tl.minimum(group, ROW_GROUPS - 1)
        channel = group * GROUP
        byte = channel // 8
        word = tl.load(bit_rows + byte).to(WORD)
        for i in tl.static_range(1, SPAN):
            word |= tl.load(bit_rows + tl.minimum(byte + i, ROW_BYTES - 1)).to(WORD) << (8 * i)
        left = ((word >> (channel % 8).to(WORD)) & ((1 << GROUP) - 1)).to(tl.uint32)
        if WHOLE:
            values = tl.load(value_rows + group, mask=inside, other=0, eviction_policy="evict_first")
        for k in tl.static_range(KEPT):
            if WHOLE:
                value = (values >> (BITS * k)).to(INTEGER).to(FLOAT, bitcast=True)
            else:
                value = tl.load(value_rows + group * KEPT + k, mask=inside, other=0.0, eviction_policy="evict_first")
            without_lowest = left & (left - 1)
            lowest = left ^ without_lowest
            position = (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127  # a float's exponent is the place of its only bit
            x = tl.load(x_rows + (channel + position)[None, :, :])
            total += value.to(tl.float32)[None, :, :] * x.to(tl.float32)
            left = without_lowest
    y = tl.sum(total, axis=2)
    if HAS_BIAS:
        y += tl.load(bias_ptr + row, mask=row < out_channels, other=0.0).to(tl.float32)[None, :]
    stored = (token[:, None] < tokens) & (row[None, :] < out_channels)
    tl.store(out_ptr + token[:, None] * out_channels + row[None, :], y.to(out_ptr.dtype.element_ty), mask=stored)


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


def matvec(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Return x @ weight.dense().T + bias of 1 to 8 tokens."""
    x, values, bits, pattern = _with_contiguous_rows(x), weight.values.contiguous(), weight.bits.contiguous(), weight.pattern
    (tokens, in_channels), out_channels, value_bytes = x.shape, len(values), values.element_size()
    fills_bytes = 8 % pattern.group == 0 and in_channels % 8 == 0 and pattern.kept * (8 // pattern.group) * value_bytes <= 8
    joined = 8 // pattern.group if fills_bytes else 1  # 2:4 is 4:8 too, and a byte of bits is read once for both groups
    kept, group = pattern.kept * joined, pattern.group * joined
    is_whole = kept * value_bytes in INTEGERS and values.data_ptr() % (kept * value_bytes) == 0  # the values of a group are one integer
    padded_tokens = triton.next_power_of_2(tokens)
    rows = 4 if out_channels >= 4096 else 2 if out_channels >= 2048 else 1  # some 1000 programs or more, for some 100 multiprocessors
    tile = (1024 if padded_tokens <= 2 else 512) // rows  # 8 or 4 groups to a thread: times tokens, they fit its registers
    out = torch.empty(tokens, out_channels, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        matvec_kernel[(triton.cdiv(out_channels, rows),)](
            x,
            values.view(INTEGERS[kept * value_bytes]) if is_whole else values,
            bits,
            out if bias is None else bias.contiguous(),
            out,
            tokens,
            out_channels,
            x.stride(0),
            ROW_GROUPS=in_channels // group,
            KEPT=kept,
            GROUP=group,
            SPAN=-(-(group + 8 - math.gcd(group, 8)) // 8),  # bytes that a group's bits touch at most
            WHOLE=is_whole,
            HAS_BIAS=bias is not None,
            TOKENS=padded_tokens,
            ROWS=rows,
            GROUPS=min(tile, triton.next_power_of_2(in_channels // group)),
            num_warps=4,
        )
    return out


def _with_contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _row_block(channels: int) -> dict[str, int]:
    """A program that holds a row, 16 channels to a thread as far as 32 warps go."""
    block = triton.next_power_of_2(channels)
    return {"BLOCK": block, "num_warps": min(32, max(1, block // 512))}
