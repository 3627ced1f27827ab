"""Worked examples. W = [[1, -2, 0, 4], [3, 2, 0, -1]], channel norms s = (1, 2, 3, 0)."""

import pytest
import torch

from permllm.calibration.statistics import ActivationStats
from permllm.pruning.metrics import PRUNING_METRICS, magnitude, obs, ria, wanda

WEIGHT = torch.tensor([[1.0, -2.0, 0.0, 4.0], [3.0, 2.0, 0.0, -1.0]])
STATS = ActivationStats(torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 4.0, 3.0, 0.0], [1.0, 3.0, 9.0, 0.0], [0.0, 0.0, 0.0, 0.0]]), 100)


def random_case(out_channels=6, channels=16):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, channels, generator=generator)
    return torch.randn(out_channels, channels, generator=generator), ActivationStats(x.t() @ x / 50, 50)


def test_magnitude_is_the_size_of_the_weight():
    assert magnitude(WEIGHT, STATS).of(WEIGHT).tolist() == [[1, 2, 0, 4], [3, 2, 0, 1]]


def test_wanda_is_the_size_of_the_weight_times_the_norm_of_its_channel():
    assert wanda(WEIGHT, STATS).of(WEIGHT).tolist() == [[1, 4, 0, 0], [3, 4, 0, 0]]


def test_ria_is_the_share_of_row_and_column_times_the_root_of_the_norm():
    # Row sums 7 and 6; column sums 4, 4, 0 and 5; roots of the norms 1, sqrt 2, sqrt 3 and 0.
    root = 2**0.5
    expected = [[1 / 4 + 1 / 7, (2 / 4 + 2 / 7) * root, 0, 0], [3 / 4 + 3 / 6, (2 / 4 + 2 / 6) * root, 0, 0]]
    torch.testing.assert_close(ria(WEIGHT, STATS).of(WEIGHT), torch.tensor(expected))


def test_obs_is_the_root_of_the_error_without_a_weight_if_all_others_adapt():
    weight, stats = random_case()
    gram = stats.gram.double() + 0.01 * stats.gram.double().diagonal().diag()
    score = obs(weight, stats).of(weight)
    for channel in (0, 7, 15):
        others = [other for other in range(16) if other != channel]
        change = torch.linalg.solve(gram[others][:, others], gram[others, channel])  # of the others, for a weight of 1 that goes
        remaining = gram[channel, channel] - gram[channel, others] @ change
        torch.testing.assert_close(score[:, channel].double(), weight[:, channel].double().abs() * remaining.sqrt(), rtol=1e-4, atol=1e-6)


def test_obs_of_uncorrelated_channels_is_wandas_score():
    weight, stats = random_case()
    uncorrelated = ActivationStats(stats.gram.diagonal().diag(), 50)
    torch.testing.assert_close(obs(weight, uncorrelated).of(weight), wanda(weight, uncorrelated).of(weight) * 1.01**0.5)


@pytest.mark.parametrize("name", sorted(PRUNING_METRICS))
def test_scores_are_float32_not_negative_and_blind_to_the_sign(name):
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    score = PRUNING_METRICS[name](weight, STATS).of(weight)
    assert score.dtype == torch.float32 and (score >= 0).all() and score.isfinite().all()
    assert torch.equal(score, PRUNING_METRICS[name](-weight, STATS).of(-weight))


@pytest.mark.parametrize("name", sorted(PRUNING_METRICS))
def test_a_low_precision_weight_is_scored_as_its_float32_values(name):
    weight, stats = random_case()
    low, wide = weight.bfloat16(), weight.bfloat16().float()
    assert torch.equal(PRUNING_METRICS[name](low, stats).of(low), PRUNING_METRICS[name](wide, stats).of(wide))


@pytest.mark.parametrize("name", sorted(PRUNING_METRICS))
def test_scores_are_finite_where_rows_and_columns_are_zero(name):
    weight = torch.zeros(2, 4)
    assert PRUNING_METRICS[name](weight, STATS).of(weight).tolist() == [[0] * 4] * 2


@pytest.mark.parametrize("name", sorted(PRUNING_METRICS))
@pytest.mark.parametrize("channels", [slice(4, 12), torch.tensor([7, 0, 15, 3])], ids=["slice", "order"])
def test_some_channels_score_as_they_do_in_the_whole_weight(name, channels):
    weight, stats = random_case()
    score = PRUNING_METRICS[name](weight, stats)
    assert torch.equal(score.by_channel(weight.t()[channels], channels), score.of(weight).t()[channels])


@pytest.mark.parametrize("name", sorted(PRUNING_METRICS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scoring_leaves_weight_and_statistics_as_they_are(name, dtype):
    weight, stats = random_case()
    weight = weight.to(dtype)
    before, gram = weight.clone(), stats.gram.clone()
    PRUNING_METRICS[name](weight, stats).of(weight)
    assert torch.equal(weight, before) and torch.equal(stats.gram, gram)


@pytest.mark.parametrize("name", sorted(PRUNING_METRICS))
def test_how_the_weight_lies_in_memory_does_not_matter(name):
    weight, stats = random_case()
    turned = weight.t().contiguous().t()
    torch.testing.assert_close(PRUNING_METRICS[name](turned, stats).of(turned), PRUNING_METRICS[name](weight, stats).of(weight))
