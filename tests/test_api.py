"""Pruning a loaded model in one call."""

import pytest
import torch

import permllm
from permllm.lcp.recipes import LearnConfig
from permllm.models.families import adapter_of
from permllm.sparsity.mask import is_nm_sparse
from permllm.sparsity.pattern import NMPattern

TEXTS = ["The quick brown fox jumps over the lazy dog. " * 40]
SETTINGS = {"sequences": 8, "length": 32, "batch_size": 4}


@pytest.mark.parametrize(("permutation", "update"), [("identity", None), ("cp", None), ("cp", "sparsegpt"), ("lcp", None), ("lcp", "sparsegpt")])
def test_every_target_becomes_nm_sparse_in_its_order(model, tiny_tokenizer, permutation, update):
    learn = LearnConfig(block_size=16, epochs=1, batch_size=4)
    result = permllm.prune(model, tiny_tokenizer, TEXTS, "2:4", "wanda", permutation, update, learn=learn, **SETTINGS)
    paths = list(adapter_of(model).paths(3))
    assert sorted(result.permutations) == sorted(paths)
    for path in paths:
        weight = result.model.get_submodule(path).weight
        assert is_nm_sparse(result.permutations[path].apply(weight), NMPattern.parse("2:4"))
        assert (weight == 0).float().mean() == 0.5
    assert bool(result.history) == (permutation == "lcp")


def test_transposable_masks_come_with_the_orders_of_their_rows(model, tiny_tokenizer):
    result = permllm.prune(model, tiny_tokenizer, TEXTS, "2:4", permutation="cp", transposable=True, **SETTINGS)
    assert sorted(result.rows) == sorted(result.permutations)
    for path, rows in result.rows.items():
        weight = result.model.get_submodule(path).weight
        assert is_nm_sparse(rows.apply(weight, 0).t(), NMPattern.parse("2:4"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"pattern": "5:7"}, "multiples of 7"),
        ({"score": "wnda"}, "unknown score 'wnda'"),
        ({"permutation": "lcp", "learn": LearnConfig(block_size=26)}, "block_size 26 is not a multiple"),
        ({"length": 65}, "length is 65 tokens"),
        ({"sequences": 1000}, "too few for 1000 sequences"),
    ],
)
def test_bad_arguments_leave_the_model_as_it_was(llama, tiny_tokenizer, arguments, said):
    before = {name: parameter.clone() for name, parameter in llama.named_parameters()}
    with pytest.raises(ValueError, match=said):
        permllm.prune(llama, tiny_tokenizer, TEXTS, **{"permutation": "cp", **SETTINGS, **arguments})
    assert all(torch.equal(parameter, before[name]) for name, parameter in llama.named_parameters())
