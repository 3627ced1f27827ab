"""Learnable permutations: logits per block of channels, relaxed by Sinkhorn, hardened by assignment."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from permllm.permutation.assignment import best_assignment
from permllm.permutation.permutation import Permutation
from permllm.permutation.sinkhorn import sinkhorn


class BlockPermutation(NamedTuple):
    """One value of a learnable permutation.

    Attributes:
        matrix: (blocks, size, size), exactly 0 or 1, `matrix[b, i, j] = 1` if slot `j` takes channel `i`;
            its gradient is that of the soft permutation.
        permutation: the same as an order of all channels.
    """

    matrix: Tensor
    permutation: Permutation


class LearnableBlockPermutation(nn.Module):
    """A permutation that learns which channel goes where inside blocks of `block_size`, after a fixed `start`.

    Args:
        start: the order that the blocks begin from; it may carry channels across blocks.
        block_size: channels permuted among themselves; divides the number of channels.
        generator: draws the logits uniformly from (-1, 1), as the paper's release does; without one they are
            a soft identity, so that the first hard permutation is `start`.

    Raises:
        ValueError: if `block_size` does not divide the channels.

    Source: PermLLM (NeurIPS 2025), section 3.
    """

    def __init__(self, start: Permutation, block_size: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if len(start) % block_size:
            raise ValueError(f"blocks of {block_size} channels do not divide {len(start)} channels")
        shape = (len(start) // block_size, block_size, block_size)
        logits = torch.eye(block_size).expand(shape).clone() if generator is None else torch.rand(shape, generator=generator) * 2 - 1
        self.register_buffer("start_order", start.order.clone(), persistent=False)
        self.logits = nn.Parameter(logits)

    @property
    def start(self) -> Permutation:
        """The order that the blocks begin from."""
        return Permutation(self.start_order)

    def forward(self, temperature: float, iterations: int) -> BlockPermutation:
        """Return the nearest hard permutation with the gradient of the soft one."""
        soft = sinkhorn(self.logits, temperature, iterations)
        orders = self.block_orders(soft)
        hard = torch.zeros_like(soft).scatter_(1, orders[:, None, :], 1.0)
        soft_gradient = soft - soft.detach()  # exactly 0, so the value stays exactly 0 or 1
        return BlockPermutation(hard + soft_gradient, Permutation(self.start_order[Permutation.within_blocks(orders).order]))

    @staticmethod
    def block_orders(soft: Tensor) -> Tensor:
        """Return the nearest permutation of every block, (blocks, size): the channel that each slot takes."""
        return best_assignment(soft.transpose(1, 2))
