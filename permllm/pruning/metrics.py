"""Pruning metrics: the importance of every weight, from the weight and the statistics of its input.

Every metric is the size of the weight times a factor per channel and row, so that a score is cheap to compute
again, for any part of the channels, and need not be kept.

Legend: W (out, in) weight; G (in, in) Gram matrix of the input; s_j = sqrt(G_jj).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from permllm.calibration.statistics import ActivationStats
from permllm.pruning.updates.reconstruction import check_gram, scaled_gram

OBS_DAMPING = 0.01  # of the diagonal of the Gram matrix, once its channels are scaled to unit norm


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


def obs(weight: Tensor, stats: ActivationStats) -> Score:
    """Score by |W_ij| / sqrt([G^-1]_jj), the root of the output error without this weight if all others adapt; G is damped.

    Raises:
        ValueError: if the Gram matrix is no such; see `check_gram`.
        torch.linalg.LinAlgError: if no damping makes it positive definite.

    Source: Hassibi & Stork, "Optimal Brain Surgeon" (NIPS 1992), for all weights of a row that see one input.
    """
    check_gram(stats, weight.shape[1])
    gram, scale, _ = scaled_gram(stats, OBS_DAMPING)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram.double()))
    strength = (scale / inverse.diagonal().sqrt()).float()
    return Score(strength.masked_fill(stats.gram.diagonal() == 0, 0.0))  # a channel that is always zero


PRUNING_METRICS = {"magnitude": magnitude, "wanda": wanda, "ria": ria, "obs": obs}
