"""Transposable N:M masks: in every M x M block all rows and all columns keep exactly N, so that a weight and its transpose are both N:M.

The best such mask of a block is a transport problem. It is relaxed with entropy, solved for all blocks at once, rounded
to a mask, and improved by swaps.

Legend: C (blocks, M, M) score, at most 1; S (blocks, M, M) relaxed mask, rows and columns sum to N, entries in [0, 1].
"""

import logging

import torch
from torch import Tensor

from permllm.sparsity.pattern import NMPattern

logger = logging.getLogger(__name__)

SHARPNESS = 20.0  # tau: the relaxed mask maximises <S, C> + entropy(S) / tau; e^tau must fit float32
MOST_SWEEPS = 300
CHECK_EVERY = 10  # sweeps
TOLERANCE = 0.05  # by how much the sum of a row or column may still be off: rounding makes it exact
MOST_SWAPS = 64  # per block
SMALLEST_GAIN = 1e-6  # of a swap, of the range of the block's scores: smaller ones are rounding
BATCH_ENTRIES = 2**17  # of the scores that are solved together: they should fit a core's cache


def transposable_mask(score: Tensor, pattern: NMPattern) -> Tensor:
    """Keep a large total score with exactly N of every M consecutive entries, along rows and along columns.

    >>> transposable_mask(torch.eye(4) + torch.eye(4).roll(1, 0), NMPattern.parse("2:4")).int()
    tensor([[1, 0, 0, 1],
            [1, 1, 0, 0],
            [0, 1, 1, 0],
            [0, 0, 1, 1]], dtype=torch.int32)

    Args:
        score: (out, in), importance, higher is kept. Must be finite.

    Returns:
        (out, in) bool.

    Raises:
        ValueError: if M does not divide `out` and `in`, or the score is not finite.

    Source: TSENOR, arXiv:2505.23949.
    """
    pattern.check_widths({"the score along its rows": score.shape[1], "the score along its columns": score.shape[0]})
    if not score.isfinite().all():
        raise ValueError("a transposable mask needs a finite score; the weights or the statistics hold NaN or infinity")
    size = pattern.group
    blocks = score.float().unflatten(1, (-1, size)).unflatten(0, (-1, size)).transpose(1, 2)  # (out / M, in / M, M, M)
    flat = blocks.reshape(-1, size, size)
    parts = flat.split(max(BATCH_ENTRIES // size**2, 1))
    masks, converged = zip(*(_solve(part, pattern.kept) for part in parts), strict=True)
    if open_blocks := len(flat) - sum(converged):
        logger.warning("%d of %d blocks have not converged after %d sweeps; their masks may be worse", open_blocks, len(flat), MOST_SWEEPS)
    return torch.cat(masks).view(blocks.shape).transpose(1, 2).flatten(2).flatten(0, 1)


def _solve(score: Tensor, kept: int) -> tuple[Tensor, int]:
    """Return the masks of some blocks, and how many of them converged."""
    lowest, highest = score.amin((1, 2), keepdim=True), score.amax((1, 2), keepdim=True)
    normal = (score - lowest) / (highest - lowest).clamp(min=torch.finfo(score.dtype).tiny)  # every mask gains alike by a constant
    relaxed, is_converged = relaxed_mask(normal, kept)
    return improved_mask(normal, rounded_mask(relaxed, normal, kept)), int(is_converged.sum())


def relaxed_mask(score: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Solve the relaxed problem by Dykstra's projections onto row sums, column sums and entries of at most 1.

    Args:
        score: (blocks, M, M), 0 to 1.

    Returns:
        S, and for every block whether its sums are within `TOLERANCE`, (blocks,) bool.
    """
    relaxed = (SHARPNESS * (score - 1)).exp_()
    dual = torch.ones_like(relaxed)  # only the bound of 1 needs one: the sums are affine
    for sweep in range(1, MOST_SWEEPS + 1):
        relaxed *= kept / relaxed.sum(2, keepdim=True)
        relaxed *= kept / relaxed.sum(1, keepdim=True)
        dual *= relaxed
        torch.clamp(dual, max=1.0, out=relaxed)
        dual /= relaxed.clamp_(min=torch.finfo(relaxed.dtype).tiny)
        if sweep % CHECK_EVERY == 0:
            off = torch.maximum((relaxed.sum(2) - kept).abs().amax(1), (relaxed.sum(1) - kept).abs().amax(1))
            if (off <= TOLERANCE).all():
                break
    return relaxed, off <= TOLERANCE


def rounded_mask(relaxed: Tensor, score: Tensor, kept: int) -> Tensor:
    """Round S to masks: take entries from the largest down while rows and columns have room, then fill those that still have.

    To fill row i and column j, whose own entry is taken, entry (p, q) makes way for (i, q) and (p, j), where that costs
    least; there always is one. Returns (blocks, M, M) bool, exactly N in every row and column.
    """
    count, size = len(relaxed), relaxed.shape[1]
    order = relaxed.flatten(1).argsort(dim=1, descending=True)
    mask = torch.zeros_like(relaxed).flatten(1)
    rows_left, columns_left = (torch.full((count, size), float(kept), device=relaxed.device) for _ in range(2))
    for entry in order.t().contiguous():
        entry = entry[:, None]
        row, column = entry // size, entry % size
        takes = torch.minimum(rows_left.gather(1, row), columns_left.gather(1, column)).clamp_(max=1.0)
        mask.scatter_(1, entry, takes)
        rows_left.scatter_add_(1, row, -takes)
        columns_left.scatter_add_(1, column, -takes)
    mask = mask.view_as(relaxed).bool()
    open_blocks = (rows_left.sum(1) > 0).nonzero()[:, 0]
    while len(open_blocks):
        mask[open_blocks], rows_left[open_blocks], columns_left[open_blocks] = _fill(
            score[open_blocks], mask[open_blocks], rows_left[open_blocks], columns_left[open_blocks]
        )
        open_blocks = open_blocks[rows_left[open_blocks].sum(1) > 0]
    return mask


def _fill(score: Tensor, mask: Tensor, rows_left: Tensor, columns_left: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Add one entry to a row and a column of every block that have room."""
    blocks = torch.arange(len(score), device=score.device)
    row, column = rows_left.argmax(1), columns_left.argmax(1)
    in_row, in_column = score[blocks, row], score[blocks, :, column]
    gain = in_row[:, None, :] + in_column[:, :, None] - score  # of (i, q) and (p, j) for (p, q)
    possible = mask & ~mask[blocks, row][:, None, :] & ~mask[blocks, :, column][:, :, None]
    best = gain.masked_fill_(~possible, -torch.inf).flatten(1).argmax(1)
    other_row, other_column = best // mask.shape[2], best % mask.shape[2]
    mask[blocks, row, other_column] = mask[blocks, other_row, column] = True
    mask[blocks, other_row, other_column] = False
    rows_left[blocks, row] -= 1
    columns_left[blocks, column] -= 1
    return mask, rows_left, columns_left


def improved_mask(score: Tensor, mask: Tensor) -> Tensor:
    """Make the best swap of every block until none helps: entries (i, j) and (p, q) make way for (i, q) and (p, j).

    No block's score ever falls, and its rows and columns keep as many entries as before.
    """
    mask, open_blocks = mask.clone(), torch.arange(len(mask), device=mask.device)
    for _ in range(MOST_SWAPS):
        part, values = mask[open_blocks], score[open_blocks]
        gain, rows, columns = _best_swap(values, part)
        open_blocks = open_blocks[gain > SMALLEST_GAIN]
        if not len(open_blocks):
            break
        (row, other_row), (column, other_column) = rows[:, gain > SMALLEST_GAIN], columns[:, gain > SMALLEST_GAIN]
        mask[open_blocks, row, column] = mask[open_blocks, other_row, other_column] = False
        mask[open_blocks, row, other_column] = mask[open_blocks, other_row, column] = True
    return mask


def _best_swap(score: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gain of every block's best swap, (blocks,), its rows and its columns, (2, blocks) each.

    For rows i and p the swap takes the column j that loses least and the column q that gains most when j goes from i to p
    and q from p to i: the two are chosen independently, and the pairs of rows are all tried.
    """
    only_here = mask[:, :, None, :] & ~mask[:, None, :, :]  # (blocks, i, p, column): kept in row i, not in row p
    moved = (score[:, None, :, :] - score[:, :, None, :]).masked_fill_(~only_here, -torch.inf)  # from row i to row p
    best, column = moved.max(3)  # (blocks, i, p)
    gain, pair = (best + best.transpose(1, 2)).flatten(1).max(1)
    size = mask.shape[1]
    row, other_row = pair // size, pair % size
    places = column.flatten(1)
    columns = [places.gather(1, (first * size + second)[:, None])[:, 0] for first, second in ((row, other_row), (other_row, row))]
    return gain, torch.stack([row, other_row]), torch.stack(columns)
