"""SparseGPT: one sweep over the columns; the weights still to come absorb the error of those removed.

Legend: W (out, in) weight; G (in, in) Gram matrix of the input; U upper Cholesky factor of (G + damping)^-1, so
that row j of U holds, up to U_jj, how column j's error is spread over the columns after it.
"""

import logging

import torch
from torch import Tensor

from permllm.calibration.statistics import ActivationStats
from permllm.pruning.updates.reconstruction import ROUNDING, check_gram, damped
from permllm.sparsity.mask import best_mask
from permllm.sparsity.pattern import NMPattern

logger = logging.getLogger(__name__)

DAMPING = 0.01  # times the mean of the Gram matrix's diagonal
SWEEP_BLOCK = 128  # columns between two updates of the whole remaining weight


def sparsegpt(weight: Tensor, stats: ActivationStats, pattern: NMPattern, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Choose an N:M mask column by column and update the kept weights.

    Args:
        weight: (out, in), in the order in which it is pruned.
        stats: of the linear's input, in the same order.
        pattern: M consecutive rows choose together if it is transposable.
        mask: (out, in) bool, not read by the sweep: what is kept instead, with the dense weight, should the sweep change
            the output more, of which a warning tells; None for no such check.

    Returns:
        The updated weight (out, in) float32, exactly 0 where pruned, and the mask (out, in) bool.

    Raises:
        ValueError: if M does not divide `in`, or the Gram matrix is no such; see `check_gram`.
        torch.linalg.LinAlgError: if no damping makes the Gram matrix positive definite.

    Source: Frantar & Alistarh, SparseGPT (ICML 2023), algorithm 1 with the N:M mask selection.
    """
    pattern.check_widths({"the weight": weight.shape[1]})
    check_gram(stats, weight.shape[1])
    updated = weight.float().clone()
    gram = stats.gram.clone()
    dead = gram.diagonal() == 0
    gram.diagonal()[dead] = 1.0  # a channel that is always zero: its weights do not matter, and its row must be invertible
    updated[:, dead] = 0.0
    factor, _ = damped(lambda damping: inverse_cholesky(gram, damping), DAMPING)
    chosen = torch.zeros_like(updated, dtype=torch.bool)
    block = max(SWEEP_BLOCK // pattern.group, 1) * pattern.group  # a block holds whole groups
    for start in range(0, updated.shape[1], block):
        stop = min(start + block, updated.shape[1])
        errors = _sweep(updated[:, start:stop], chosen[:, start:stop], factor[start:stop, start:stop], pattern)
        updated[:, stop:] -= errors @ factor[start:stop, stop:]
    updated.masked_fill_(~chosen, 0.0)
    return (updated, chosen) if mask is None else _no_worse(weight.float(), updated, chosen, mask, stats.gram)


def _no_worse(dense: Tensor, updated: Tensor, chosen: Tensor, mask: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the update and its mask, or what the mask keeps of the dense weight if that changes the output less."""
    kept = dense.masked_fill(~mask, 0.0)
    error, allowed, total = (float(((change @ gram) * change).sum(dtype=torch.float64)) for change in (dense - updated, dense - kept, dense))
    if error <= allowed + ROUNDING * total:
        return updated, chosen
    logger.warning("the sweep raises the output error from %.4g to %.4g: the weights stay as they are, under the mask of the score", allowed, error)
    return kept, mask


def inverse_cholesky(gram: Tensor, damping: float) -> Tensor:
    """Return U, upper triangular, with U^T U the inverse of the Gram matrix plus `damping` times its mean diagonal.

    Raises:
        torch.linalg.LinAlgError: if that is not positive definite.
    """
    damped = gram.clone()
    damped.diagonal().add_(damping * gram.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def _sweep(weight: Tensor, mask: Tensor, factor: Tensor, pattern: NMPattern) -> Tensor:
    """Prune the columns of one block in place, fill its mask, and return the scaled errors, (out, columns)."""
    errors = torch.empty_like(weight)
    for column in range(weight.shape[1]):
        if column % pattern.group == 0:
            group = slice(column, column + pattern.group)
            mask[:, group] = best_mask((weight[:, group] / factor.diagonal()[group]).square(), pattern)
        removed = weight[:, column].masked_fill(mask[:, column], 0.0)
        errors[:, column] = removed / factor[column, column]
        # The column keeps what its mask keeps; every later column of the block absorbs its share of what goes.
        weight[:, column] -= removed
        weight[:, column + 1 :] -= errors[:, column, None] * factor[column, column + 1 :]
    return errors
