"""Multiple-choice questions, and the zero-shot tasks whose local files they are read from.

A local file gives the prompts of lm-eval's own task, as far as its rows hold what they are made of (see `ZERO_SHOT_TASKS`).
"""

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from permllm.lookup import lookup

LISTED_PROBLEMS = 5  # of one file; a file in another layout is wrong in every row


@dataclass(frozen=True)
class Question:
    """A text with several possible continuations, one of them right.

    Attributes:
        query: the text; a space separates it from the choice.
        choices: two or more.
        gold: index of the right choice.

    Raises:
        ValueError: if there is nothing to choose, or `gold` is no index of a choice.
    """

    query: str
    choices: Sequence[str]
    gold: int

    def __post_init__(self) -> None:
        if not isinstance(self.query, str) or not self.query.strip():
            raise ValueError(f"the query has to be a text, not {self.query!r}")
        if isinstance(self.choices, str) or len(self.choices) < 2 or not all(isinstance(choice, str) and choice.strip() for choice in self.choices):
            raise ValueError(f"the choices have to be two or more texts, not {self.choices!r}")
        if type(self.gold) is not int or not 0 <= self.gold < len(self.choices):
            raise ValueError(f"gold has to be one of 0..{len(self.choices) - 1}, not {self.gold!r}")


@dataclass(frozen=True)
class ZeroShotTask:
    """How a task is read and scored.

    Attributes:
        question: makes the question of a local file's row.
        official: folder of lm-eval's definition below `lm_eval/tasks`, None if lm-eval has no such task.
        metrics: what is reported, and lm-eval's name for it.
    """

    question: Callable[[dict], Question]
    official: str | None = None
    metrics: Mapping[str, str] = field(default_factory=lambda: {"acc": "acc", "acc_norm": "acc_norm"})


def _plain(row: dict) -> Question:
    return Question(row["query"], row["choices"], row["gold"])


def _arc(row: dict) -> Question:
    return Question(f"Question: {row['query'].removeprefix('Question: ')}\nAnswer:", row["choices"], row["gold"])


def _rte(row: dict) -> Question:
    return Question(f"{row['sentence1']}\nQuestion: {row['sentence2']} True or False?\nAnswer:", ("True", "False"), int(row["label"]))


def _hellaswag(row: dict) -> Question:
    """Make the official prompt but for its activity label, which these rows lack."""
    query = row["question"]
    first, stop, second = query.rpartition(". ")
    if not query.rstrip().endswith("."):  # captions stop within a sentence; lm-eval capitalises what there is of it
        query = first + stop + second.capitalize()
    letters = sorted(row["choices"])
    return Question(_clean(query).lstrip(), [_clean(row["choices"][letter]) for letter in letters], letters.index(row["answer"]))


def _clean(text: str) -> str:
    """Remove WikiHow's marks as lm-eval's `hellaswag/utils.py` does."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


ZERO_SHOT_TASKS = {
    "hellaswag": ZeroShotTask(_hellaswag, "hellaswag"),
    "arc_easy": ZeroShotTask(_arc, "arc"),
    "arc_challenge": ZeroShotTask(_arc, "arc"),
    "openbookqa": ZeroShotTask(_plain, "openbookqa"),
    "rte": ZeroShotTask(_rte, "glue/rte", metrics={"acc": "acc"}),
    # log p(choice | query) alone mostly tells common sentences from rare ones, so log p(choice) is subtracted
    "continuation": ZeroShotTask(_plain, metrics={"acc": "acc_mutual_info"}),
}


def read_questions(name: str, path: Path) -> list[Question]:
    """Read the questions of a task from a local file.

    Args:
        name: of the task.
        path: `.jsonl`, `.json` with a list under "test", `.tsv` with a header, or `.parquet`.

    Raises:
        ValueError: if the task or the kind of file is unknown, the file is missing, or rows are malformed; they are named.
    """
    task = lookup(ZERO_SHOT_TASKS, name, "zero-shot task")
    rows = lookup(_ROWS, path.suffix, f"kind of file ({path})")
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    questions, problems = [], []
    for place, row in rows(path):
        try:
            questions.append(task.question(json.loads(row) if isinstance(row, str) else row))
        except KeyError as error:
            problems.append(f"{place} has no {error}")
        except (ValueError, TypeError, AttributeError) as error:
            problems.append(f"{place}: {error}")
    if problems:
        more = f"; and {len(problems) - LISTED_PROBLEMS} more" if len(problems) > LISTED_PROBLEMS else ""
        raise ValueError(f"{path} has malformed rows: " + "; ".join(problems[:LISTED_PROBLEMS]) + more)
    if not questions:
        raise ValueError(f"{path} holds no question")
    return questions


def _json_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Leave the parsing to the reader of rows, so that it can name all broken lines."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        yield f"line {number}", line


def _json_test_list(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["test"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path} is not a JSON object with a list under "test" ({error!r})') from error
    yield from ((f"test row {number}", row) for number, row in enumerate(rows, start=1))


def _tab_separated(path: Path) -> Iterator[tuple[str, dict]]:
    with path.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines, delimiter="\t")
        yield from ((f"line {reader.line_num}", row) for row in reader)


def _parquet(path: Path) -> Iterator[tuple[str, dict]]:
    from pyarrow.parquet import read_table  # slow to import

    yield from ((f"row {number}", row) for number, row in enumerate(read_table(path).to_pylist(), start=1))


_ROWS = {".jsonl": _json_lines, ".json": _json_test_list, ".tsv": _tab_separated, ".parquet": _parquet}
