"""A zero-shot task made of plain text: which of four sentences continues a passage?

The wrong answers are real sentences of other passages of the same kind, as long as the right one. They are chosen
without a model.
"""

import random
import re
from collections.abc import Mapping

from permllm.evaluation.questions import Question

CHOICES = 4
# After a full stop, a question or exclamation mark, perhaps a quotation mark; not after a title such as "Mr."
_SENTENCE_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["'”’)]))(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)\s+(?=["'“‘(]?[A-Z0-9])""")


def continuation_questions(
    passages: Mapping[str, str], per_passage: int, seed: int, beginning_words: int = 40, answer_words: int = 8
) -> list[Question]:
    """Make questions whose query is a part of a passage and whose right answer is its next sentence.

    Args:
        passages: by name; the name up to the first underscore is the kind. A title, a blank line, then paragraphs.
        per_passage: questions from each passage.
        seed: of the sentences asked for, of ties between wrong answers and of the order of the choices.
        beginning_words: length of the query, the words just before the answer.
        answer_words: a sentence of fewer words is no choice; "Perhaps he is." follows almost anything.

    Raises:
        ValueError: if a passage has too few sentences, or a kind fewer passages than a question has choices (all of
            them are named), or the passages of a kind repeat each other.
    """
    if per_passage < 1:
        raise ValueError(f"per_passage is {per_passage}; ask at least one question per passage")
    names = sorted(passages)
    sentences = {name: _sentences(passages[name]) for name in names}
    candidates = {name: [sentence for sentence in sentences[name] if len(sentence.split()) >= answer_words] for name in names}
    askable = {name: _askable(sentences[name], beginning_words, answer_words) for name in names}
    _check(askable, per_passage, beginning_words, answer_words)

    generator = random.Random(seed)
    golds = [number % CHOICES for number in range(per_passage * len(names))]
    generator.shuffle(golds)
    questions = []
    for name in names:
        others = {other: candidates[other] for other in names if other != name and _kind(other) == _kind(name)}
        for position in sorted(generator.sample(askable[name], per_passage)):
            answer, gold = sentences[name][position], golds[len(questions)]
            choices = _distractors(answer, others, generator)
            if len(choices) < CHOICES - 1:
                raise ValueError(f"too few other passages of kind {_kind(name)!r} have a sentence unlike {answer!r}; take out repeated passages")
            choices.insert(gold, answer)
            query = " ".join(" ".join(sentences[name][:position]).split()[-beginning_words:])
            questions.append(Question(query, choices, gold))
    return questions


def _kind(name: str) -> str:
    return name.partition("_")[0]


def _sentences(passage: str) -> list[str]:
    """Return the sentences below the title, white space normalised."""
    paragraphs = re.split(r"\n\s*\n", passage.strip())[1:]
    return [" ".join(sentence.split()) for paragraph in paragraphs for sentence in _SENTENCE_END.split(paragraph)]


def _askable(sentences: list[str], beginning_words: int, answer_words: int) -> list[int]:
    """Return the positions of the sentences that are long enough and have a whole query before them."""
    lengths = [len(sentence.split()) for sentence in sentences]
    return [position for position, length in enumerate(lengths) if length >= answer_words and sum(lengths[:position]) >= beginning_words]


def _check(askable: Mapping[str, list[int]], per_passage: int, beginning_words: int, answer_words: int) -> None:
    problems = [
        f"passage {name} has {len(positions)} sentences of at least {answer_words} words with {beginning_words} words before them, "
        f"but per_passage is {per_passage}"
        for name, positions in askable.items()
        if len(positions) < per_passage
    ]
    kinds = [_kind(name) for name in askable]
    problems += [
        f"there are {kinds.count(kind)} passages of kind {kind!r}, but {CHOICES} choices need {CHOICES} passages"
        for kind in sorted(set(kinds))
        if kinds.count(kind) < CHOICES
    ]
    if not askable:
        problems.append("there are no passages")
    if problems:
        raise ValueError("\n".join(problems))


def _distractors(answer: str, others: Mapping[str, list[str]], generator: random.Random) -> list[str]:
    """Return the sentences nearest to the answer in words, each from another passage, in random order."""
    words = len(answer.split())
    pool = [(name, sentence) for name, sentences in others.items() for sentence in sentences if sentence != answer]
    pool.sort(key=lambda entry: (abs(len(entry[1].split()) - words), generator.random()))
    nearest: dict[str, str] = {}
    for name, sentence in pool:
        nearest.setdefault(name, sentence)
    chosen = list(nearest.values())[: CHOICES - 1]
    return generator.sample(chosen, len(chosen))
