from itertools import permutations

import pytest
import torch

from permllm.permutation.assignment import best_assignment


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6])
def test_no_permutation_gains_more_than_the_assignment(size):
    gain = torch.randn(4, size, size, generator=torch.Generator().manual_seed(size))
    columns = best_assignment(gain)
    rows = torch.arange(size)
    orders = torch.tensor(list(permutations(range(size))))
    for matrix, chosen in zip(gain, columns, strict=True):
        torch.testing.assert_close(matrix[rows, chosen].sum(), matrix[rows, orders].sum(-1).max())


def test_every_row_takes_its_own_column():
    columns = best_assignment(torch.randn(8, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert columns.dtype == torch.int64
    assert torch.equal(columns.sort(dim=1).values, torch.arange(16).expand(8, 16))


def test_row_i_takes_column_j_where_the_gain_at_i_j_is_highest():
    assert best_assignment(torch.tensor([[[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]])).tolist() == [[1, 2, 0]]


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_gains_that_are_not_finite_are_refused(broken):
    gain = torch.zeros(2, 3, 3)
    gain[1, 2, 0] = broken
    with pytest.raises(ValueError, match="must be finite"):
        best_assignment(gain)
