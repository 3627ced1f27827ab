"""On checkpoints by others, our recipe closes more of the gap that Wanda leaves than the paper's does."""

import pytest

from permllm.ablation import AblationRow, run_row
from permllm.report.summary import gap_closed
from permllm.sparsity.pattern import NMPattern

BUDGET = {"epochs": 20, "sequences": 24, "batch_size": 12}


def measure(subject, recipe, pattern, seed):
    row, parsed = AblationRow(subject.model.config.model_type, pattern, "wanda", recipe, seed), NMPattern.parse(pattern)
    starts = subject.starts(parsed, "wanda", row.config(BUDGET).start, seed, "free")
    return gap_closed({**subject.references(parsed), recipe: run_row(subject, row, BUDGET, starts)["perplexity"]}, recipe)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stories260K-llama", "BabyLlama-tok361"])
def test_the_best_recipe_beats_the_papers_on_checkpoints_by_others(third_party_subject, name):
    subject = third_party_subject(name)
    closed = {recipe: measure(subject, recipe, "2:4", seed=0) for recipe in ("paper", "best")}
    assert closed["best"] > closed["paper"]
