"""Small linears with correlated inputs, and what any update is measured by."""

from dataclasses import dataclass

import pytest
import torch

from permllm.calibration.statistics import ActivationStats
from permllm.sparsity.mask import nm_mask
from permllm.sparsity.pattern import NMPattern


@dataclass(frozen=True)
class Case:
    """A weight, its input (tokens, in) and the statistics of it."""

    weight: torch.Tensor
    x: torch.Tensor
    stats: ActivationStats

    def mask(self, pattern: NMPattern) -> torch.Tensor:
        """Return Wanda's mask."""
        return nm_mask(self.weight.float().abs() * self.stats.norms, pattern)

    def error(self, updated: torch.Tensor) -> float:
        """Return the squared change of the output over all tokens, relative to the output."""
        dense = self.x.double() @ self.weight.double().t()
        return float((dense - self.x.double() @ updated.double().t()).square().sum() / dense.square().sum())

    def permuted(self, order: torch.Tensor) -> "Case":
        """Return the case with its channels in another order."""
        return Case(self.weight[:, order], self.x[:, order], ActivationStats(self.stats.gram[order][:, order], self.stats.tokens))


def make_case(out_channels=12, in_channels=32, tokens=400, seed=0, dead=(), dtype=torch.float32) -> Case:
    """Channels of very different strength, strongly correlated; those in `dead` are always zero."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.randn(in_channels, generator=generator).exp()
    x = torch.randn(tokens, in_channels, generator=generator) @ torch.randn(in_channels, in_channels, generator=generator)
    x = (x + torch.randn(tokens, 1, generator=generator) * 3) * strength
    x[:, list(dead)] = 0.0
    weight = torch.randn(out_channels, in_channels, generator=generator).to(dtype)
    return Case(weight, x, ActivationStats(x.t() @ x / tokens, tokens))


@pytest.fixture
def case():
    """Make a case: see `make_case`."""
    return make_case
