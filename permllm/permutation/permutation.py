"""A channel order as a value: result channel `j` is input channel `order[j]`."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Permutation:
    """A reordering of input channels.

    Attributes:
        order: (channels,) int64, on the CPU or a device; result `j` is input channel `order[j]`.

    Raises:
        ValueError: if `order` does not hold every channel exactly once.
    """

    order: Tensor

    def __post_init__(self) -> None:
        channels = torch.arange(self.order.numel(), device=self.order.device)
        if self.order.dim() != 1 or not torch.equal(self.order.sort().values, channels):
            raise ValueError(f"order of shape {tuple(self.order.shape)} is not a permutation: every channel 0..n-1 is needed exactly once")

    @classmethod
    def identity(cls, channels: int) -> Self:
        """Return the permutation that changes nothing."""
        return cls(torch.arange(channels))

    @classmethod
    def random(cls, channels: int, generator: torch.Generator) -> Self:
        """Return one of all permutations, uniformly."""
        return cls(torch.randperm(channels, generator=generator))

    @classmethod
    def within_blocks(cls, orders: Tensor) -> Self:
        """Join permutations of consecutive blocks. `orders` is (blocks, size), each row an order of its block."""
        blocks, size = orders.shape
        return cls((orders + size * torch.arange(blocks, device=orders.device)[:, None]).flatten())

    def __len__(self) -> int:
        return self.order.numel()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Permutation) and torch.equal(self.order, other.order.to(self.order.device))

    __hash__ = None  # compares by value of a tensor

    def apply(self, tensor: Tensor, dim: int = -1) -> Tensor:
        """Reorder the channels of `tensor` along `dim`: a gather, no multiplication.

        >>> Permutation(torch.tensor([2, 0, 1])).apply(torch.tensor([10, 11, 12]))
        tensor([12, 10, 11])
        """
        return tensor.index_select(dim, self.order.to(tensor.device))

    def inverse(self) -> "Permutation":
        """Return the permutation that undoes this one."""
        return Permutation(torch.empty_like(self.order).scatter_(0, self.order, torch.arange(len(self), device=self.order.device)))

    def then(self, following: "Permutation") -> "Permutation":
        """Compose: this permutation first, `following` on its result."""
        return Permutation(self.order[following.order])

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return P, (channels, channels), with `x @ P` equal to `apply(x)`. For tests and comparisons."""
        return torch.eye(len(self), dtype=dtype, device=self.order.device)[:, self.order]

    def canonical(self, group: int) -> "Permutation":
        """Return the representative of all orders that give the same N:M masks.

        The order inside a group of M and the order of the groups do not matter: channels are sorted inside
        each group, and groups by their first channel.

        Raises:
            ValueError: if `group` does not divide the number of channels.
        """
        if len(self) % group:
            raise ValueError(f"groups of {group} do not divide {len(self)} channels")
        groups = self.order.view(-1, group).sort(dim=1).values
        return Permutation(groups[groups[:, 0].argsort()].flatten())
