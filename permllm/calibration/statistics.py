"""What pruning needs to know of a linear group's input: its Gram matrix, gathered in one pass."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ActivationStats:
    """Second moments of the input of a linear group.

    Attributes:
        gram: (in, in) float32, X X^T / tokens with X (in, tokens).
        tokens: how many tokens it was averaged over.
    """

    gram: Tensor
    tokens: int

    @property
    def norms(self) -> Tensor:
        """Root mean square of every channel, (in,)."""
        return self.gram.diagonal().clamp(min=0).sqrt()


LayerStats = dict[str, ActivationStats]  # of one decoder layer, by the name of the linear group


class GramAccumulator:
    """A running Gram matrix: add batches of activations, then read the statistics."""

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(channels, channels, device=device)
        self._tokens = 0

    def add(self, activations: Tensor) -> None:
        """Add (..., in) activations of any floating dtype; the sum is kept in float32."""
        rows = activations.detach().reshape(-1, activations.shape[-1]).float()
        self._sum.addmm_(rows.t(), rows)
        self._tokens += len(rows)

    def statistics(self) -> ActivationStats:
        """Return the mean over the tokens added so far; the accumulator must not be used afterwards."""
        return ActivationStats(self._sum.div_(self._tokens), self._tokens)
