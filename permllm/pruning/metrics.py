"""Pruning metrics: the importance of every weight, from the weight and the statistics of its input.

Every metric is the size of the weight times a factor per channel and row, so that a score is cheap to compute
again, for any part of the channels, and need not be kept.

Legend: W (out, in) weight; G (in, in) Gram matrix of the input; s_j = sqrt(G_jj).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from permllm.calibration.statistics import ActivationStats


@dataclass(frozen=True)
class Score:
    """The score of one linear: |W_ij| (channel_j + shared_j row_i).

    Attributes:
        channel, shared: (in,) float32.
        row: (out,) float32.
    """

    channel: Tensor
    shared: Tensor | None = None
    row: Tensor | None = None

    def of(self, weight: Tensor) -> Tensor:
        """Return the score of the whole weight, (out, in) float32."""
        return self.by_channel(weight.t(), slice(None)).t()

    def by_channel(self, weight: Tensor, channels: Tensor | slice) -> Tensor:
        """Return the score of some channels, channels first: (channels, out), from their weights in that shape."""
        size = weight.to(self.channel.dtype).abs()
        if self.shared is None:
            return size.mul_(self.channel[channels, None])
        return size.mul_(torch.addcmul(self.channel[channels, None], self.shared[channels, None], self.row))


def magnitude(weight: Tensor, stats: ActivationStats) -> Score:
    """Score by |W_ij|."""
    return Score(torch.ones_like(stats.norms))


def wanda(weight: Tensor, stats: ActivationStats) -> Score:
    """Score by |W_ij| s_j.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (ICLR 2024).
    """
    return Score(stats.norms)


def ria(weight: Tensor, stats: ActivationStats) -> Score:
    """Score by (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) s_j^0.5, relative importance and activations.

    Source: Zhang et al., "Plug-and-Play" (ICLR 2024).
    """
    size, strength = weight.float().abs(), stats.norms.sqrt()
    column_sum, row_sum = (size.sum(dim=dim).clamp(min=1e-12) for dim in (0, 1))  # a channel that nobody reads scores 0
    return Score(strength / column_sum, strength, 1 / row_sum)


PRUNING_METRICS = {"magnitude": magnitude, "wanda": wanda, "ria": ria}
