"""On checkpoints by others, our recipe closes more of the gap that Wanda leaves than the paper's does."""

import pytest

from permllm.ablation import AblationRow, Subject
from permllm.calibration.capture import dense_statistics
from permllm.calibration.samples import CalibrationSet, draw_windows, tokenize
from permllm.calibration.texts import TextSource, read_documents
from permllm.models.families import adapter_of
from permllm.models.loading import ModelSource, load_model, load_tokenizer
from permllm.models.streaming import LoadedModel
from permllm.report.summary import gap_closed
from permllm.sparsity.pattern import NMPattern

LENGTH, SEQUENCES, HELD_OUT = 128, 192, 12


def subject(third_party, name, epochs):
    """Calibrate on the first stories, judge on others."""
    source = ModelSource(str(third_party / "models" / name), device="cpu")
    stories = list(read_documents(TextSource(files=str(third_party / "text/tinystories_sample/stories_clean.jsonl"))).values())
    model, tokenizer = load_model(source), load_tokenizer(source)
    adapter = adapter_of(model)
    samples = draw_windows(tokenize(stories[: len(stories) // 2], tokenizer), SEQUENCES, LENGTH, 0, HELD_OUT)
    statistics = list(dense_statistics(LoadedModel(model, adapter), samples.tokens[samples.training_rows], 16))
    text = tokenize(stories[len(stories) // 2 :], tokenizer)[: 200 * LENGTH]
    assert isinstance(samples, CalibrationSet)
    return Subject(model, adapter, samples, statistics, text, LENGTH, {"epochs": epochs, "sequences": 24, "batch_size": 12})


def measure(subject, recipe, pattern, seed):
    row = AblationRow(subject.model.config.model_type, pattern, "wanda", recipe, seed)
    parsed = NMPattern.parse(pattern)
    permutation = row.config(subject.budget).start if row.is_learned else recipe
    found = subject.run(row, subject.starts(parsed, "wanda", permutation, seed, "free"))["perplexity"]
    return gap_closed({**subject.references(parsed), recipe: found}, recipe)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stories260K-llama", "BabyLlama-tok361"])
def test_the_best_recipe_beats_the_papers_on_checkpoints_by_others(third_party, name):
    judged = subject(third_party, name, epochs=20)
    closed = {recipe: measure(judged, recipe, "2:4", seed=0) for recipe in ("paper", "best")}
    assert closed["best"] > closed["paper"]
