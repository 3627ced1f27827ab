"""The best values for kept weights under a fixed mask: exact least squares, row by row, or conjugate gradients.

Legend: as in `reconstruction.py`. A row's optimum solves H_SS v_S = (H t)_S on what it keeps, S; every row keeps equally many.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from permllm.calibration.statistics import ActivationStats
from permllm.pruning.updates.reconstruction import Reconstruction
from permllm.sparsity.pattern import NMPattern

DAMPING = 0.01  # of the scaled Gram matrix's diagonal
MOST_KEPT_EXACTLY = 128  # weights of a row that are solved for directly: beyond, conjugate gradients are faster
BATCH_BYTES = 2**27  # of the matrices that are factorised at once
MOST_STEPS = 300  # of conjugate gradients, between two exact residuals
STEP_TOLERANCE = 1e-4  # by how much the steps between two exact residuals shrink it: float32 does not reach much further
TOLERANCE = 1e-7  # of the exact residual, relative
MOST_RESTARTS = 4


def least_squares(weight: Tensor, stats: ActivationStats, pattern: NMPattern, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Give the kept weights the values that change the output least; the mask stays.

    Args:
        weight: (out, in), in the order in which it is pruned.
        stats: of the linear's input, in the same order.
        mask: (out, in) bool, N of every M kept.

    Returns:
        The updated weight (out, in) float32, exactly 0 where pruned, and the mask.

    Raises:
        ValueError: if M does not divide `in`, or the Gram matrix is no such; see `check_gram`.
        torch.linalg.LinAlgError: if no damping makes the Gram matrix positive definite.
    """
    pattern.check_widths({"the weight": weight.shape[1]})
    problem = Reconstruction.of(weight, stats, DAMPING)
    return problem.finish(fit(problem, mask), mask, mask)


def fit(problem: Reconstruction, mask: Tensor, start: Tensor | None = None) -> Tensor:
    """Return the optimum on a mask, (out, in), 0 elsewhere.

    Args:
        mask: (out, in), with as many kept in every row.
        start: (out, in), what conjugate gradients begin from; None for the dense weight.
    """
    kept = mask.sum(1)
    if bool((kept == kept[0]).all()) and kept[0] <= MOST_KEPT_EXACTLY:
        return exact_rows(problem.target, problem.gram, mask)
    return conjugate_gradients(problem.target, problem.gram, mask, problem.target if start is None else start)


def exact_rows(target: Tensor, gram: Tensor, mask: Tensor) -> Tensor:
    """Solve every row by a Cholesky factorisation of its own, in float64.

    Args:
        target: (out, in), T.
        gram: (in, in), H.
        mask: (out, in), with as many kept in every row.

    Returns:
        (out, in) in the type of `target`, 0 where not kept.
    """
    gram, kept = gram.double(), int(mask[0].sum())
    wanted = target.double() @ gram
    channels = mask.nonzero()[:, 1].view(len(mask), kept)
    solution = torch.zeros_like(target)
    rows_at_once = max(BATCH_BYTES // (8 * kept * kept), 1)
    for rows, places in zip(torch.arange(len(mask), device=mask.device).split(rows_at_once), channels.split(rows_at_once), strict=True):
        factor = torch.linalg.cholesky(gram[places[:, :, None], places[:, None, :]])
        values = torch.cholesky_solve(wanted[rows].gather(1, places)[..., None], factor)[..., 0]
        solution[rows] = torch.zeros_like(wanted[rows]).scatter_(1, places, values).to(solution.dtype)
    return solution


def conjugate_gradients(target: Tensor, gram: Tensor, mask: Tensor, start: Tensor) -> Tensor:
    """Solve all rows at once by products with the Gram matrix: float32 steps on residuals that are float64.

    The diagonal of H is constant, so scaling the channels was the preconditioner. Every step lowers the damped error,
    so that the result is never worse than the start, wherever it ends.

    Args:
        target: (out, in), T.
        gram: (in, in), H.
        mask: (out, in) bool; rows may keep different numbers.
        start: (out, in), where not kept it is read as 0.
    """
    kept, exact = mask.to(target.dtype), gram.double()
    scale = (target @ gram).mul_(kept).norm(dim=1)
    solution = start.masked_fill(~mask, 0.0)
    for _ in range(MOST_RESTARTS):
        residual = ((target - solution).double() @ exact).to(target.dtype).mul_(kept)
        if (residual.norm(dim=1) <= TOLERANCE * scale).all():
            break
        solution = solution + descend(lambda direction: (direction @ gram).mul_(kept), residual)
    return solution


def descend(product: Callable[[Tensor], Tensor], residual: Tensor, steps: int = MOST_STEPS) -> Tensor:
    """Return the solution of product(x) = residual for every row, from 0, up to `STEP_TOLERANCE` or after so many steps."""
    solution, direction = torch.zeros_like(residual), residual.clone()
    square = residual.square().sum(1, keepdim=True)
    goal = STEP_TOLERANCE**2 * square
    for _ in range(steps):
        image = product(direction)
        is_open = square > goal  # a row that has converged stays: dividing by what is left of it would blow up
        step = torch.where(is_open, square / (direction * image).sum(1, keepdim=True), 0.0)
        solution.addcmul_(step, direction)
        residual = residual.addcmul(step, image, value=-1)
        new_square = residual.square().sum(1, keepdim=True)
        if not (is_open & (new_square > goal)).any():
            break
        direction = torch.where(is_open, residual + direction * (new_square / square), direction)
        square = torch.where(is_open, new_square, square)
    return solution
