"""The optimum on a fixed mask against `torch.linalg.lstsq` in float64."""

import pytest
import torch

from permllm.pruning.updates import least_squares as module
from permllm.pruning.updates.least_squares import conjugate_gradients, exact_rows, fit, least_squares
from permllm.pruning.updates.reconstruction import Reconstruction
from permllm.sparsity.pattern import NMPattern

PATTERNS = [NMPattern(2, 4), NMPattern(1, 4), NMPattern(4, 8)]


def direct(problem, mask):
    """Solve every row as a least squares problem on R with R R^T = H, in float64."""
    root = torch.linalg.cholesky(problem.gram.double())
    solution = torch.zeros(mask.shape, dtype=torch.float64)
    for row, kept in enumerate(mask):
        wanted = problem.target[row].double() @ root
        solution[row, kept] = torch.linalg.lstsq(root[kept].t(), wanted[:, None]).solution[:, 0]
    return solution


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("in_channels", [8, 32, 64])
@pytest.mark.parametrize("seed", range(3))
def test_both_solvers_find_the_least_squares_solution(case, pattern, in_channels, seed):
    given = case(in_channels=in_channels, seed=seed)
    problem, mask = Reconstruction.of(given.weight, given.stats, 0.01), given.mask(pattern)
    expected = direct(problem, mask)
    assert relative(exact_rows(problem.target, problem.gram, mask), expected) < 1e-5
    assert relative(conjugate_gradients(problem.target, problem.gram, mask, problem.target), expected) < 1e-4


def test_the_width_decides_between_the_solvers(case, monkeypatch):
    given = case()
    problem, mask = Reconstruction.of(given.weight, given.stats, 0.01), given.mask(NMPattern(2, 4))
    exact = fit(problem, mask)
    monkeypatch.setattr(module, "MOST_KEPT_EXACTLY", 4)
    stepped = fit(problem, mask)
    assert not torch.equal(stepped, exact)
    torch.testing.assert_close(stepped, exact, rtol=1e-4, atol=1e-4)


def test_rows_that_are_factorised_in_parts_have_the_same_solution(case, monkeypatch):
    given = case()
    problem, mask = Reconstruction.of(given.weight, given.stats, 0.01), given.mask(NMPattern(2, 4))
    exact = fit(problem, mask)
    monkeypatch.setattr(module, "BATCH_BYTES", 1)
    torch.testing.assert_close(fit(problem, mask), exact, rtol=1e-5, atol=1e-6)


def test_rows_may_keep_different_numbers_of_weights(case):
    given = case()
    problem, mask = Reconstruction.of(given.weight, given.stats, 0.01), given.mask(NMPattern(2, 4))
    mask[3] = False
    mask[5, :9] = True
    assert relative(fit(problem, mask), direct(problem, mask)) < 1e-4


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_gradients_that_end_early_have_lowered_the_error(case, steps, monkeypatch):
    monkeypatch.setattr(module, "MOST_STEPS", steps)
    monkeypatch.setattr(module, "MOST_RESTARTS", 1)
    given = case(in_channels=64)
    problem, mask = Reconstruction.of(given.weight, given.stats, 0.01), given.mask(NMPattern(2, 4))
    before, after = problem.errors(problem.target * mask), problem.errors(conjugate_gradients(problem.target, problem.gram, mask, problem.target))
    assert (after < before).all()


def test_uncorrelated_channels_keep_their_weights(case):
    given = case()
    stats = type(given.stats)(given.stats.gram.diagonal().diag(), 400)
    updated, mask = least_squares(given.weight, stats, NMPattern(2, 4), given.mask(NMPattern(2, 4)))
    torch.testing.assert_close(updated, given.weight * mask)


def test_without_damping_no_kept_weights_have_a_smaller_error(case, monkeypatch):
    monkeypatch.setattr(module, "DAMPING", 1e-9)
    given = case(in_channels=16)
    mask = given.mask(NMPattern(2, 4))
    updated, _ = least_squares(given.weight, given.stats, NMPattern(2, 4), mask)
    x, y = given.x.double(), given.x.double() @ given.weight.double().t()
    best = torch.zeros(updated.shape, dtype=torch.float64)
    for row, kept in enumerate(mask):
        best[row, kept] = torch.linalg.lstsq(x[:, kept], y[:, row, None]).solution[:, 0]
    assert given.error(updated) == pytest.approx(given.error(best), rel=1e-4)
