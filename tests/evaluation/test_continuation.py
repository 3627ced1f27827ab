import random
from collections import Counter

import pytest

from permllm.evaluation.continuation import continuation_questions

KINDS = ("a", "b")


def passage(name: str, sentences: int = 14) -> str:
    """Return a passage whose sentences tell where they come from, in two paragraphs below a title."""
    generator = random.Random(name)
    texts = [f"Sentence {number} of {name} {'goes on ' * generator.randint(2, 9)}and ends." for number in range(sentences)]
    return f"Title of {name}\n\n{' '.join(texts[:6])}\n\n{' '.join(texts[6:])}\n"


@pytest.fixture
def passages() -> dict[str, str]:
    return {f"{kind}_{number}": passage(f"{kind}_{number}") for kind in KINDS for number in range(6)}


def source(sentence: str) -> str:
    """Return the name of the passage that a sentence of `passage` comes from."""
    return sentence.split()[3]


def words(text: str) -> int:
    return len(text.split())


def test_the_same_seed_gives_the_same_questions_whatever_the_order_of_the_passages(passages: dict[str, str]):
    questions = continuation_questions(passages, per_passage=3, seed=1)
    assert continuation_questions(dict(reversed(passages.items())), per_passage=3, seed=1) == questions
    assert continuation_questions(passages, per_passage=3, seed=2) != questions


def test_each_passage_asks_as_many_different_questions_as_wanted(passages: dict[str, str]):
    questions = continuation_questions(passages, per_passage=3, seed=0)
    answers = [question.choices[question.gold] for question in questions]
    assert Counter(map(source, answers)) == dict.fromkeys(passages, 3)
    assert len(set(answers)) == len(answers)


def test_the_right_answer_follows_the_query_in_the_passage(passages: dict[str, str]):
    for question in continuation_questions(passages, per_passage=4, seed=0):
        answer = question.choices[question.gold]
        assert f"{question.query} {answer}" in " ".join(passages[source(answer)].split())


def test_wrong_answers_are_sentences_of_three_other_passages_of_the_same_kind(passages: dict[str, str]):
    for question in continuation_questions(passages, per_passage=4, seed=0):
        names = [source(choice) for choice in question.choices]
        assert len(set(names)) == 4
        assert len({name[0] for name in names}) == 1
        assert all(choice in " ".join(passages[name].split()) for name, choice in zip(names, question.choices, strict=True))


def test_wrong_answers_are_as_near_to_the_right_one_in_length_as_any_other_passage_offers(passages: dict[str, str]):
    sentences = {name: [f"{text}." for text in " ".join(whole.split("\n\n", 1)[1].split())[:-1].split(". ")] for name, whole in passages.items()}
    for question in continuation_questions(passages, per_passage=4, seed=0):
        answer = question.choices[question.gold]
        others = [name for name in passages if name[0] == source(answer)[0] and name != source(answer)]
        best = sorted(min(abs(words(sentence) - words(answer)) for sentence in sentences[name]) for name in others)
        assert sorted(abs(words(choice) - words(answer)) for choice in question.choices if choice != answer) == best[:3]


def test_the_right_answer_stands_equally_often_in_each_place(passages: dict[str, str]):
    golds = Counter(question.gold for question in continuation_questions(passages, per_passage=3, seed=0))
    assert golds == dict.fromkeys(range(4), 9)


def test_the_query_has_the_wanted_length_and_short_sentences_are_no_choices(passages: dict[str, str]):
    for question in continuation_questions(passages, per_passage=2, seed=0, beginning_words=25, answer_words=16):
        assert words(question.query) == 25
        assert all(words(choice) >= 16 for choice in question.choices)


def test_a_sentence_does_not_end_at_a_title_or_within_a_quotation_that_goes_on():
    answer = '"I saw Mr. Brown and Mrs. Brown at the old mill!" said the boy.'
    last = [answer, *(f"They all went home again before night number {number} fell." for number in range(3))]
    texts = {f"c_{number}": f"Title\n\nThe wind blew over hill number {number}. {sentence}" for number, sentence in enumerate(last)}
    questions = continuation_questions(texts, per_passage=1, seed=0, beginning_words=5)
    assert questions[0].choices[questions[0].gold] == answer


def test_all_passages_and_kinds_that_are_too_small_are_named(passages: dict[str, str]):
    passages |= {"a_1": passage("a_1", sentences=3), "b_2": "Only a title", "c_1": passage("c_1")}
    with pytest.raises(ValueError, match=r"(?s)a_1 has \d sentences.*b_2 has 0 sentences.*1 passages of kind 'c'"):
        continuation_questions(passages, per_passage=4, seed=0)


def test_passages_that_all_say_the_same_are_refused():
    same = {f"a_{number}": "Title\n\nIt rained. They all went home again before the night fell." for number in range(4)}
    with pytest.raises(ValueError, match="too few other passages of kind 'a' have a sentence unlike 'They all went home"):
        continuation_questions(same, per_passage=1, seed=0, beginning_words=2)


@pytest.mark.parametrize(("per_passage", "message"), [(0, "per_passage is 0"), (1, "no passages")])
def test_questions_about_nothing_are_refused(per_passage: int, message: str):
    with pytest.raises(ValueError, match=message):
        continuation_questions({}, per_passage=per_passage, seed=0)
