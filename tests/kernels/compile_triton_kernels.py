"""Compile every Triton kernel for an H100 on a machine that has none, with the arguments that its launch would give it.

Prints a line per kernel: its name, the type of its activations, its warps, and whether it rounds bfloat16 to nearest.
"""

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from permllm.kernels import triton_kernels
from permllm.sparsity.packed import PackedWeight
from permllm.sparsity.pattern import NMPattern

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64"}
CHANNELS = 480  # a multiple of every M below


class Compiler:
    """Takes the place of a kernel: a launch compiles it and runs nothing."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *arguments, num_warps=4, **constants):
        signature = {name: kind(value) for name, value in zip(self.kernel.arg_names, arguments, strict=False)}
        signature |= dict.fromkeys(constants, "constexpr")
        compiled = triton.compile(ASTSource(self.kernel, signature, constants), target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
        print(self.kernel.__name__, signature["x_ptr"], num_warps, "cvt.rn.bf16" in compiled.asm["ptx"], len(compiled.asm["cubin"]))


def kind(value):
    """Triton's name of an argument's type."""
    if isinstance(value, torch.Tensor):
        return "*" + NAMES[value.dtype]
    return {int: "i32", float: "fp32"}[type(value)]


def main():
    for name in ("gather_kernel", "rms_norm_kernel", "layer_norm_kernel", "matvec_kernel"):
        setattr(triton_kernels, name, Compiler(getattr(triton_kernels, name)))
    order = torch.arange(CHANNELS)
    for dtype in (torch.float32, torch.bfloat16):
        x, row = torch.zeros(8, CHANNELS, dtype=dtype), torch.zeros(CHANNELS, dtype=dtype)
        triton_kernels.gather(x, order)
        triton_kernels.rms_norm(x, order, row, 1e-5)
        triton_kernels.layer_norm(x, order, row, row, 1e-5)
        for tokens, pattern in [(1, "2:4"), (8, "2:4"), (1, "4:8"), (1, "1:4"), (2, "3:5"), (4, "8:32"), (1, "7:15")]:
            pattern = NMPattern.parse(pattern)
            values = torch.zeros(64, CHANNELS // pattern.group * pattern.kept, dtype=dtype)
            bits = torch.zeros(64, CHANNELS // 8, dtype=torch.uint8)
            triton_kernels.matvec(x[:tokens], PackedWeight(values, bits, pattern, CHANNELS), values[:, 0])


if __name__ == "__main__":
    main()
