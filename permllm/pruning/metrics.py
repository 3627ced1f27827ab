"""Pruning metrics: the importance of every weight, from the weight and the statistics of its input.

Legend: W (out, in) weight; G (in, in) Gram matrix of the input; s_j = sqrt(G_jj).
"""

from torch import Tensor

from permllm.calibration.statistics import ActivationStats


def magnitude(weight: Tensor, stats: ActivationStats) -> Tensor:
    """Score by |W_ij|."""
    return weight.float().abs()


def wanda(weight: Tensor, stats: ActivationStats) -> Tensor:
    """Score by |W_ij| s_j.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (ICLR 2024).
    """
    return weight.float().abs() * stats.norms


def ria(weight: Tensor, stats: ActivationStats) -> Tensor:
    """Score by (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) s_j^0.5, relative importance and activations.

    Source: Zhang et al., "Plug-and-Play" (ICLR 2024).
    """
    size = weight.float().abs()
    column_share = size / size.sum(dim=0, keepdim=True).clamp(min=1e-12)  # a channel that nobody reads scores 0
    row_share = size / size.sum(dim=1, keepdim=True).clamp(min=1e-12)
    return (column_share + row_share) * stats.norms.sqrt()


PRUNING_METRICS = {"magnitude": magnitude, "wanda": wanda, "ria": ria}
