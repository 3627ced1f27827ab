"""N:M weights without their zeros: the kept values, and a bit per weight that says where they belong."""

from dataclasses import dataclass

import torch
from torch import Tensor

from permllm.sparsity.bits import pack_mask, unpack_mask
from permllm.sparsity.mask import nm_mask
from permllm.sparsity.pattern import NMPattern

SAME_SIZE_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a float
SHOWN_VIOLATIONS = 5


@dataclass(frozen=True)
class PackedWeight:
    """A weight that is N:M along its input channels, (out, in).

    For 2:4 in bfloat16 it takes 56.25 % of the dense weight's bytes.

    Attributes:
        values: (out, in * N / M), the kept values of every row in the order of their channels.
        bits: (out, ceil(in / 8)) uint8, see `pack_mask`; exactly N per group of M are set.
        in_channels: of the dense weight.

    Raises:
        ValueError: if the shapes do not fit each other.
    """

    values: Tensor
    bits: Tensor
    pattern: NMPattern
    in_channels: int

    def __post_init__(self) -> None:
        rows, groups = len(self.values), self.in_channels // self.pattern.group
        needed = [(rows, groups * self.pattern.kept), (rows, -(-self.in_channels // 8))]
        found = [tuple(self.values.shape), tuple(self.bits.shape)]
        if self.in_channels % self.pattern.group or found != needed or self.bits.dtype != torch.uint8:
            raise ValueError(
                f"a packed {self.pattern} weight of {self.in_channels} input channels needs values {needed[0]} and uint8 bits {needed[1]}, "
                f"not {found[0]} and {self.bits.dtype} {found[1]}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """The dense weight's (out, in)."""
        return len(self.values), self.in_channels

    @property
    def nbytes(self) -> int:
        """The bytes of values and bits."""
        return self.values.nbytes + self.bits.nbytes

    def mask(self) -> Tensor:
        """Return which weights are stored, bool (out, in)."""
        return unpack_mask(self.bits, self.in_channels)

    def dense(self) -> Tensor:
        """Return the weight with its zeros, (out, in)."""
        mask = self.mask()
        return torch.zeros(mask.shape, dtype=self.values.dtype, device=mask.device).masked_scatter_(mask, self.values)

    def to(self, device: torch.device | str) -> "PackedWeight":
        """Return the weight on another device."""
        return PackedWeight(self.values.to(device), self.bits.to(device), self.pattern, self.in_channels)


def pack_weight(weight: Tensor, pattern: NMPattern) -> PackedWeight:
    """Leave out the zeros of an N:M weight; `PackedWeight.dense` gives it back bit for bit.

    Args:
        weight: (out, in), floating, at most N per group that are not +0.0: -0.0 counts, as only +0.0 can be restored.
            Groups with fewer store their first zeros too.

    Raises:
        ValueError: if it is no matrix of floats, M does not divide `in`, it holds NaN or infinity, or a group holds more
            than N: naming the first rows and groups.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"a weight to be packed must be a matrix of floats, not {weight.dtype} of shape {tuple(weight.shape)}")
    pattern.check_widths({"the weight": weight.shape[1]})
    broken = (~weight.isfinite()).nonzero()[:SHOWN_VIOLATIONS].tolist()
    if broken:
        raise ValueError(f"the weight holds NaN or infinity at (row, channel) {', '.join(map(str, map(tuple, broken)))}")
    stored = weight.contiguous().view(SAME_SIZE_INTEGERS[weight.element_size()]) != 0
    counts = stored.unflatten(1, (-1, pattern.group)).sum(-1)
    violations = (counts > pattern.kept).nonzero()
    if len(violations):
        shown = ", ".join(f"row {row} group {group} holds {counts[row, group]}" for row, group in violations[:SHOWN_VIOLATIONS].tolist())
        more = f" and {len(violations) - SHOWN_VIOLATIONS} more" if len(violations) > SHOWN_VIOLATIONS else ""
        raise ValueError(
            f"the weight is not {pattern}: {shown}{more} values that are not +0.0; order its channels as its mask was chosen, or name its pattern"
        )
    mask = nm_mask(stored.to(torch.uint8), pattern)
    return PackedWeight(weight[mask].view(len(weight), -1), pack_mask(mask), pattern, weight.shape[1])
