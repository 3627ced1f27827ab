"""SparseGPT against direct linear algebra in float64.

Legend: W (out, in) weight; H (in, in) damped Gram matrix. Removing column j of a row costs w_j^2 / [H_{>=j}^-1]_jj, and the
columns after it take w_j H_{>j,>j}^-1 H_{>j,j}: the least squares solution with the columns before it held fixed.
"""

import pytest
import torch

from permllm.calibration.statistics import ActivationStats
from permllm.pruning.updates import sparsegpt as module
from permllm.pruning.updates.sparsegpt import inverse_cholesky, sparsegpt
from permllm.sparsity.mask import nm_mask
from permllm.sparsity.pattern import NMPattern


def correlated(out_channels=6, in_channels=16, tokens=400, seed=0):
    """A weight, its input (tokens, in) with strongly correlated channels, and the statistics of it."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(in_channels, in_channels, generator=generator)
    x = torch.randn(tokens, in_channels, generator=generator) @ mixing + torch.randn(tokens, in_channels, generator=generator)
    return torch.randn(out_channels, in_channels, generator=generator), x, ActivationStats(x.t() @ x / tokens, tokens)


def damped(gram):
    return gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def direct_sweep(weight, gram, pattern):
    """Sweep column by column and solve every step anew, in float64."""
    hessian, weight = damped(gram), weight.double().clone()
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    for column in range(weight.shape[1]):
        if column % pattern.group == 0:
            group = range(column, column + pattern.group)
            cost = torch.stack([weight[:, j] ** 2 / torch.linalg.inv(hessian[j:, j:])[0, 0] for j in group], dim=1)
            mask[:, column : column + pattern.group] = nm_mask(cost, pattern)
        removed = weight[:, column] * ~mask[:, column]
        rest = slice(column + 1, None)
        weight[:, rest] += removed[:, None] * torch.linalg.solve(hessian[rest, rest], hessian[rest, column])
        weight[:, column] -= removed
    return weight, mask


@pytest.mark.parametrize("text", ["1:2", "2:4", "1:4", "3:4", "4:8"])
@pytest.mark.parametrize("seed", range(3))
def test_the_sweep_equals_solving_every_step_directly(text, seed):
    pattern = NMPattern.parse(text)
    weight, _, stats = correlated(seed=seed)
    updated, mask = sparsegpt(weight, stats, pattern)
    expected, expected_mask = direct_sweep(weight, stats.gram, pattern)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(updated.double(), expected, atol=1e-3, rtol=1e-3)  # float32 Cholesky of a condition of 10^4


@pytest.mark.parametrize("row", range(6))
def test_the_rest_of_the_last_group_is_the_least_squares_solution_when_one_column_goes(row):
    weight, _, stats = correlated(in_channels=4)
    updated, mask = sparsegpt(weight, stats, NMPattern(3, 4))
    (removed,) = (~mask[row]).nonzero()[:, 0].tolist()
    # Minimise (w - v) H (w - v)^T over the columns v after the removed one: with R R^T = H a least squares problem.
    root = torch.linalg.cholesky(damped(stats.gram))
    fixed = weight[row].double().clone()
    fixed[removed:] = 0
    target = (weight[row].double() - fixed) @ root
    expected = torch.linalg.lstsq(root[removed + 1 :].t(), target[:, None]).solution[:, 0]
    torch.testing.assert_close(updated[row, removed + 1 :].double(), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(updated[row, :removed], weight[row, :removed])


def test_uncorrelated_channels_are_pruned_by_score_and_not_updated():
    weight, _, _ = correlated()
    variances = torch.linspace(0.1, 3, 16)
    updated, mask = sparsegpt(weight, ActivationStats(variances.diag(), 100), NMPattern(2, 4))
    expected = nm_mask(weight.abs() * (variances + 0.01 * variances.mean()).sqrt(), NMPattern(2, 4))
    assert torch.equal(mask, expected)
    torch.testing.assert_close(updated, weight * expected)


def test_inputs_of_equal_strength_are_pruned_by_magnitude():
    weight, _, _ = correlated()
    _, mask = sparsegpt(weight, ActivationStats(torch.eye(16), 100), NMPattern(2, 4))
    assert torch.equal(mask, nm_mask(weight.abs(), NMPattern(2, 4)))


@pytest.mark.parametrize("text", ["2:4", "4:8", "3:6"])
@pytest.mark.parametrize("block", [1, 8, 20, 48, 1000])
def test_the_result_does_not_depend_on_the_sweep_block(text, block, monkeypatch):
    pattern = NMPattern.parse(text)
    weight, _, stats = correlated(in_channels=48)
    expected, expected_mask = sparsegpt(weight, stats, pattern)
    monkeypatch.setattr(module, "SWEEP_BLOCK", block)
    updated, mask = sparsegpt(weight, stats, pattern)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(updated, expected, atol=1e-4, rtol=1e-4)


def test_weights_wider_than_a_block_equal_solving_every_step_directly():
    pattern = NMPattern(2, 4)
    weight, _, stats = correlated(in_channels=160, tokens=1000)  # SWEEP_BLOCK is 128
    updated, mask = sparsegpt(weight, stats, pattern)
    expected, expected_mask = direct_sweep(weight, stats.gram, pattern)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(updated.double(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("text", ["1:2", "2:4", "4:8"])
@pytest.mark.parametrize("seed", range(3))
def test_on_correlated_inputs_the_output_error_is_below_wandas(text, seed):
    pattern = NMPattern.parse(text)
    weight, x, stats = correlated(seed=seed, out_channels=16, in_channels=32)
    updated, _ = sparsegpt(weight, stats, pattern)
    wanda = weight * nm_mask(weight.abs() * stats.norms, pattern)
    assert ((weight - updated) @ x.t()).square().sum() < 0.8 * ((weight - wanda) @ x.t()).square().sum()


def test_the_inverse_cholesky_factor_is_upper_triangular_and_squares_to_the_damped_inverse():
    _, _, stats = correlated()
    factor = inverse_cholesky(stats.gram.double(), 0.01)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.t() @ factor @ damped(stats.gram), torch.eye(16, dtype=torch.float64))


def test_channels_that_are_always_zero_lose_their_weights_and_change_nothing_else():
    weight, x, _ = correlated()
    x[:, [2, 9]] = 0.0
    updated, mask = sparsegpt(weight, ActivationStats(x.t() @ x / len(x), len(x)), NMPattern(2, 4))
    assert updated.isfinite().all() and (updated[:, [2, 9]] == 0).all()
    assert (mask.unflatten(-1, (-1, 4)).sum(-1) == 2).all()


def test_neither_the_weight_nor_the_statistics_are_changed():
    weight, x, _ = correlated()
    x[:, 3] = 0.0
    stats = ActivationStats(x.t() @ x / len(x), len(x))
    before = weight.clone(), stats.gram.clone()
    sparsegpt(weight, stats, NMPattern(2, 4))
    assert torch.equal(weight, before[0]) and torch.equal(stats.gram, before[1])


def test_a_gram_matrix_that_is_not_positive_definite_is_an_error():
    weight, _, _ = correlated()
    gram = torch.full((16, 16), 4.0).fill_diagonal_(1.0)  # eigenvalues -3 and 61
    with pytest.raises(torch.linalg.LinAlgError, match=r"even with 1 of its mean diagonal added; gather the statistics again"):
        sparsegpt(weight, ActivationStats(gram, 400), NMPattern(2, 4))


def test_a_width_that_the_group_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="the weight has 10"):
        sparsegpt(torch.zeros(2, 10), ActivationStats(torch.eye(10), 4), NMPattern(2, 4))
