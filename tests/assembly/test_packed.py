"""A packed checkpoint is a third smaller, loads as the masked model, and unpacks to it bit for bit."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import permllm
from permllm.assembly.packed import unpack, write_packed
from permllm.assembly.packed_format import same_bits
from permllm.kernels.gathering_norm import GatheringNorm
from permllm.kernels.packed_linear import PackedLinear
from permllm.models.checkpoint_files import CheckpointFiles

NEW_TOKENS = 8


def tensors_of(folder):
    files = CheckpointFiles.find(folder)
    return {shard: dict(files.shard_tensors(shard)) for shard in files.shards}


def assert_equal_checkpoints(first, second):
    tensors, others = tensors_of(first), tensors_of(second)
    assert tensors.keys() == others.keys()
    for shard, held in tensors.items():
        assert held.keys() == others[shard].keys()
        assert all(same_bits(tensor, others[shard][name]) for name, tensor in held.items())
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names if name.suffix == ".json" and "index" not in name.name)


def greedy(model, tokens):
    return model.generate(tokens, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True)


@pytest.mark.parametrize("pattern", ["2:4", "3:8"])
def test_packing_and_unpacking_gives_the_checkpoint_back_and_loading_its_model(family, pattern, write_masked, draw_tokens, tmp_path):
    masked = write_masked(tmp_path, family, pattern)
    write_packed(masked, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    assert_equal_checkpoints(masked, tmp_path / "unpacked")
    tokens, stock, packed = draw_tokens(2, 6), AutoModelForCausalLM.from_pretrained(masked), permllm.load(tmp_path / "packed")
    assert type(packed) is type(stock) and packed.dtype == stock.dtype
    with torch.no_grad():
        torch.testing.assert_close(packed(tokens).logits, stock(tokens).logits, atol=2e-5, rtol=1e-4)
    assert torch.equal(greedy(packed, tokens), greedy(stock, tokens))
