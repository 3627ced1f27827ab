"""ALPS: its iteration against one written out with matrix inverses, and how it ends."""

from itertools import combinations, product

import pytest
import torch

from permllm.pruning.updates import alps as module
from permllm.pruning.updates.alps import alps
from permllm.pruning.updates.least_squares import exact_rows, least_squares
from permllm.pruning.updates.reconstruction import Reconstruction
from permllm.sparsity.mask import nm_mask
from permllm.sparsity.pattern import NMPattern

PATTERN = NMPattern(2, 4)


def direct(problem, pattern):
    """Iterate in float64 with an inverse for every penalty; return the mask."""
    target, gram = problem.target.double(), problem.gram.double()
    sparse, dual, rho, support = target, torch.zeros_like(target), 0.1, nm_mask(target.abs(), pattern)
    for iteration in range(1, 301):
        dense = (target @ gram - dual + rho * sparse) @ torch.linalg.inv(gram + rho * torch.eye(len(gram), dtype=gram.dtype))
        mask = nm_mask((dense + dual / rho).abs(), pattern)
        sparse = (dense + dual / rho) * mask
        dual = dual + rho * (dense - sparse)
        if iteration % 3 == 0:
            change, support = float((mask != support).sum()) / 2 / float(mask.sum()), mask
            if change < 3e-4:
                return mask
            rho *= 1.3 if change >= 0.1 else 1.2 if change >= 0.005 else 1.1
    return mask


@pytest.mark.parametrize("seed", range(3))
def test_the_masks_are_those_of_the_iteration_written_out(case, seed):
    given = case(seed=seed)
    problem = Reconstruction.of(given.weight, given.stats, module.DAMPING)
    updated, mask = alps(given.weight, given.stats, PATTERN, given.mask(PATTERN))
    assert torch.equal(mask, direct(problem, PATTERN))
    torch.testing.assert_close(updated * problem.scale, exact_rows(problem.target, problem.gram, mask), rtol=1e-3, atol=1e-4)


def test_it_is_near_the_best_of_all_masks(case):
    """Two groups of four: 36 masks per row."""
    given = case(in_channels=8, out_channels=16)
    groups = [[float(channel in chosen) for channel in range(4)] for chosen in combinations(range(4), 2)]
    masks = [torch.tensor(first + second).bool().expand(16, 8) for first, second in product(groups, repeat=2)]
    problem = Reconstruction.of(given.weight, given.stats, module.DAMPING)
    best = torch.stack([problem.errors(exact_rows(problem.target, problem.gram, mask)) for mask in masks]).min(0).values
    wanda, found = (update(given.weight, given.stats, PATTERN, given.mask(PATTERN))[0] for update in (least_squares, alps))
    wanda_error, error = (float(problem.errors(weight * problem.scale).sum()) for weight in (wanda, found))
    assert error < 1.3 * float(best.sum()) and error < wanda_error


def test_a_mask_that_never_rests_is_told(case, monkeypatch, caplog):
    monkeypatch.setattr(module, "MOST_ITERATIONS", 6)
    monkeypatch.setattr(module, "SMALLEST_CHANGE", 0.0)
    given = case()
    updated, mask = alps(given.weight, given.stats, PATTERN, given.mask(PATTERN))
    assert "the mask still changes after 6 iterations" in caplog.text
    assert (mask.unflatten(1, (-1, 4)).sum(-1) == 2).all() and given.error(updated) < given.error(given.weight * given.mask(PATTERN))
