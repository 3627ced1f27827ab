"""Refine a mask by swaps: inside a group one kept weight goes and a pruned one comes, where that lowers the output error.

All rows and groups are priced at once. A row makes its best swaps together, at most one per group; as they meet in the
Gram matrix, the row's error is then computed anew, and if it has not fallen only half as many are made.

Legend: as in `reconstruction.py`; C = V - T; pull C H; j a kept channel of a group, k a pruned one. With d_j the change
of V_ij that removes it, a swap changes the error by 2 d_j (C H)_j + a d_j^2 - ((C H)_k + c d_j)^2 / e, if the new weight
takes its best value. With all other weights as they are, a = H_jj, c = H_jk and e = H_kk; if they all adapt, H is reduced by them.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from permllm.calibration.statistics import ActivationStats
from permllm.pruning.updates.least_squares import DAMPING, fit
from permllm.pruning.updates.reconstruction import Reconstruction
from permllm.sparsity.pattern import NMPattern

MOST_ROUNDS = 200
MOST_FITS = 10  # rounds if the weights are solved for in each: the first ones gain most
FIRST_SHARE = 0.25  # of the groups, that swap together at first
SMALLEST_GAIN = 1e-6  # of a row's error: smaller ones are rounding
WIDEST_ADAPTING = 1024  # channels up to which swaps are priced with all other weights adapting: it takes in^3 per row
BATCH_BYTES = 2**27  # of the matrices that are reduced at once

Solve = Callable[[Reconstruction, Tensor, Tensor], Tensor]  # rows of a problem, their mask, V so far -> V on the mask
Price = Callable[[Reconstruction, Tensor, Tensor, Tensor], Tensor]  # rows of a problem, V, kept and pruned channels -> changes


def swaps(weight: Tensor, stats: ActivationStats, pattern: NMPattern, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Refine the mask for weights that stay as they are.

    Arguments and errors as for `least_squares`.

    Returns:
        The dense weight (out, in) float32, exactly 0 where pruned, and a mask that no swap improves.
    """
    pattern.check_widths({"the weight": weight.shape[1]})
    problem = Reconstruction.of(weight, stats, DAMPING)
    gram = problem.gram.clone()
    gram.diagonal().sub_(problem.damping)  # nothing is solved: no damping is needed
    _, refined = refine(replace(problem, gram=gram, damping=0.0), pattern, mask, _keep, price_kept)
    return weight.float().masked_fill(~refined, 0.0), refined


def fitted_swaps(weight: Tensor, stats: ActivationStats, pattern: NMPattern, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Refine the mask for weights that are updated, and update them.

    Arguments, result and errors as for `least_squares`.
    """
    pattern.check_widths({"the weight": weight.shape[1]})
    problem = Reconstruction.of(weight, stats, DAMPING)
    return problem.finish(*refine_fit(problem, pattern, mask), mask)


def refine_fit(problem: Reconstruction, pattern: NMPattern, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return V, the optimum on a mask that swaps no longer improve, and the mask, from a mask to start with."""
    adapts = len(problem.gram) <= WIDEST_ADAPTING
    return refine(problem, pattern, mask, fit, price_adapting if adapts else price_fixed, MOST_FITS)


def refine(problem: Reconstruction, pattern: NMPattern, mask: Tensor, solve: Solve, price: Price, rounds: int = MOST_ROUNDS) -> tuple[Tensor, Tensor]:
    """Make swaps until none lowers the damped error, or so many rounds are over; no row's error ever rises.

    Returns:
        V (out, in) on the mask, and the mask.
    """
    mask, solution = mask.clone(), solve(problem, mask, problem.target)
    errors = _damped_errors(problem, solution)
    groups = mask.shape[1] // pattern.group
    together = torch.full_like(errors, max(round(FIRST_SHARE * groups), 1), dtype=torch.int64)  # swaps a row makes at once
    rows = torch.arange(len(mask), device=mask.device)
    for _ in range(rounds):
        part = replace(problem, weight=problem.weight[rows], target=problem.target[rows])
        tried, made = _swapped(part, pattern, mask[rows], solution[rows], errors[rows], together[rows], price)
        is_open = made > 0
        rows, tried, made = rows[is_open], tried[is_open], made[is_open]
        if not len(rows):
            break
        part = replace(problem, weight=problem.weight[rows], target=problem.target[rows])
        found = solve(part, tried, solution[rows])
        found_errors = _damped_errors(part, found)
        is_better = found_errors < errors[rows]
        better = rows[is_better]
        mask[better], solution[better], errors[better] = tried[is_better], found[is_better], found_errors[is_better]
        together[rows] = torch.where(is_better, together[rows], made // 2)
    return solution, mask


def price_kept(problem: Reconstruction, solution: Tensor, kept: Tensor, pruned: Tensor) -> Tensor:
    """Return by how much the error changes if weights stay as they are, (rows, groups, M - N, N).

    Args:
        solution: (rows, in), V.
        kept, pruned: (rows, groups, N) and (rows, groups, M - N) channels.
    """
    pull = (solution - problem.target) @ problem.gram
    leaving, coming = -_at(problem.target, kept), _at(problem.target, pruned)
    diagonal = problem.gram.diagonal()
    alone = [2 * change * _at(pull, channels) + change.square() * diagonal[channels] for change, channels in ((leaving, kept), (coming, pruned))]
    meeting = problem.gram[pruned[..., :, None], kept[..., None, :]] * coming[..., :, None] * leaving[..., None, :]
    return alone[0][..., None, :] + alone[1][..., :, None] + 2 * meeting


def price_fixed(problem: Reconstruction, solution: Tensor, kept: Tensor, pruned: Tensor) -> Tensor:
    """Return as `price_kept` the change if the new weight takes its best value and all others stay as they are."""
    diagonal = problem.gram.diagonal()
    meeting = problem.gram[pruned[..., :, None], kept[..., None, :]]
    return _price(problem, solution, kept, pruned, diagonal[kept], meeting, diagonal[pruned][..., :, None])


def price_adapting(problem: Reconstruction, solution: Tensor, kept: Tensor, pruned: Tensor) -> Tensor:
    """Return as `price_kept` the change if V is the optimum before the swap and after it."""
    at_once = max(BATCH_BYTES // (problem.gram.element_size() * len(problem.gram) ** 2), 1)
    reduced = zip(*(_reduce(problem.gram, *part) for part in zip(kept.split(at_once), pruned.split(at_once), strict=True)), strict=True)
    return _price(problem, solution, kept, pruned, *(torch.cat(parts) for parts in reduced))


def _reduce(gram: Tensor, kept: Tensor, pruned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a (rows, groups, N), c and e (rows, groups, M - N, N), of H reduced by all kept weights but the one that goes."""
    support, rest = kept.flatten(1), pruned.flatten(1)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram[support[:, :, None], support[:, None, :]]))
    crossing = gram[rest[:, :, None], support[:, None, :]]
    spread = crossing @ inverse
    shape = (len(kept), kept.shape[1], pruned.shape[2], kept.shape[1], kept.shape[2])
    within = spread.view(shape).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # of each group's pruned and kept channels
    stiffness = 1 / inverse.diagonal(dim1=1, dim2=2).view_as(kept)
    remaining = (gram.diagonal()[rest] - (spread * crossing).sum(-1)).view_as(pruned)
    return stiffness, within * stiffness[..., None, :], remaining[..., :, None] + within.square() * stiffness[..., None, :]


def _price(
    problem: Reconstruction, solution: Tensor, kept: Tensor, pruned: Tensor, stiffness: Tensor, meeting: Tensor, coming_stiffness: Tensor
) -> Tensor:
    pull, leaving = (solution - problem.target) @ problem.gram, -_at(solution, kept)
    cost = 2 * leaving * _at(pull, kept) + stiffness * leaving.square()
    gain = (_at(pull, pruned)[..., :, None] + meeting * leaving[..., None, :]).square() / coming_stiffness
    return cost[..., None, :] - gain


def _swapped(
    problem: Reconstruction, pattern: NMPattern, mask: Tensor, solution: Tensor, errors: Tensor, together: Tensor, price: Price
) -> tuple[Tensor, Tensor]:
    """Return the masks after the best swaps of every row, up to `together` (rows,), and how many were made."""
    channels = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    groups = mask.shape[1] // pattern.group
    kept, pruned = channels[mask].view(len(mask), groups, -1), channels[~mask].view(len(mask), groups, -1)
    best = price(problem, solution, kept, pruned).flatten(2).min(dim=2)
    places = best.values.argsort(dim=1).argsort(dim=1)
    is_made = (best.values < -SMALLEST_GAIN * errors[:, None]) & (places < together[:, None])
    leaving = kept.gather(2, (best.indices % pattern.kept)[..., None])[..., 0]
    coming = pruned.gather(2, (best.indices // pattern.kept)[..., None])[..., 0]
    return mask.scatter(1, leaving, ~is_made).scatter(1, coming, is_made), is_made.sum(1)


def _keep(problem: Reconstruction, mask: Tensor, solution: Tensor) -> Tensor:
    return problem.target * mask


def _damped_errors(problem: Reconstruction, solution: Tensor) -> Tensor:
    change = solution - problem.target
    return ((change @ problem.gram) * change).sum(1, dtype=torch.float64)


def _at(tensor: Tensor, channels: Tensor) -> Tensor:
    """Return a (rows, in) tensor at (rows, groups, channels)."""
    return tensor.gather(1, channels.flatten(1)).view_as(channels)
