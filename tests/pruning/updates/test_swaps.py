"""Swaps against trying every one of them, with errors computed anew."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from permllm.pruning.updates import swaps as module
from permllm.pruning.updates.least_squares import exact_rows, least_squares
from permllm.pruning.updates.reconstruction import Reconstruction
from permllm.pruning.updates.swaps import fitted_swaps, price_adapting, price_fixed, price_kept, refine, swaps
from permllm.sparsity.pattern import NMPattern

PATTERNS = pytest.mark.parametrize("text", ["1:2", "2:4", "1:4", "3:4", "4:8"])


def all_swaps(mask, pattern):
    """Yield every mask that is one swap inside a group away in all rows, with (group, pruned, kept) place of each row's swap."""
    for group in range(mask.shape[1] // pattern.group):
        for coming, leaving in product(range(pattern.group - pattern.kept), range(pattern.kept)):
            swapped = mask.clone()
            for row in range(len(mask)):
                places = torch.arange(pattern.group) + group * pattern.group
                kept = mask[row, places]
                swapped[row, places[kept][leaving]] = False
                swapped[row, places[~kept][coming]] = True
            yield (group, coming, leaving), swapped


def channels(mask, pattern):
    every = torch.arange(mask.shape[1]).expand_as(mask)
    groups = mask.shape[1] // pattern.group
    return every[mask].view(len(mask), groups, -1), every[~mask].view(len(mask), groups, -1)


def damped_errors(problem, solution):
    change = (solution - problem.target).double()
    return ((change @ problem.gram.double()) * change).sum(1)


@PATTERNS
def test_the_price_of_a_swap_is_what_it_changes(case, text):
    pattern, given = NMPattern.parse(text), case(in_channels=16)
    problem, mask = Reconstruction.of(given.weight, given.stats, 0.01), given.mask(pattern)
    kept, fitted = problem.target * mask, exact_rows(problem.target, problem.gram, mask)
    prices = {"kept": price_kept(problem, kept, *channels(mask, pattern)), "adapting": price_adapting(problem, fitted, *channels(mask, pattern))}
    scale = damped_errors(problem, torch.zeros_like(kept)).max()
    for (group, coming, leaving), swapped in all_swaps(mask, pattern):
        changes = {
            "kept": damped_errors(problem, problem.target * swapped) - damped_errors(problem, kept),
            "adapting": damped_errors(problem, exact_rows(problem.target, problem.gram, swapped)) - damped_errors(problem, fitted),
        }
        for name, change in changes.items():
            torch.testing.assert_close(prices[name][:, group, coming, leaving].double() / scale, change / scale, rtol=1e-3, atol=1e-5)


def test_with_all_others_fixed_a_swap_is_never_cheaper_than_if_they_adapt(case):
    pattern, given = NMPattern(2, 4), case(in_channels=32)
    problem, mask = Reconstruction.of(given.weight, given.stats, 0.01), given.mask(pattern)
    fitted = exact_rows(problem.target, problem.gram, mask)
    fixed, adapting = (price(problem, fitted, *channels(mask, pattern)) for price in (price_fixed, price_adapting))
    assert (fixed >= adapting - 1e-4 * adapting.abs().max()).all()


@PATTERNS
@pytest.mark.parametrize("update", [swaps, fitted_swaps])
def test_in_the_end_no_swap_helps(case, text, update, monkeypatch):
    monkeypatch.setattr(module, "MOST_FITS", 200)
    pattern, given = NMPattern.parse(text), case(in_channels=16)
    problem = Reconstruction.of(given.weight, given.stats, 0.01)
    _, mask = update(given.weight, given.stats, pattern, given.mask(pattern))
    if update is swaps:
        problem = replace(problem, gram=problem.gram - 0.01 * torch.eye(16), damping=0.0)

    def errors(mask):
        return damped_errors(problem, problem.target * mask if update is swaps else exact_rows(problem.target, problem.gram, mask))

    for _, swapped in all_swaps(mask, pattern):
        assert (errors(swapped) >= errors(mask) * (1 - 1e-4)).all()


def test_every_round_lowers_the_error_of_every_row_that_swaps(case):
    pattern, given = NMPattern(2, 4), case(in_channels=64, out_channels=24)
    problem, mask = Reconstruction.of(given.weight, given.stats, 0.01), given.mask(pattern)
    for solve, price in ((module._keep, price_kept), (module.fit, price_adapting), (module.fit, price_fixed)):
        before, previous = damped_errors(problem, solve(problem, mask, problem.target)), mask
        for rounds in range(1, 8):
            solution, refined = refine(problem, pattern, mask, solve, price, rounds)
            errors = damped_errors(problem, solution)
            has_changed = (refined != previous).any(1)
            assert (errors[has_changed] < before[has_changed]).all() and torch.allclose(errors[~has_changed], before[~has_changed])
            before, previous = errors, refined


def test_kept_weights_stay_as_they_are_without_an_update(case):
    given, pattern = case(), NMPattern(2, 4)
    updated, mask = swaps(given.weight, given.stats, pattern, given.mask(pattern))
    assert torch.equal(updated, given.weight * mask) and not torch.equal(mask, given.mask(pattern))


def test_fitted_swaps_beat_the_best_weights_on_the_mask_they_begin_from(case, monkeypatch):
    for widest in (1024, 8):  # with all others adapting, and fixed
        monkeypatch.setattr(module, "WIDEST_ADAPTING", widest)
        given, pattern = case(in_channels=64), NMPattern(2, 4)
        mask = given.mask(pattern)
        fitted, swapped = (given.error(update(given.weight, given.stats, pattern, mask)[0]) for update in (least_squares, fitted_swaps))
        assert swapped < 0.95 * fitted
