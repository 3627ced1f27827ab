import json
import logging
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from permllm.calibration.texts import TextSource
from permllm.evaluation.questions import Question
from permllm.evaluation.zero_shot import ZeroShotConfig, accuracies, zero_shot

EOS = 1  # of the tiny tokenizer: what an unconditional text starts with


@pytest.fixture
def model(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny_model("llama", max_position_embeddings=128)


@pytest.fixture
def questions() -> list[Question]:
    """Random words, the choices of different lengths."""
    generator = random.Random(0)

    def text(words: int) -> str:
        return " ".join("".join(generator.choices("abcdefgh", k=3)) for _ in range(words))

    return [Question(text(5), [text(generator.randint(1, 4)) for _ in range(4)], number % 4) for number in range(12)]


def log_likelihood(model: PreTrainedModel, tokens: list[int], given: int) -> float:
    """Return log p of all tokens after the first `given`, summed one by one."""
    log_probabilities = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return sum(float(log_probabilities[position - 1, tokens[position]]) for position in range(given, len(tokens)))


def conditional(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, question: Question) -> list[float]:
    query = tokenizer.encode(question.query)
    return [log_likelihood(model, query + tokenizer.encode(f" {choice}"), len(query)) for choice in question.choices]


def unconditional(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, question: Question) -> list[float]:
    return [log_likelihood(model, [EOS, *tokenizer.encode(f" {choice}")], 1) for choice in question.choices]


def accuracy(scores: list[list[float]], questions: list[Question]) -> float:
    return sum(row.index(max(row)) == question.gold for row, question in zip(scores, questions, strict=True)) / len(questions)


def test_accuracies_are_those_of_log_likelihoods_summed_by_hand(
    model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, questions: list[Question]
):
    sums = [conditional(model, tiny_tokenizer, question) for question in questions]
    per_character = [
        [score / len(choice) for score, choice in zip(row, question.choices, strict=True)] for row, question in zip(sums, questions, strict=True)
    ]
    acc, acc_norm = accuracy(sums, questions), accuracy(per_character, questions)
    assert 0 < acc < 1 and acc != acc_norm
    raw = {"acc": acc, "acc_stderr": math.sqrt(acc * (1 - acc) / 11)}
    normalised = {"acc_norm": acc_norm, "acc_norm_stderr": math.sqrt(acc_norm * (1 - acc_norm) / 11)}

    result = accuracies(model, tiny_tokenizer, {"openbookqa": questions, "rte": questions}, batch_size=5)

    assert result["openbookqa"] == pytest.approx({**raw, **normalised, "questions": 12})
    assert result["rte"] == pytest.approx({**raw, "questions": 12})


def test_continuation_is_scored_by_what_the_query_adds(model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, questions: list[Question]):
    given = [conditional(model, tiny_tokenizer, question) for question in questions]
    alone = [unconditional(model, tiny_tokenizer, question) for question in questions]
    gains = [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(given, alone, strict=True)]
    assert accuracy(gains, questions) != accuracy(given, questions)
    result = accuracies(model, tiny_tokenizer, {"continuation": questions}, batch_size=5)
    assert result["continuation"]["acc"] == accuracy(gains, questions)


def test_the_order_of_the_choices_does_not_matter(model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, questions: list[Question]):
    turned = [Question(question.query, question.choices[::-1], 3 - question.gold) for question in questions]
    assert accuracies(model, tiny_tokenizer, {"arc_easy": turned}, 8) == accuracies(model, tiny_tokenizer, {"arc_easy": questions}, 8)


def test_limit_takes_the_first_questions(model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, questions: list[Question]):
    limited = accuracies(model, tiny_tokenizer, {"arc_easy": questions}, batch_size=8, limit=5)
    assert limited == accuracies(model, tiny_tokenizer, {"arc_easy": questions[:5]}, batch_size=8)
    assert limited["arc_easy"]["questions"] == 5


def test_nothing_is_printed_and_the_tokenizer_and_the_random_state_stay(
    model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, questions: list[Question], capfd: pytest.CaptureFixture[str]
):
    random_state = torch.get_rng_state()
    tiny_tokenizer.pad_token = None
    accuracies(model, tiny_tokenizer, {"arc_easy": questions}, batch_size=8)
    assert capfd.readouterr() == ("", "")
    assert tiny_tokenizer.pad_token is None
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_text_longer_than_the_context_loses_its_beginning_with_one_warning(
    model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, questions: list[Question], caplog: pytest.LogCaptureFixture
):
    long = [Question("x" * 200 + question.query, question.choices, question.gold) for question in questions]
    with caplog.at_level(logging.WARNING):
        result = accuracies(model, tiny_tokenizer, {"arc_easy": long}, batch_size=8)
    context = model.config.max_position_embeddings

    def cut(question: Question) -> list[float]:
        texts = [tiny_tokenizer.encode(f"{question.query} {choice}")[-(context + 1) :] for choice in question.choices]
        return [log_likelihood(model, text, len(text) - len(choice) - 1) for text, choice in zip(texts, question.choices, strict=True)]

    assert result["arc_easy"]["acc"] == accuracy([cut(question) for question in long], long)
    assert [record.getMessage() for record in caplog.records] == [
        "arc_easy: 48 of 48 texts exceed the model's context of 128 tokens and lose their beginning"
    ]


def test_a_choice_longer_than_the_context_is_refused(model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, questions: list[Question]):
    with pytest.raises(ValueError, match="arc_easy has a choice of 131 tokens, more than the model's context of 128"):
        accuracies(model, tiny_tokenizer, {"arc_easy": [*questions, Question("Why?", ["x" * 130, "y"], 0)]}, batch_size=8)


ROWS = {  # the same questions as a local file holds them and as the hub does
    "arc_easy": (
        {"query": "Question: Which is hot?", "choices": ["ice", "fire"], "gold": 1},
        {"question": "Which is hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"},
    ),
    "openbookqa": (
        {"query": "Fog is found in", "choices": ["a marsh", "a desert"], "gold": 0},
        {"question_stem": "Fog is found in", "choices": {"text": ["a marsh", "a desert"], "label": ["A", "B"]}, "answerKey": "A"},
    ),
    "rte": (
        {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0},
        {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0},
    ),
    "hellaswag": (
        {"question": "[header] A man saws. he", "choices": {"A": "sits [title] down.", "B": "runs."}, "answer": "B"},
        {"activity_label": "Sawing", "ctx_a": "[header] A man saws.", "ctx_b": "he", "endings": ["sits [title] down.", "runs."], "label": "1"},
    ),
}
ROWS["arc_challenge"] = ROWS["arc_easy"]


@pytest.mark.parametrize("task", ROWS)
def test_a_local_file_is_scored_like_the_official_data(
    task: str, model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from datasets import Dataset, DatasetDict

    local, official = ROWS[task]
    (tmp_path / "rows.json").write_text(json.dumps({"test": [local] * 2}))
    splits = DatasetDict({split: Dataset.from_list([official] * 2) for split in ("train", "validation", "test")})
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: splits)
    read: list[str] = []
    model.register_forward_pre_hook(lambda _, inputs: read.extend(tiny_tokenizer.batch_decode(inputs[0])))

    from_file = zero_shot(lambda: model, tiny_tokenizer, ZeroShotConfig({task: TextSource(str(tmp_path / "rows.json"))}, batch_size=1))
    texts_of_file, read[:] = list(read), []
    from_hub = zero_shot(lambda: model, tiny_tokenizer, ZeroShotConfig({task: None}, batch_size=1))

    assert from_file == from_hub
    assert read == [f"Sawing: {text.lstrip()}" if task == "hellaswag" else text for text in texts_of_file]


def test_files_are_checked_together_before_anything_runs(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    config = ZeroShotConfig({"arc_easy": TextSource("missing/*.jsonl"), "rte": TextSource(str(tmp_path / "rows.jsonl")), "openbookqa": None})
    with pytest.raises(ValueError, match=r"task arc_easy: no text file matches 'missing/\*.jsonl'.*task rte: .*line 1 has no 'sentence1'"):
        config.check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": {"arc": None, "helaswag": None}}, "unknown zero-shot task 'arc'.*did you mean 'hellaswag'"),
        ({"tasks": {"continuation": None}}, "the hub has no task continuation; name its files"),
        ({"tasks": {}, "batch_size": 0, "per_passage": 0, "limit": 1}, "batch_size is 0.*per_passage is 0.*limit is 1"),
    ],
)
def test_wrong_settings_are_refused_all_at_once(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ZeroShotConfig(**settings)


def test_a_single_question_is_refused(model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, questions: list[Question]):
    with pytest.raises(ValueError, match="arc_easy has fewer than two questions, which a standard error needs"):
        accuracies(model, tiny_tokenizer, {"arc_easy": questions[:1]}, batch_size=8)


def test_no_tasks_give_no_results(model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast):
    assert zero_shot(lambda: model, tiny_tokenizer, ZeroShotConfig({})) == {}


def test_the_shipped_model_continues_passages_far_better_than_chance(shipped_model: Path, repository: Path):
    config = ZeroShotConfig({"continuation": TextSource(str(repository / "data/prose/*_*[02468].txt"))}, batch_size=16, per_passage=1)
    model = AutoModelForCausalLM.from_pretrained(shipped_model, dtype=torch.float32)
    result = zero_shot(lambda: model, AutoTokenizer.from_pretrained(shipped_model), config)["continuation"]
    assert result["questions"] == 54
    assert result["acc"] >= 0.35  # chance is 0.25
