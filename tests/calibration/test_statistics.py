import pytest
import torch

from permllm.calibration.statistics import ActivationStats, GramAccumulator


def test_the_gram_matrix_is_the_mean_over_all_tokens_of_all_batches():
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    accumulator = GramAccumulator(8)
    for batch in x.split(7):
        accumulator.add(batch)
    statistics = accumulator.statistics()
    torch.testing.assert_close(statistics.gram.double(), x.double().t() @ x.double() / 60, atol=1e-6, rtol=1e-6)
    assert statistics.tokens == 60


def test_every_leading_dimension_counts_as_tokens():
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    whole, rows = GramAccumulator(4), GramAccumulator(4)
    whole.add(x)
    rows.add(x.flatten(0, 1))
    assert torch.equal(whole.statistics().gram, rows.statistics().gram)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_activations_are_summed_in_float32(dtype):
    x = torch.full((4096, 2), 1.0, dtype=dtype)
    accumulator = GramAccumulator(2)
    for row in x.split(1):
        accumulator.add(row)
    assert accumulator.statistics().gram.tolist() == [[1, 1], [1, 1]]  # a bfloat16 sum would stop at 256


def test_norms_are_root_mean_squares():
    assert ActivationStats(torch.tensor([[4.0, 1.0], [1.0, 9.0]]), 10).norms.tolist() == [2, 3]
