"""ALPS: ADMM whose penalty grows until the mask no longer changes, then conjugate gradients on that mask.

Legend: as in `reconstruction.py`; D (out, in) sparse weight, V (out, in) dual, rho the penalty on their distance,
H = Q diag(L) Q^T, factorised once: (H + rho)^-1 is Q diag(1 / (L + rho)) Q^T for every rho.
"""

import logging

import torch
from torch import Tensor

from permllm.calibration.statistics import ActivationStats
from permllm.pruning.updates.least_squares import fit
from permllm.pruning.updates.reconstruction import Reconstruction
from permllm.sparsity.mask import best_mask
from permllm.sparsity.pattern import NMPattern

logger = logging.getLogger(__name__)

DAMPING = 0.01  # of the scaled Gram matrix's diagonal
START_PENALTY = 0.1
CHECK_EVERY = 3  # iterations, after which the penalty grows
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # from which share of the kept weights that has changed, and factor
SMALLEST_CHANGE = 3e-4  # of the kept weights: fewer, and the mask is final
MOST_ITERATIONS = 300


def alps(weight: Tensor, stats: ActivationStats, pattern: NMPattern, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the masks and the weights together.

    Arguments, result and errors as for `least_squares`; the mask given is only what a row must not be worse than.

    Source: Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning" (NeurIPS 2024).
    """
    pattern.check_widths({"the weight": weight.shape[1]})
    problem = Reconstruction.of(weight, stats, DAMPING)
    sparse = _sparse_weight(problem, pattern)
    chosen = best_mask(sparse.square(), pattern)
    return problem.finish(fit(problem, chosen, sparse), chosen, mask, pattern.rows_together)


def _sparse_weight(problem: Reconstruction, pattern: NMPattern) -> Tensor:
    """Return D after the penalty has grown until its support rests; N:M, not yet the best on its support."""
    values, vectors = torch.linalg.eigh(problem.gram.double())
    values, vectors = values.to(problem.gram.dtype), vectors.to(problem.gram.dtype)
    pulled = (problem.target @ problem.gram) @ vectors  # of H T all that is needed, in the basis of H
    sparse, dual, penalty = problem.target, torch.zeros_like(problem.target), START_PENALTY
    support = best_mask(sparse.square(), pattern)
    for iteration in range(1, MOST_ITERATIONS + 1):
        dense = ((pulled + (penalty * sparse - dual) @ vectors) / (values + penalty)) @ vectors.t()
        wanted = dense + dual / penalty
        mask = best_mask(wanted.square(), pattern)
        sparse = wanted * mask
        dual = dual + penalty * (dense - sparse)
        if iteration % CHECK_EVERY == 0:
            change, support = float((mask & ~support).sum() / mask.sum()), mask
            if change < SMALLEST_CHANGE:
                return sparse
            penalty *= next(factor for share, factor in GROWTH if change >= share)
    logger.warning("the mask still changes after %d iterations: %.2g of the kept weights in the last %d", MOST_ITERATIONS, change, CHECK_EVERY)
    return sparse
