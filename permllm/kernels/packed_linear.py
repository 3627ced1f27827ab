"""A linear layer on a packed N:M weight.

Few tokens wait for the weight to be read, so a kernel reads the kept values alone. Many tokens wait for arithmetic, so the
weight is made dense for the call, or multiplied on sparse tensor cores where `permllm.kernels.prefill` found that faster.
On a CPU it is made dense by as many rows at a time as stay in the cache: fresh memory for all of them costs up to ten
times what expanding them does.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from permllm.kernels import cpu_matvec, gpu_matvec
from permllm.permutation.permutation import Permutation
from permllm.sparsity.packed import PackedWeight

MOST_DECODED_TOKENS = gpu_matvec.MAX_TOKENS
# That the kernels get, by the type of the device. On a CPU the dense product is as fast from 48 tokens in bfloat16 and from 64 to 130 in
# float32: measured on one AVX-512 core with 2048 x 5632, 4096 x 4096 and 14336 x 4096.
MOST_TOKENS = {"cpu": 64, "cuda": MOST_DECODED_TOKENS}
EXPANDED_BYTES = 4 * 1024 * 1024  # of dense weight at a time on a CPU; 1 to 16 MiB were equally fast within a few per cent
CPU_MATVEC, GPU_MATVEC, SEMI_STRUCTURED, DENSE = "cpu_matvec", "gpu_matvec", "semi_structured", "dense"


class PackedLinear(nn.Module):
    """What `nn.Linear` computes, for inference, on a weight without its zeros.

    Args:
        weight: (out, in), its input channels in the order in which it is N:M.
        bias: (out,).
        permutation: the order of the input channels, where nothing before the layer gathers them.

    Attributes:
        semi_structured: the weight once more, for sparse tensor cores; None unless `permllm.kernels.prefill` chose them.
        semi_structured_from: the tokens from which they are used.
    """

    def __init__(self, weight: PackedWeight, bias: Tensor | None = None, permutation: Permutation | None = None) -> None:
        super().__init__()
        self.pattern = weight.pattern
        self.out_features, self.in_features = weight.shape
        self.register_buffer("values", weight.values)
        self.register_buffer("bits", weight.bits)
        self.register_buffer("order", None if permutation is None else permutation.order)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.semi_structured: Tensor | None = None
        self.semi_structured_from = 0

    @property
    def packed(self) -> PackedWeight:
        """The weight, on the device where the layer is."""
        return PackedWeight(self.values, self.bits, self.pattern, self.in_features)

    @property
    def weight(self) -> Tensor:
        """The weight with its zeros, (out, in), in the channel order of the packed one; made anew at every access."""
        return cpu_matvec.expand(self.packed) if self.values.is_cpu else self.packed.dense()

    def kernel(self, tokens: int) -> str:
        """Return which way so many tokens are multiplied: `cpu_matvec`, `gpu_matvec`, `semi_structured` or `dense`."""
        device, dtype = self.values.device, self.values.dtype
        if 1 <= tokens <= MOST_TOKENS.get(device.type, 0):
            if device.type == "cpu" and cpu_matvec.why_unavailable(device, dtype) is None:
                return CPU_MATVEC
            if device.type == "cuda" and gpu_matvec.why_unavailable(self.packed, device) is None:
                return GPU_MATVEC
        is_there = self.semi_structured is not None and self.semi_structured.device == device and self.semi_structured.dtype == dtype
        return SEMI_STRUCTURED if is_there and tokens >= self.semi_structured_from else DENSE

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        if self.order is not None:
            x = x.index_select(-1, self.order)
        needs_gradient = torch.is_grad_enabled() and (x.requires_grad or (self.bias is not None and self.bias.requires_grad))
        is_dense = needs_gradient or x.dtype != self.values.dtype  # types differ under autocast
        return MULTIPLY[DENSE if is_dense else self.kernel(x.shape[:-1].numel())](self, x)

    def extra_repr(self) -> str:
        """Return what `print` shows of the layer."""
        gathers = "" if self.order is None else ", gathers its input"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, pattern={self.pattern}{gathers}"


def multiply_dense(layer: PackedLinear, x: Tensor) -> Tensor:
    """Multiply with the weight made dense, on a CPU a part of its rows after the other."""
    if not layer.values.is_cpu:
        return linear(x, layer.weight, layer.bias)
    rows = max(EXPANDED_BYTES // (layer.in_features * layer.values.element_size()), 1)
    values, bits = layer.values.split(rows), layer.bits.split(rows)
    biases = [None] * len(values) if layer.bias is None else layer.bias.split(rows)
    parts = [replace(layer.packed, values=part_values, bits=part_bits) for part_values, part_bits in zip(values, bits, strict=True)]
    return torch.cat([linear(x, cpu_matvec.expand(part), bias) for part, bias in zip(parts, biases, strict=True)], -1)


MULTIPLY = {
    CPU_MATVEC: lambda layer, x: cpu_matvec.matvec(x, layer.packed, layer.bias),
    GPU_MATVEC: lambda layer, x: gpu_matvec.matvec(x, layer.packed, layer.bias),
    SEMI_STRUCTURED: lambda layer, x: linear(x, layer.semi_structured, layer.bias),
    DENSE: multiply_dense,
}
