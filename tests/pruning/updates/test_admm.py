"""ADMM against exact least squares, and its gradual masks."""

import pytest
import torch

from permllm.pruning.updates import admm as module
from permllm.pruning.updates.admm import adaptive_admm, admm, gradual_mask
from permllm.pruning.updates.least_squares import exact_rows
from permllm.pruning.updates.reconstruction import Reconstruction
from permllm.sparsity.mask import nm_mask
from permllm.sparsity.pattern import NMPattern


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8"])
@pytest.mark.parametrize("in_channels", [8, 32, 64])
def test_many_iterations_reach_the_least_squares_solution(case, text, in_channels):
    given, pattern = case(in_channels=in_channels), NMPattern.parse(text)
    problem, mask = Reconstruction.of(given.weight, given.stats, module.DAMPING), given.mask(pattern)
    expected = exact_rows(problem.target, problem.gram, mask)
    updated, _ = admm(given.weight, given.stats, pattern, mask, iterations=600)
    assert float((updated * problem.scale - expected).norm() / expected.norm()) < 1e-4


def test_twenty_iterations_take_most_of_the_way(case):
    given, pattern = case(in_channels=64), NMPattern(2, 4)
    mask = given.mask(pattern)
    start, twenty, many = (
        given.error(weight) for weight in (given.weight * mask, *(admm(given.weight, given.stats, pattern, mask, n)[0] for n in (20, 600)))
    )
    assert start - twenty > 0.9 * (start - many)


def test_an_adapting_mask_beats_the_fixed_one(case):
    for seed in range(3):
        given, pattern = case(in_channels=64, seed=seed), NMPattern(2, 4)
        fixed, adapting = (given.error(update(given.weight, given.stats, pattern, given.mask(pattern))[0]) for update in (admm, adaptive_admm))
        assert adapting < fixed


def test_a_gradual_mask_takes_the_lowest_scores_that_no_group_needs():
    score = torch.tensor([[9.0, 1.0, 8.0, 7.0, 2.0, 3.0, 4.0, 5.0]])  # 7 may go, 4 and 5 may not
    expected = {0.0: [], 0.25: [1], 0.5: [1, 4], 0.75: [1, 4, 5], 1.0: [1, 3, 4, 5]}
    for share, gone in expected.items():
        assert (~gradual_mask(score, NMPattern(2, 4), share)).nonzero()[:, 1].tolist() == gone


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8"])
def test_the_last_gradual_mask_is_the_nm_mask(text):
    score = torch.randn(7, 32, generator=torch.Generator().manual_seed(0)).abs()
    assert torch.equal(gradual_mask(score, NMPattern.parse(text), 1.0), nm_mask(score, NMPattern.parse(text)))
