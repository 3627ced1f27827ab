"""What the commands of all stages share: arguments, parameters, the log, the metrics file, and no orphans."""

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

from flows.paths import Setting
from flows.processes import die_with_dvc
from permllm.artifacts import write_json
from permllm.params import Params

Item = TypeVar("Item")
StageFunction = Callable[[Params, Setting], dict[str, Any]]
logger = logging.getLogger("permllm")


def run_stage(name: str, stage: StageFunction, arguments: tuple[str, ...], argv: list[str] | None = None) -> None:
    """Run one stage as a command, and write what it measured to its metrics file.

    Args:
        name: of the stage; the same word in params.yaml, dvc.yaml and below data/.
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
        metrics = stage(Params.read(), setting)
    except (ValueError, ArithmeticError, OSError) as error:  # what the user can mend; anything else is ours and keeps its traceback
        sys.exit(f"permllm {name}: {error}{_put_back()}")
    seconds = time.perf_counter() - started
    write_json(setting.metrics(name), {**metrics, "seconds": round(seconds, 3)})
    logger.info("%s %s: %.1f s", name, " ".join(filter(None, vars(setting).values())), seconds)


def _put_back() -> str:
    """Say how to get the earlier outputs again, which DVC removes before it runs a stage."""
    address = os.environ.get("DVC_STAGE")
    return f"\n`dvc checkout {address}` puts an earlier result back, if there was one" if address else ""


def progress(items: Iterable[Item], what: str, total: int, done: int = 0) -> Iterator[Item]:
    """Yield the items with a progress bar on a terminal, or a plain line for every item where there is none.

    Args:
        done: how many of the total an earlier run has finished.
    """
    if done:
        logger.info("%s: %d of %d are done already", what, done, total)
    if sys.stderr.isatty():
        yield from tqdm(items, desc=what, total=total, initial=done)
        return
    started = time.perf_counter()
    for number, item in enumerate(items, start=1):
        yield item
        elapsed = time.perf_counter() - started
        logger.info("%s %d/%d, %.1f s, about %.0f s left", what, done + number, total, elapsed, elapsed / number * (total - done - number))
