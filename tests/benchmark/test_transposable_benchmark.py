"""The benchmark of transposable masks, on a few blocks."""

import json

import pytest
import torch

from permllm.benchmark.transposable import exact_mask, flow_mask, gaps, main, random_blocks
from permllm.sparsity.pattern import NMPattern


def test_the_reference_is_the_best_mask():
    block = torch.tensor([[9.0, 1, 8, 1], [1, 9, 1, 8], [8, 1, 9, 1], [1, 8, 1, 9]])
    assert torch.equal(exact_mask(block, NMPattern(2, 4)), block > 5)


def test_the_flow_has_the_score_of_the_reference():
    pytest.importorskip("ortools", reason="OR-tools is not installed")
    for text in ("1:4", "2:4", "4:8", "8:16"):
        pattern = NMPattern.parse(text)
        for block in random_blocks(20, pattern.group):
            kept = [float(block[mask].sum()) for mask in (flow_mask(block, pattern), exact_mask(block, pattern))]
            assert kept[0] == pytest.approx(kept[1], abs=pattern.group**2 / 1e6)


def test_no_mask_keeps_more_than_the_reference():
    for text in ("1:4", "2:4", "4:8"):
        pattern = NMPattern.parse(text)
        assert gaps(random_blocks(10, pattern.group), pattern).min() > -1e-9


@pytest.mark.slow
def test_the_command_writes_a_row_for_every_pattern(tmp_path, shipped_model):
    results = tmp_path / "transposable.json"
    main(["--blocks", "5", "--sample", "2", "--width", "64", "--patterns", "2:4", "8:16", "--model", str(shipped_model), "--results", str(results)])
    rows = json.loads(results.read_text())
    assert [row["pattern"] for row in rows] == ["2:4", "8:16"]
    for row in rows:
        assert 0 <= row["mean_gap"] <= row["max_gap"] < 0.05 and {"seconds", "reference_seconds", "command", "versions"} <= row.keys()
        assert row["reference"].startswith("scipy linprog (HiGHS), one block at a time, 2 blocks extrapolated to")
