"""The benchmark of a training step, on a model that fits a test."""

import json

import pytest
import torch

from permllm.benchmark import lcp
from permllm.benchmark.lcp import Shape, build, peak_memory, time_steps

TINY = Shape(64, 128, 2, 2, 2, 16, torch.float32)
CPU = torch.device("cpu")


@pytest.mark.parametrize("variant", lcp.VARIANTS)
@pytest.mark.parametrize("recompute", [False, True])
def test_every_variant_makes_a_step(variant, recompute):
    shape = Shape(*vars(TINY).values()) if not recompute else Shape(**{**vars(TINY), "recompute": True})
    bench = build(shape, CPU, variant)
    bench.step()
    if bench.round:
        bench.round()


def test_the_papers_algebra_has_the_output_of_ours():
    """Both prune by magnitude in the order that their logits say; from equal ones they put out the same."""
    linear = torch.nn.Linear(128, 8, bias=False).requires_grad_(False)
    dense = lcp.DenseLinear(linear, linear.weight.abs(), torch.nn.Parameter(torch.eye(64).expand(2, 64, 64).clone()))
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    mask = lcp.nm_mask(linear.weight.abs(), lcp.PATTERN)
    torch.testing.assert_close(dense(x), x @ (linear.weight * mask).t())


def test_every_variant_is_timed_as_often_as_asked():
    times = time_steps(TINY, CPU, lcp.VARIANTS, steps=2)
    assert {variant: len(of) for variant, of in times.items()} == {**dict.fromkeys(lcp.VARIANTS, 2), "round": 1}


def test_the_peak_holds_at_least_the_weights():
    found = peak_memory(TINY, CPU, "ours")
    assert found["weight_bytes"] == 4 * 2 * (4 * 64 * 64 + 3 * 64 * 128) < found["peak_bytes"]


@pytest.mark.slow
def test_the_command_replaces_the_row_of_its_shape_and_device(tmp_path, monkeypatch):
    monkeypatch.setitem(lcp.SHAPES, "small", TINY)
    monkeypatch.setattr(lcp, "_in_own_process", lambda name, device, variant: {"weight_bytes": 100, "peak_bytes": 120 if variant == "ours" else 110})
    results = tmp_path / "lcp.json"
    for _ in range(2):
        lcp.main(["--steps", "1", "--device", "cpu", "--results", str(results)])
    (row,) = json.loads(results.read_text())
    assert row["extra_memory_fraction"] == 0.1
    assert {"plain_ms", "paper_ms", "ours_ms", "guided_ms", "round_ms", "ratio_ours_plain", "overhead_ratio", "command", "versions"} <= row.keys()
