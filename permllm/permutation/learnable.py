"""Learnable permutations: logits per block of channels, relaxed by Sinkhorn, hardened by assignment."""

import torch
from torch import Tensor, nn

from permllm.permutation.assignment import best_assignment
from permllm.permutation.sinkhorn import sinkhorn

RELAXED_AT_ONCE = 2**22  # entries; Sinkhorn keeps two of them per sweep for its gradient


class LearnableBlocks(nn.Module):
    """Logits of many blocks of channels of one size. Entry (i, j) of a block pulls its channel `i` to its slot `j`.

    The relaxed value is a leaf: `relax` computes it without a graph, the loss pulls on it, and `pull_back` repeats
    Sinkhorn a few blocks at a time, so that no more than (blocks, size, size) is ever kept between the two.

    Args:
        blocks: how many.
        size: channels permuted among themselves.
        generator: draws the logits uniformly from (-1, 1), as the paper's release does; without one they are
            a soft identity, so that the first hard permutation changes nothing. With a rank it draws a factor.
        rank: learn a soft identity plus a product of (size, rank) factors, 2 rank / size as many parameters, one of
            them drawn and the other 0; None for free logits.

    Source: PermLLM (NeurIPS 2025), section 3.
    """

    def __init__(self, blocks: int, size: int, generator: torch.Generator | None = None, rank: int | None = None) -> None:
        super().__init__()
        identity = torch.eye(size).expand(blocks, size, size)
        if rank is None:
            logits = identity.clone() if generator is None else torch.rand(blocks, size, size, generator=generator) * 2 - 1
            self.factors = nn.ParameterList([nn.Parameter(logits)])
        else:
            drawn = torch.randn(blocks, size, rank, generator=generator) / rank**0.5
            self.factors = nn.ParameterList([nn.Parameter(drawn), nn.Parameter(torch.zeros(blocks, size, rank))])
        self.relaxed: Tensor | None = None

    @property
    def size(self) -> int:
        """Channels of a block."""
        return self.factors[0].shape[1]

    def __len__(self) -> int:
        return len(self.factors[0])

    @staticmethod
    def logits(*factors: Tensor) -> Tensor:
        """Return (blocks, size, size) from the free logits, or from the two factors of low-rank ones."""
        if len(factors) == 1:
            return factors[0]
        left, right = factors
        return torch.baddbmm(torch.eye(left.shape[1], dtype=left.dtype, device=left.device), left, right.transpose(1, 2))

    @torch.no_grad()
    def relax(self, temperature: float, iterations: int, noise: Tensor | None = None) -> Tensor:
        """Return nearly doubly stochastic matrices, (blocks, size, size), as a new leaf that collects the gradient.

        Args:
            temperature, iterations: see `sinkhorn`.
            noise: added to the logits, (blocks, size, size); None for none.
        """
        parts = [self._soft([factor[rows] for factor in self.factors], noise, rows, temperature, iterations) for rows in self._chunks()]
        self.relaxed = torch.cat(parts).requires_grad_()
        return self.relaxed

    def pull_back(self, temperature: float, iterations: int, noise: Tensor | None = None) -> None:
        """Carry the gradient that the relaxed value collected back to the logits. Arguments as for `relax`."""
        for factor in self.factors:
            factor.grad = torch.zeros_like(factor)
        if self.relaxed.grad is None:
            return
        for rows in self._chunks():
            leaves = [factor.detach()[rows].requires_grad_() for factor in self.factors]
            soft = self._soft(leaves, noise, rows, temperature, iterations)
            for factor, grad in zip(self.factors, torch.autograd.grad(soft, leaves, self.relaxed.grad[rows]), strict=True):
                factor.grad[rows] = grad
        self.relaxed.grad = None

    def harden(self) -> Tensor:
        """Return the permutation of every block that is nearest to the relaxed one, (blocks, size): the channel that each slot takes."""
        return best_assignment(self.relaxed.detach().transpose(1, 2))

    def _soft(self, factors: list[Tensor], noise: Tensor | None, rows: slice, temperature: float, iterations: int) -> Tensor:
        """Relax some blocks, from their factors and their rows of the noise."""
        logits = self.logits(*factors)
        return sinkhorn(logits if noise is None else logits + noise[rows], temperature, iterations)

    def _chunks(self) -> list[slice]:
        step = max(RELAXED_AT_ONCE // self.size**2, 1)
        return [slice(first, first + step) for first in range(0, len(self), step)]


def gumbel_noise(shape: torch.Size, scale: float, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """Draw Gumbel noise, float32: logits with it sample permutations instead of taking the likeliest.

    Source: Gumbel-Sinkhorn, arXiv:1802.08665.
    """
    uniform = torch.rand(shape, generator=generator).clamp_(1e-9, 1 - 1e-7)
    return (-(-uniform.log()).log() * scale).to(device)
