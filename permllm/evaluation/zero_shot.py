"""Zero-shot accuracy on multiple-choice tasks, measured by lm-eval."""

import copy
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from permllm.calibration.texts import TextSource, read_documents
from permllm.evaluation.continuation import continuation_questions
from permllm.evaluation.questions import ZERO_SHOT_TASKS, Question, read_questions
from permllm.lookup import lookup

if TYPE_CHECKING:  # both take seconds to import: the functions below import lm-eval, and transformers only names types here
    from lm_eval.api.task import Task
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Once = Callable[[str, Callable[[], Any]], Any]  # a name and what measures it -> what it comes to
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ZeroShotConfig:
    """Which tasks, and how they are run.

    Attributes:
        tasks: names of `ZERO_SHOT_TASKS`, each with a local file of questions (for continuation, with the passages);
            None for the official data of the hub.
        batch_size: texts, a query with a choice, per forward pass.
        limit: use the first so many questions of each task; None for all.
        per_passage, seed: of `continuation_questions`.

    Raises:
        ValueError: if a task is unknown, or a number makes no sense.
    """

    tasks: Mapping[str, TextSource | None]
    batch_size: int = 8
    limit: int | None = None
    per_passage: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [f"{name} is {value}, but has to be at least 1" for name in ("batch_size", "per_passage") if (value := getattr(self, name)) < 1]
        problems += [f"limit is {self.limit}; a standard error needs two questions"] if self.limit is not None and self.limit < 2 else []
        problems += [problem for name, source in self.tasks.items() for problem in _name_problems(name, source is None)]
        if problems:
            raise ValueError("; ".join(problems))

    def questions(self) -> dict[str, list[Question] | None]:
        """Return the questions of each task, None where they come from the hub.

        Raises:
            ValueError: if files are missing or cannot be used; all of them are named.
        """
        questions, problems = {}, []
        for name, source in self.tasks.items():
            try:
                questions[name] = self._questions(name, source)
            except ValueError as error:
                problems.append(f"zero-shot task {name}: {error}")
        if problems:
            raise ValueError("; ".join(problems))
        return questions

    def _questions(self, name: str, source: TextSource | None) -> list[Question] | None:
        if source is None:
            return None
        if name == "continuation":
            return continuation_questions(read_documents(source), self.per_passage, self.seed)
        return [question for path in source.paths() for question in read_questions(name, path)]

    def check(self) -> None:
        """Refuse what `questions` cannot read, before the long run."""
        self.questions()


def _name_problems(name: str, is_from_hub: bool) -> list[str]:
    try:
        task = lookup(ZERO_SHOT_TASKS, name, "zero-shot task")
    except ValueError as error:
        return [str(error)]
    return [f"the hub has no task {name}; name its files"] if is_from_hub and task.official is None else []


def directly(_: str, measure: Callable[[], Any]) -> Any:
    """Measure, whatever was measured before."""
    return measure()


def zero_shot(
    load: "Callable[[], PreTrainedModel]", tokenizer: "PreTrainedTokenizerBase", config: ZeroShotConfig, once: Once = directly
) -> dict[str, dict[str, float]]:
    """Return the accuracies of each task, one after another; see `accuracies`.

    Args:
        load: returns the model; called before the first task that is measured.
        once: measures a task by its name, or returns what an interrupted run measured.
    """
    questions, model = config.questions(), functools.cache(load)
    _check(questions)

    def measure(name: str) -> dict[str, float]:
        return accuracies(model(), tokenizer, {name: questions[name]}, config.batch_size, config.limit)[name]

    return {name: once(name, functools.partial(measure, name)) for name in questions}


def accuracies(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Mapping[str, Sequence[Question] | None],
    batch_size: int,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """Return how many of each task's questions a model answers right, without an example to learn from.

    A text longer than the model's context loses its beginning, as lm-eval has it; a warning counts them.

    Args:
        model: in any dtype; log-likelihoods are taken in float32.
        tokenizer: left unchanged.
        tasks: the questions of each task, None for the official data of the hub.
        batch_size: texts, a query with a choice, per forward pass.
        limit: use the first so many questions of each task; None for all.

    Returns:
        By task: `acc` and, where the task has it, `acc_norm`, as fractions, each with its standard error `.._stderr`, and the
        number of `questions`. For `acc_norm` log p(choice | query) is divided by the characters of the choice.

    Raises:
        ValueError: if a task is unknown, a task has fewer than two questions, or a choice is longer than the context.
    """
    _check(tasks)
    if not tasks:
        return {}
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    with _quiet():
        lm = HFLM(model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, softmax_dtype="float32")
        loaded = _load(tasks)
        for task in loaded.values():
            task.build_all_requests(limit=limit)
    _check_lengths(lm, loaded)
    with _quiet():
        results = evaluate(lm, {"tasks": loaded}, limit=limit, log_samples=False)
    return {name: _scores(name, results) for name in tasks}


def _check(tasks: Mapping[str, Sequence[Question] | None]) -> None:
    problems = [problem for name, questions in tasks.items() for problem in _name_problems(name, questions is None)]
    few = [name for name, questions in tasks.items() if questions is not None and len(questions) < 2]
    problems += [f"{name} has fewer than two questions, which a standard error needs" for name in few]
    if problems:
        raise ValueError("; ".join(problems))


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide progress bars, and warnings about how lm-eval was called or will cut long texts."""
    levels = {name: logging.getLogger(name).level for name in ("lm_eval", "transformers")}
    try:
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        with redirect_stderr(StringIO()):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _load(tasks: Mapping[str, Sequence[Question] | None]) -> "dict[str, Task]":
    """Build lm-eval's tasks: its own definitions for the hub, a plain one for local questions."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    definitions = Path(lm_eval.__path__[0]) / "tasks"
    folders = {definitions / ZERO_SHOT_TASKS[name].official for name, questions in tasks.items() if questions is None}
    manager = TaskManager(include_path=sorted(folders), include_defaults=False)  # the default index takes ten seconds
    return manager.load([name if questions is None else _definition(name, questions) for name, questions in tasks.items()])["tasks"]


def _definition(name: str, questions: Sequence[Question]) -> dict[str, Any]:
    from datasets import Dataset

    dataset = {"test": Dataset.from_list([asdict(question) for question in questions])}
    return {
        "task": name,
        "custom_dataset": lambda **_: dataset,  # in memory: a file would leave a copy in the cache of `datasets`
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ZERO_SHOT_TASKS[name].metrics.values()],
    }


def _check_lengths(lm: "HFLM", tasks: "Mapping[str, Task]") -> None:
    """Say once per task what lm-eval says once per text, or not at all."""
    for name, task in tasks.items():
        texts = [instance.args for instance in task.instances]
        lengths = [len(tokens) for tokens in lm.tokenizer([query + choice for query, choice in texts], verbose=False)["input_ids"]]
        cut = [choice for (_, choice), length in zip(texts, lengths, strict=True) if length > lm.max_length + 1]  # the last token is not read
        longest = max((len(lm.tok_encode(choice, add_special_tokens=False)) for choice in cut), default=0)
        if longest > lm.max_length:
            raise ValueError(f"{name} has a choice of {longest} tokens, more than the model's context of {lm.max_length}; leave out this task")
        if cut:
            message = "%s: %d of %d texts exceed the model's context of %d tokens and lose their beginning"
            logger.warning(message, name, len(cut), len(texts), lm.max_length)


def _scores(name: str, results: Mapping[str, Any]) -> dict[str, float]:
    """Pick lm-eval's results of a task; `none` is its name for unfiltered answers."""
    values = results["results"][name]
    scores = {}
    for key, metric in ZERO_SHOT_TASKS[name].metrics.items():
        scores |= {key: float(values[f"{metric},none"]), f"{key}_stderr": float(values[f"{metric}_stderr,none"])}
    return {**scores, "questions": results["n-samples"][name]["effective"]}
