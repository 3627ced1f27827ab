"""Worked examples. W = [[1, -2, 0, 4], [3, 2, 0, -1]], channel norms s = (1, 2, 3, 0)."""

import pytest
import torch

from permllm.calibration.statistics import ActivationStats
from permllm.pruning.metrics import PRUNING_METRICS, magnitude, ria, wanda

WEIGHT = torch.tensor([[1.0, -2.0, 0.0, 4.0], [3.0, 2.0, 0.0, -1.0]])
STATS = ActivationStats(torch.tensor([[1.0, 9.0, 9.0, 9.0], [9.0, 4.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0], [9.0, 9.0, 9.0, 0.0]]), 100)


def test_magnitude_is_the_size_of_the_weight():
    assert magnitude(WEIGHT, STATS).tolist() == [[1, 2, 0, 4], [3, 2, 0, 1]]


def test_wanda_is_the_size_of_the_weight_times_the_norm_of_its_channel():
    assert wanda(WEIGHT, STATS).tolist() == [[1, 4, 0, 0], [3, 4, 0, 0]]


def test_ria_is_the_share_of_row_and_column_times_the_root_of_the_norm():
    # Row sums 7 and 6; column sums 4, 4, 0 and 5; roots of the norms 1, sqrt 2, sqrt 3 and 0.
    root = 2**0.5
    expected = [[1 / 4 + 1 / 7, (2 / 4 + 2 / 7) * root, 0, 0], [3 / 4 + 3 / 6, (2 / 4 + 2 / 6) * root, 0, 0]]
    torch.testing.assert_close(ria(WEIGHT, STATS), torch.tensor(expected))


@pytest.mark.parametrize("name", sorted(PRUNING_METRICS))
def test_scores_are_float32_not_negative_and_blind_to_the_sign(name):
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    score = PRUNING_METRICS[name](weight.bfloat16(), STATS)
    assert score.dtype == torch.float32 and (score >= 0).all() and score.isfinite().all()
    assert torch.equal(score, PRUNING_METRICS[name](-weight.bfloat16(), STATS))


@pytest.mark.parametrize("name", sorted(PRUNING_METRICS))
def test_scores_are_finite_where_rows_and_columns_are_zero(name):
    assert PRUNING_METRICS[name](torch.zeros(2, 4), STATS).tolist() == [[0] * 4] * 2
