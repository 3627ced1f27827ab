"""Kept weights that adapt while an order is learned, as they will when a weight update follows: the loss is taken after a cheap one.

Legend: as in `permllm/pruning/updates/reconstruction.py`: T (out, in) weight and H (in, in) Gram matrix in scaled channels.
If all other weights of a row adapt, removing T_ij alone changes the row by -(T_ij / [H^-1]_jj) H^-1_j and its error by
T_ij^2 / [H^-1]_jj. What a mask costs is taken for the sum of that over the weights it removes, as the score `obs` does.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from permllm.calibration.statistics import ActivationStats, LayerStats
from permllm.lcp.masked_linear import FixedValues, MaskedLinear
from permllm.pruning.updates.least_squares import DAMPING, descend
from permllm.pruning.updates.reconstruction import scaled_gram

STEPS = 30  # of conjugate gradients, from the kept weights as they were: no result depends on what was refitted before


@torch.no_grad()
def refit(linears: Sequence[MaskedLinear], stats: ActivationStats) -> None:
    """Give the kept weights of a linear group the values that change its outputs least, roughly, under the masks of its order.

    Args:
        linears: of the group; they multiply by the refitted weights from now on, until their order changes and this is called again.
        stats: of their input.

    Raises:
        torch.linalg.LinAlgError: if no damping makes the Gram matrix positive definite.
    """
    gram, scale, _ = scaled_gram(stats, DAMPING)
    weights = [linear.original.weight for linear in linears]
    masked = [linear.rule.masked(linear.group, weight.t(), torch.float32).t() for linear, weight in zip(linears, weights, strict=True)]
    target, start = torch.cat(weights).float() * scale, torch.cat(masked) * scale
    kept = (start != 0).to(start.dtype)
    change = descend(lambda direction: (direction @ gram).mul_(kept), ((target - start) @ gram).mul_(kept), STEPS)
    parts = ((start + change) / scale).split([len(weight) for weight in weights])
    for linear, weight, part in zip(linears, weights, parts, strict=True):
        linear.refitted = FixedValues(part.t().to(weight.dtype).contiguous())


def refit_layers(linears: Iterable[Mapping[str, Sequence[MaskedLinear]]], statistics: Iterable[LayerStats]) -> None:
    """Refit all linear groups of some decoder layers; `linears` by layer and name of the group."""
    for layer, stats in zip(linears, statistics, strict=True):
        for name, group in layer.items():
            refit(group, stats[name])


@torch.no_grad()
def removal_costs(weight: Tensor, gradient: Tensor, stats: ActivationStats) -> tuple[Tensor, Tensor, Tensor]:
    """Return what removing each weight costs while the others of its row adapt.

    Args:
        weight: (out, in), dense.
        gradient: (in, out) of the loss with respect to the refitted weight.
        stats: of the input.

    Returns:
        T (out, in); how much T_ij changes the loss to first order, by its size: (in, out); and 1 / [H^-1]_jj, (in,).
    """
    gram, scale, _ = scaled_gram(stats, DAMPING)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    stiffness = 1 / inverse.diagonal()
    return weight.float() * scale, -(inverse @ (gradient / scale[:, None])) * stiffness[:, None], stiffness
