import pytest
import torch
from transformers import AutoModelForCausalLM

from permllm.assembly import folded
from permllm.assembly.checkpoint import VerificationError
from permllm.assembly.folded import write_folded_checkpoint
from permllm.models.families import adapter_of
from permllm.sparsity.mask import is_nm_sparse
from permllm.sparsity.pattern import NMPattern


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_a_folded_checkpoint_loads_alone_is_sparse_as_it_lies_and_says_the_same(write_masked, family, tmp_path, draw_tokens, shard):
    masked = write_masked(tmp_path, family, layout="foldable", shard=shard)
    measured = write_folded_checkpoint(masked, tmp_path / "folded")
    assert measured["folding_error"] < 1e-5
    model, before = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (tmp_path / "folded", masked))
    adapter, tokens = adapter_of(model), draw_tokens(2, 24)
    assert all(is_nm_sparse(linear.weight, NMPattern(2, 4)) for layer in adapter.layers(model) for linear in adapter.linears(layer).values())
    assert not all(is_nm_sparse(linear.weight, NMPattern(2, 4)) for layer in adapter.layers(before) for linear in adapter.linears(layer).values())
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, before(tokens).logits, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "folded" / "config.json").read_bytes() == (masked / "config.json").read_bytes()


def test_orders_that_need_a_gather_are_named_and_nothing_is_written(write_masked, tmp_path):
    masked = write_masked(tmp_path, "llama")
    with pytest.raises(ValueError, match=r"cannot be folded: model.layers.0 attention_in, model.layers.0 .*prune it under layout foldable"):
        write_folded_checkpoint(masked, tmp_path / "folded")
    assert not (tmp_path / "folded").exists()


def test_the_gate_refuses_a_folding_that_changes_the_logits_before_anything_is_written(write_masked, tmp_path, monkeypatch):
    masked = write_masked(tmp_path, "llama", layout="foldable")

    def forget_a_norm(model, folding):
        return original(model, type(folding)({name: order for name, order in folding.rows.items() if "input_layernorm" not in name}, folding.columns))

    original = folded.folding_error
    monkeypatch.setattr(folded, "folding_error", forget_a_norm)
    with pytest.raises(VerificationError, match="would change its logits by"):
        write_folded_checkpoint(masked, tmp_path / "folded")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "masked", "pruning"]
