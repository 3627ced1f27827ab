"""Learning curves in MLflow while they are learned: `python -m flows.live`.

A stage knows nothing of MLflow: it writes its history line by line. This copies the lines to a run that is RUNNING until
`flows.track` puts the finished result in its place. It can be started and stopped at any time, and waits for a server that is gone.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import time
from collections.abc import Iterator, Sequence

from flows.experiment import LIVE, Experiment, UnreachableError, curve, setting_tags
from flows.graph import read_stages
from flows.paths import HISTORY, Setting
from permllm.artifacts import unfinished

COPIED = "live.copied"  # tag: how many lines of the history a run has, and their hash
logger = logging.getLogger("permllm")


def learning(settings: Sequence[Setting]) -> Iterator[tuple[Setting, list[str]]]:
    """Yield the settings that learn now, or whose learning was interrupted, with the whole lines of their history."""
    for setting in settings:
        history = unfinished(setting.path("learn")) / HISTORY
        if history.is_file():
            yield setting, [line for line in history.read_text().splitlines(keepends=True) if line.endswith("\n")]


def copy_lines(experiment: Experiment, setting: Setting, lines: list[str]) -> int:
    """Bring the run of a setting that learns up to its history, and return how many lines were new.

    A run whose lines are not the first of the history is of another try, and is replaced.
    """
    from mlflow.entities import Metric, RunTag

    marks = {run.info.run_id: run.data.tags.get(COPIED, "") for run in experiment.live_runs(setting)}
    known = {run: count for run, mark in marks.items() for count in range(len(lines) + 1) if mark == _mark(lines, count)}
    if not known:
        experiment.delete_live_runs(setting)
        tags = {LIVE: setting.title, COPIED: _mark(lines, 0), **setting_tags(setting)}
        run = experiment.client.create_run(experiment.identity, tags=tags, run_name=f"{setting.title}, learning")
        known = {run.info.run_id: 0}
    run, first = next(iter(known.items()))
    now = int(time.time() * 1000)
    points = [Metric(name, value, now, step) for name, step, value in curve(lines[first:])]
    if points:  # with their mark, at once: nothing is copied twice
        experiment.client.log_batch(run, points, tags=[RunTag(COPIED, _mark(lines, len(lines)))])
    return len(lines) - first


def _mark(lines: list[str], count: int) -> str:
    return f"{count} {hashlib.sha256(''.join(lines[:count]).encode()).hexdigest()[:16]}"


def follow(settings: Sequence[Setting], seconds: float) -> None:
    """Copy new lines again and again, until the process is ended."""
    copied: dict[Setting, list[str]] = {}
    is_reached = True
    while True:
        new = {setting: lines for setting, lines in learning(settings) if lines != copied.get(setting)}
        try:
            if new:
                with Experiment.open() as experiment:
                    for setting, lines in new.items():
                        logger.info("%s: %d new lines", setting.title, copy_lines(experiment, setting, lines))
                copied |= new
                is_reached = True
        except UnreachableError as error:
            if is_reached:
                logger.warning("%s", error)
            is_reached = False
        time.sleep(seconds)


def main(argv: list[str] | None = None) -> None:
    """Show in MLflow what learns now, until this is interrupted."""
    parser = argparse.ArgumentParser(prog="python -m flows.live", description=main.__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="between two looks at the histories")
    chosen = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    follow([stage.setting for stage in read_stages().values() if stage.name == "learn"], chosen.seconds)


if __name__ == "__main__":
    main()
