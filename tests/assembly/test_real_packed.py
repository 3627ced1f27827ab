"""Checkpoints trained by others pack, load, audit and unpack; their widths are awkward, and one learns its positions."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import permllm
from permllm.assembly.audit import audit
from permllm.assembly.packed import unpack, write_packed
from permllm.models.loading import ModelSource, load_tokenizer

NEW_TOKENS = 12  # the shortest context has 32


@pytest.mark.parametrize("name", ["stories260K-llama", "BabyLlama-tok361", "TinyStoriesGPT-char-opt"])
def test_a_real_checkpoint_is_packed_and_answers_alike(name, prune_real, tmp_path):
    masked = prune_real(tmp_path, name)
    write_packed(masked, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    for folder in ("masked", "packed", "unpacked"):
        assert audit(tmp_path / folder, tmp_path / "dense").sparsity == {"2:4": pytest.approx(0.5, abs=1e-3)}
    packed, stock = permllm.load(tmp_path / "packed"), AutoModelForCausalLM.from_pretrained(masked).eval()
    tokens = load_tokenizer(ModelSource(str(tmp_path / "packed")))("Once upon a time", return_tensors="pt").input_ids
    answers = [model.generate(tokens, max_new_tokens=NEW_TOKENS, do_sample=False) for model in (packed, stock)]
    assert torch.equal(*answers)
    with torch.no_grad():
        torch.testing.assert_close(packed(answers[0]).logits, stock(answers[0]).logits, atol=2e-4, rtol=1e-4)
