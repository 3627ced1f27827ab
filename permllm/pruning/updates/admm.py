"""ADMM: alternate between the best dense weight near a sparse one, and the sparse weight nearest to it.

Legend: as in `reconstruction.py`; Z (out, in) sparse weight, U (out, in) scaled dual: what the mask has removed so far.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from permllm.calibration.statistics import ActivationStats
from permllm.pruning.updates.reconstruction import Reconstruction
from permllm.sparsity.mask import best_mask
from permllm.sparsity.pattern import NMPattern

DAMPING = 0.1  # of the scaled Gram matrix's diagonal
PENALTY = 1.0  # on the distance between dense and sparse weight
ITERATIONS = 20
ADAPTING = 15  # of the iterations choose the mask anew


def admm(weight: Tensor, stats: ActivationStats, pattern: NMPattern, mask: Tensor, iterations: int = ITERATIONS) -> tuple[Tensor, Tensor]:
    """Update the kept weights; the mask stays.

    Arguments, result and errors as for `least_squares`, which is what many iterations approach.

    Source: Boza, "Fast and Effective Weight Update for Pruned Large Language Models" (TMLR 2024), algorithm 1.
    """
    pattern.check_widths({"the weight": weight.shape[1]})
    problem = Reconstruction.of(weight, stats, DAMPING)
    solution, _ = _iterate(problem, lambda iteration, values: mask, iterations)
    return problem.finish(solution, mask, mask)


def adaptive_admm(weight: Tensor, stats: ActivationStats, pattern: NMPattern, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the masks while updating the weights: sparser and sparser, then N of every M, then fixed.

    Arguments, result and errors as for `least_squares`; the mask given is only what a row must not be worse than.

    Source: Boza 2024, algorithm 2 (gradual pruning) with N:M masks.
    """
    pattern.check_widths({"the weight": weight.shape[1]})
    problem = Reconstruction.of(weight, stats, DAMPING)

    def choose(iteration: int, values: Tensor) -> Tensor | None:
        if iteration >= ADAPTING:
            return None
        remaining = 1 - (iteration + 1) / ADAPTING
        return gradual_mask(values.square(), pattern, 1 - remaining**3)

    solution, chosen = _iterate(problem, choose, ITERATIONS)
    return problem.finish(solution, chosen, mask, pattern.rows_together)


def gradual_mask(score: Tensor, pattern: NMPattern, share: float) -> Tensor:
    """Keep the N best of every M, and of the others all but a share: those with the lowest scores of their row.

    Args:
        score: (out, in), importance, finite.
        share: 0 to 1.

    Returns:
        (out, in) bool; an N:M mask if `share` is 1.
    """
    kept = best_mask(score, pattern)
    removable = score.shape[1] - score.shape[1] // pattern.group * pattern.kept
    lowest = score.masked_fill(kept, torch.inf).topk(round(share * removable), dim=1, largest=False).indices
    return torch.ones_like(kept).scatter_(1, lowest, False)


def _iterate(problem: Reconstruction, choose: Callable[[int, Tensor], Tensor | None], iterations: int) -> tuple[Tensor, Tensor]:
    """Return V, 0 where its mask does not keep it, and the mask.

    Args:
        choose: (iteration, dense weight plus dual) to the mask; None for the last one.
    """
    identity = torch.eye(len(problem.gram), device=problem.gram.device, dtype=torch.float64)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(problem.gram.double() + PENALTY * identity)).to(problem.gram.dtype)
    pulled = problem.target @ problem.gram
    dense, dual = problem.target, torch.zeros_like(problem.target)
    mask = torch.ones_like(dense, dtype=torch.bool)
    for iteration in range(iterations):
        values = dense + dual
        chosen = choose(iteration, values)
        mask = mask if chosen is None else chosen
        sparse = values * mask
        dual = values - sparse
        dense = (pulled + PENALTY * (sparse - dual)) @ inverse
    return (dense + dual).masked_fill(~mask, 0.0), mask
