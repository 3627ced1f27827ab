"""Whole models: the packed one generates what the masked one generates, and both are timed."""

import torch
from transformers import AutoModelForCausalLM

from permllm.assembly.packed import write_packed
from permllm.assembly.packed_model import load
from permllm.benchmark.decoding import DENSE, PACKED, DecodingConfig, measure_decoding, peak_bytes, random_sparse_model, weight_bytes
from permllm.sparsity.pattern import NMPattern


def test_a_random_sparse_model_is_written_packed_and_measured(tmp_path):
    pattern = NMPattern.parse("2:4")
    name = random_sparse_model(tmp_path / "masked", pattern, torch.float32, layers=2, hidden=256)
    write_packed(tmp_path / "masked", tmp_path / "packed", pattern)
    models = {DENSE: AutoModelForCausalLM.from_pretrained(tmp_path / "masked"), PACKED: load(tmp_path / "packed")}
    rows = measure_decoding(models, name, "2:4", DecodingConfig(prompt_tokens=12, new_tokens=4, rounds=1))
    assert [row["phase"] for row in rows] == ["prefill", "decode"]
    for row in rows:
        assert row["tokens_per_s"] > 0 and row["dense_tokens_per_s"] > 0 and row["same_text"]
        assert row["weight_bytes"] < row["dense_weight_bytes"] == weight_bytes(models[DENSE])
    assert all(peak_bytes(tmp_path / name, "cpu", "float32") > 1e8 for name in ("packed", "masked"))
