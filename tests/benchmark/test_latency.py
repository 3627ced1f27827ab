"""The benchmark times what the machine can run and says why it cannot run the rest."""

import pytest
import torch

from permllm.benchmark.latency import BenchmarkConfig, measure_linears
from permllm.kernels.channel_gather import gather_channels, multiply_by_matrix
from permllm.kernels.semi_structured import pack_semi_structured, why_unavailable
from permllm.permutation.permutation import Permutation
from permllm.sparsity.mask import nm_mask
from permllm.sparsity.pattern import NMPattern

TWO_OF_FOUR = NMPattern.parse("2:4")


def test_every_kernel_is_timed_or_excused():
    rows = list(measure_linears({(64, 128): 3}, TWO_OF_FOUR, torch.float32, torch.device("cpu"), BenchmarkConfig((1, 4), 0.001)))
    assert [(row["kernel"], row["tokens"]) for row in rows] == [
        (kernel, tokens) for tokens in (1, 4) for kernel in ("dense", "masked", "gather", "permutation_matrix", "semi_structured")
    ]
    for row in rows:
        if row["kernel"] == "semi_structured":
            assert row["latency_ms"] is None and "CUDA" in row["unavailable"]
        else:
            assert 0 < row["lower_ms"] <= row["latency_ms"] <= row["upper_ms"]
    assert rows[0]["speedup"] == 1.0 and rows[0]["linears"] == 3 and rows[0]["memory_bytes"] == 64 * 128 * 4


def test_a_gather_is_the_product_with_the_permutation_matrix():
    permutation = Permutation.random(64, torch.Generator().manual_seed(0))
    x = torch.randn(5, 64)
    torch.testing.assert_close(gather_channels(x, permutation), multiply_by_matrix(x, permutation.matrix()))


@pytest.mark.parametrize(
    ("pattern", "dtype", "said"),
    [("4:8", torch.bfloat16, "run 2:4, not 4:8"), ("2:4", torch.bfloat16, "CUDA device, not cpu")],
)
def test_what_sparse_tensor_cores_cannot_run_has_a_reason(pattern, dtype, said):
    assert said in why_unavailable(torch.device("cpu"), dtype, NMPattern.parse(pattern), 64, 64)


def test_packing_refuses_a_weight_that_would_lose_values():
    with pytest.raises(ValueError, match="not 2:4"):
        pack_semi_structured(torch.ones(32, 64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device with sparse tensor cores")
def test_sparse_tensor_cores_compute_the_masked_product():
    weight = torch.randn(128, 128, device="cuda", dtype=torch.bfloat16)
    weight = weight * nm_mask(weight.abs(), TWO_OF_FOUR)
    x = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16)
    torch.testing.assert_close(torch.nn.functional.linear(x, pack_semi_structured(weight)), torch.nn.functional.linear(x, weight))


def test_settings_that_measure_nothing_are_refused():
    with pytest.raises(ValueError, match="token counts of 1 or more"):
        BenchmarkConfig((0,), 0.1)
