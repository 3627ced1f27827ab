from itertools import permutations

import pytest
import torch

from permllm.permutation.assignment import best_assignment
from permllm.permutation.sinkhorn import sinkhorn


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_enough_sweeps_make_rows_and_columns_sum_to_one():
    soft = sinkhorn(normal(3, 16, 16), temperature=1.0, iterations=50)
    torch.testing.assert_close(soft.sum(-1), torch.ones(3, 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(soft.sum(-2), torch.ones(3, 16), atol=1e-5, rtol=0)
    assert (soft >= 0).all() and (soft <= 1).all()


@pytest.mark.parametrize("temperature", [1.0, 0.1, 1e-3])
@pytest.mark.parametrize("iterations", [1, 5])
def test_columns_sum_to_one_after_any_number_of_sweeps(temperature, iterations):
    soft = sinkhorn(normal(3, 16, 16) * 10, temperature, iterations)
    torch.testing.assert_close(soft.sum(-2), torch.ones(3, 16), atol=1e-5, rtol=0)


def test_sweeps_are_alternating_divisions_by_row_and_column_sums():
    logits = normal(2, 4, 4, dtype=torch.float64)
    expected = (logits / 0.5).exp()
    for _ in range(5):
        expected = expected / expected.sum(-1, keepdim=True)
        expected = expected / expected.sum(-2, keepdim=True)
    torch.testing.assert_close(sinkhorn(logits, 0.5, 5), expected)


def test_no_sweep_gives_the_row_softmax():
    logits = normal(2, 4, 4)
    torch.testing.assert_close(sinkhorn(logits, 0.5, 0), (logits / 0.5).softmax(-1))


def test_low_temperature_sinkhorn_agrees_with_the_assignment():
    logits = normal(100, 5, 5, dtype=torch.float64)
    orders = torch.tensor(list(permutations(range(5))))
    totals = logits[:, torch.arange(5), orders].sum(-1)
    best, second = totals.topk(2).values.unbind(-1)
    clear = best - second > 0.2  # closer rivals need a lower temperature than float64 sweeps settle at
    assert clear.sum() > 70
    soft = sinkhorn(logits[clear], temperature=0.02, iterations=1000)
    assert soft.amax(-1).min() > 0.9
    assert torch.equal(soft.argmax(-1), orders[totals[clear].argmax(-1)])
    assert torch.equal(soft.argmax(-1), best_assignment(logits[clear]))


def test_extreme_logits_neither_overflow_nor_vanish():
    soft = sinkhorn(normal(2, 8, 8) * 1e4, temperature=1e-3, iterations=5)
    assert soft.isfinite().all()


@pytest.mark.parametrize("iterations", [0, 1, 5])
def test_the_gradient_is_that_of_the_formula(iterations):
    logits = normal(2, 3, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sinkhorn(x, 0.7, iterations), logits)


@pytest.mark.parametrize(("temperature", "iterations"), [(0.0, 5), (-1.0, 5), (float("nan"), 5), (1.0, -1)])
def test_sinkhorn_refuses_settings_without_a_meaning(temperature, iterations):
    with pytest.raises(ValueError, match="temperature above 0 and at least 0 iterations"):
        sinkhorn(torch.zeros(1, 2, 2), temperature, iterations)
