"""What the commands of all stages share: arguments, parameters, the log, progress, the metrics file, and no orphans."""

import argparse
import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self, TypeVar

from torch.distributed import is_torchelastic_launched
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from flows.paths import Setting
from flows.processes import die_with_dvc
from permllm.artifacts import write_json
from permllm.batches import logger as batch_logger
from permllm.params import Params
from permllm.scratch import alone_in

Item = TypeVar("Item")
StageFunction = Callable[[Params, Setting], dict[str, Any] | None]
logger = logging.getLogger("permllm")


def run_stage(name: str, stage: StageFunction, arguments: tuple[str, ...], argv: list[str] | None = None) -> None:
    """Run one stage as a command, and write what it measured to its metrics file, if it is one of a model.

    What compares models has none: `report` depends on all of data/metrics, and would be out of date with its own or a study's.
    Only one process may be at a setting. What a stage keeps of its work goes away when the metrics file is written, not before.

    Args:
        name: of the stage; the same word in params.yaml, dvc.yaml and below data/.
        stage: returns what it measured; None in a process that leaves the files to another one.
        arguments: which of model, pattern and method the command takes.
    """
    die_with_dvc()  # a killed `dvc` must not leave a stage on the GPU
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for noisy in ("httpx", "datasets", "lm_eval"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    parser = argparse.ArgumentParser(prog=f"permllm {name}", description=stage.__doc__)
    for argument in arguments:
        parser.add_argument(f"--{argument}", required=argument == "model")
    setting = Setting(**vars(parser.parse_args(argv)))
    started = time.perf_counter()
    try:
        with _bars_on_a_terminal(), alone_in(setting.scratch(name)) if _is_first() else contextlib.nullcontext():
            metrics = stage(Params.read(), setting)
            if metrics is None:
                return
            seconds = time.perf_counter() - started
            if setting.model:
                write_json(setting.metrics(name), {**metrics, "seconds": round(seconds, 3)})
    except (ValueError, ArithmeticError, OSError) as error:  # what the user can mend; anything else is ours and keeps its traceback
        sys.exit(f"permllm {name}: {error}{_put_back()}")
    logger.info("%s %s: %.1f s", name, setting.title, seconds)


def _is_first() -> bool:
    """Whether this process writes the files: the only one, or the first of those that `torchrun` started."""
    return not is_torchelastic_launched() or os.environ["RANK"] == "0"


class Progress(contextlib.AbstractContextManager):
    """How far a piece of work is, and how long it will take: a bar on a terminal, a plain line for every step where there is none.

    Args:
        what: the work, named by what its steps are.
        done: how many of the total an earlier run has finished.
    """

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        if done:
            logger.info("%s: %d of %d are done already", what, done, total)
        self._what, self._total, self._first, self._done, self._started = what, total, done, done, time.perf_counter()
        self._bar = tqdm(desc=what, total=total, initial=done, position=0, disable=not sys.stderr.isatty())

    def step(self, note: str = "") -> None:
        """Count a finished step, and say what came of it."""
        self._done += 1
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update()
        if self._bar.disable:
            elapsed = time.perf_counter() - self._started
            left = elapsed / (self._done - self._first) * (self._total - self._done)
            logger.info("%s %d/%d%s, %.1f s, about %.0f s left", self._what, self._done, self._total, note and f": {note}", elapsed, left)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _put_back() -> str:
    """Say how to get the earlier outputs again, which DVC removes before it runs a stage."""
    address = os.environ.get("DVC_STAGE")
    return f"\n`dvc checkout {address}` puts an earlier result back, if there was one" if address else ""


def progress(items: Iterable[Item], what: str, total: int, done: int = 0) -> Iterator[Item]:
    """Yield the items, and show after each how far they are; see `Progress`."""
    with Progress(what, total, done) as steps:
        for item in items:
            yield item
            steps.step()


class _BatchBar(logging.Handler):
    """A bar below that of the steps, for the batches of what runs now."""

    _bar: tqdm | None = None
    _what: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        what, number, total = record.args
        if self._bar is None or what != self._what:
            self.close()
            self._bar, self._what = tqdm(desc=what, total=total, position=1, leave=False), what
        self._bar.update(number - self._bar.n)
        if number == total:
            self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        super().close()


@contextlib.contextmanager
def _bars_on_a_terminal() -> Iterator[None]:
    """Where there is a terminal, show a bar for batches, and write lines of the log above all bars."""
    if not sys.stderr.isatty():
        yield
        return
    handler, level = _BatchBar(), batch_logger.level
    batch_logger.addHandler(handler)
    batch_logger.setLevel(logging.DEBUG)
    batch_logger.propagate = False
    try:
        with logging_redirect_tqdm():
            yield
    finally:
        handler.close()
        batch_logger.removeHandler(handler)
        batch_logger.setLevel(level)
        batch_logger.propagate = True
