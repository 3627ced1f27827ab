"""What studies share: rows that are computed side by side, in processes that divide the machine's cores."""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

import torch

from flows.processes import die_with_parent
from flows.stage import progress

Made = TypeVar("Made")


def side_by_side(what: str, jobs: int, run: Callable[..., Made], rows: Sequence[tuple[Any, ...]]) -> list[Made]:
    """Return `run(*row)` of every row, in their order; `run` is found by name in processes that start anew."""
    threads = max(torch.get_num_threads() // jobs, 1)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start_worker, (threads,)) as pool:
        running = {pool.submit(run, *row): number for number, row in enumerate(rows)}
        done = {running[future]: future.result() for future in progress(as_completed(running), what, len(rows))}
    return [done[number] for number in range(len(rows))]


def _start_worker(threads: int) -> None:
    die_with_parent()
    torch.set_num_threads(threads)
