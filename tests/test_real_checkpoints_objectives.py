"""On checkpoints by others, permutations learned for a weight update leave less of the gap than the update alone."""

import pytest

from permllm.lcp.recipes import LearnConfig
from permllm.objectives import after, find_permutations
from permllm.pruning.methods import PruningMethod
from permllm.report.summary import DENSE
from permllm.sparsity.pattern import NMPattern

METHOD = PruningMethod("obs", "lcp", "alps")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stories260K-llama", "BabyLlama-tok361"])
def test_permutations_for_an_update_help_it(third_party_subject, name):
    subject, pattern = third_party_subject(name), NMPattern.parse("2:4")
    learn = LearnConfig.from_recipe({"recipe": "refit", "epochs": 6, "sequences": 48, "batch_size": 12})
    permutations = find_permutations(subject, pattern, METHOD, learn)
    alone = subject.perplexity(subject.pruned(pattern, PruningMethod("obs", update="alps")))
    together = subject.perplexity(subject.pruned(pattern, after(METHOD, "alps"), permutations))
    dense = subject.references(pattern)[DENSE]
    print(f"{name}: dense {dense:.4f}, ALPS {alone:.4f}, learned + ALPS {together:.4f}")
    assert dense < together < alone
