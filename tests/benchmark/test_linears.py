"""The benchmark times what the machine can run, proves that it computes the masked product, and says why it cannot run the rest."""

import pytest
import torch

from permllm.benchmark import linears
from permllm.benchmark.linears import BenchmarkConfig, measure_linears
from permllm.kernels import cpu_matvec
from permllm.kernels.channel_gather import gather_channels, multiply_by_matrix
from permllm.kernels.semi_structured import pack_semi_structured, why_unavailable
from permllm.permutation.permutation import Permutation
from permllm.sparsity.mask import nm_mask
from permllm.sparsity.pattern import NMPattern

TWO_OF_FOUR, CPU = NMPattern.parse("2:4"), torch.device("cpu")
SCHEMA = {"device", "kernel", "out", "in", "tokens", "pattern", "dtype", "ms", "dense_ms", "speedup", "permutation_ms"}


@pytest.fixture(autouse=True)
def small_copies(monkeypatch):
    monkeypatch.setattr(linears, "ROTATED_BYTES", 2**16)


def measured(tokens=(1, 16), dtype=torch.float32, pattern=TWO_OF_FOUR, **settings):
    return list(measure_linears({(64, 128): 3}, pattern, dtype, CPU, BenchmarkConfig(tokens, 0.001, **settings)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_is_timed_or_excused(dtype):
    rows = measured(dtype=dtype)
    has_kernel = cpu_matvec.why_unavailable(CPU, dtype) is None
    packed = ["packed", "packed+gather"] if has_kernel else ["packed"]
    expected = [
        (kernel, tokens)
        for tokens in (1, 16)
        for kernel in (
            "dense",
            "masked",
            "gather",
            "permutation_matrix",
            *["dense_matvec"] * (has_kernel and tokens == 1),
            *packed,
            "semi_structured",
        )
    ]
    assert [(row["kernel"], row["tokens"]) for row in rows] == expected
    for row in rows:
        assert row.keys() >= SCHEMA and (row["out"], row["in"], row["linears"]) == (64, 128, 3)
        assert (row["ms"] is None) == (row["unavailable"] is not None)
        if row["ms"] is not None:
            assert 0 < row["lower_ms"] <= row["ms"] <= row["upper_ms"]
    by_kernel = {row["kernel"]: row for row in rows if row["tokens"] == 1}
    assert by_kernel["dense"]["speedup"] == 1.0 and by_kernel["dense"]["memory_bytes"] == 64 * 128 * dtype.itemsize
    assert by_kernel["gather"]["speedup"] is None
    assert "CUDA" in by_kernel["semi_structured"]["unavailable"]
    if has_kernel:
        assert by_kernel["packed"]["memory_bytes"] == 64 * 128 * dtype.itemsize / 2 + 64 * 128 / 8
        assert by_kernel["packed+gather"]["permutation_ms"] == by_kernel["gather"]["ms"]
        assert by_kernel["packed"]["runs"].startswith("cpu_matvec, ") and by_kernel["dense"]["runs"] == "PyTorch"


def test_a_kernel_that_computes_something_else_stops_the_benchmark(monkeypatch):
    original = cpu_matvec.matvec
    monkeypatch.setattr(cpu_matvec, "matvec", lambda *arguments: original(*arguments) * 1.01)
    if cpu_matvec.why_unavailable(CPU, torch.float32) is not None:
        pytest.skip("needs a C compiler")
    with pytest.raises(ArithmeticError, match=r"packed of shape \(64, 128\) and 1 tokens is off by 0.01"):
        measured()


def test_copies_of_a_weight_take_turns(monkeypatch):
    used = []
    original = linears.linear
    monkeypatch.setattr(linears, "linear", lambda x, weight: used.append(weight.data_ptr()) or original(x, weight))
    monkeypatch.setattr(linears, "ROTATED_BYTES", 3 * 64 * 128 * 4)
    measured(tokens=(16,))
    assert len(set(used)) >= 6  # three of the dense and three of the masked weight


@pytest.mark.slow
def test_the_dense_product_compiled_is_measured_too_and_the_faster_one_counts():
    rows = {row["kernel"]: row for row in measured(tokens=(1,), compile=True)}
    assert rows["packed"]["dense_ms"] == min(rows["dense"]["ms"], rows["dense_compiled"]["ms"])


def test_a_gather_is_the_product_with_the_permutation_matrix():
    permutation = Permutation.random(64, torch.Generator().manual_seed(0))
    x = torch.randn(5, 64)
    torch.testing.assert_close(gather_channels(x, permutation), multiply_by_matrix(x, permutation.matrix()))


@pytest.mark.parametrize(
    ("pattern", "dtype", "said"),
    [("4:8", torch.bfloat16, "run 2:4, not 4:8"), ("2:4", torch.bfloat16, "CUDA device, not cpu")],
)
def test_what_sparse_tensor_cores_cannot_run_has_a_reason(pattern, dtype, said):
    assert said in why_unavailable(CPU, dtype, NMPattern.parse(pattern), 64, 64)


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_kernel_of_a_gpu_is_measured():
    rows = list(measure_linears({(256, 512): 1}, TWO_OF_FOUR, torch.bfloat16, torch.device("cuda"), BenchmarkConfig((1, 64), 0.01)))
    assert {"packed", "packed+gather", "semi_structured+gather"} <= {row["kernel"] for row in rows if row["ms"] is not None}


def test_settings_that_measure_nothing_are_refused():
    with pytest.raises(ValueError, match="token counts of 1 or more"):
        BenchmarkConfig((0,), 0.1)
