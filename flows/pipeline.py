"""The pipeline as a Prefect flow: a task per stage of DVC's graph, one at a time on every GPU.

DVC alone decides whether a stage runs; Prefect adds the schedule, the log, the states and cancelling. The flow runs
without a server (`python -m flows.pipeline`), with one, and from the deployment in prefect.yaml.
"""

import argparse
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping
from graphlib import TopologicalSorter
from queue import SimpleQueue
from typing import Any

import httpx
from prefect import Flow, flow, get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.futures import PrefectFuture, wait
from prefect.settings import PREFECT_API_URL
from prefect.states import Completed
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.tasks import Task

from flows.graph import Stages, read_records, read_stages, select
from flows.mend import mend
from flows.processes import TRY_LATER, Commands, die_with_worker
from flows.remote import check_remote

BUSY = "is busy, it is being blocked by"  # what DVC says while another process has the stage
CUT_OFF = "JSON structure is corrupted"  # what it says of a list of locks that is mended as soon as no other dvc is at work
BUSY_DELAYS = [2, 5, 15]  # seconds before every new try, the last again and again
BUSY_TRIES = 10_000  # two days
SKIPPED = "Stage '{}' didn't change, skipping"
RESTORED = "Stage '{}' is cached - skipping run, checking out outputs"
LAST_LINES = 3


class CommandFailed(RuntimeError):
    """A command ended with an error."""


class StageBusy(CommandFailed):
    """Another process works on the stage right now."""


class TryLater(CommandFailed):
    """A command could not reach what it needs, and lost nothing."""


class PipelineFailed(RuntimeError):
    """Some stages failed, or could not run because of those; all others have run."""


@flow(name="pipeline", task_runner=ThreadPoolTaskRunner(), persist_result=False)
def pipeline(
    models: list[str] | None = None,
    patterns: list[str] | None = None,
    methods: list[str] | None = None,
    targets: list[str] | None = None,
    force: bool = False,
    remote: str | None = None,
) -> list[dict[str, Any]]:
    """Run the stages that are out of date, then track the results in MLflow.

    A choice narrows the matrix of params.yaml; `report` compares all of it, so it only runs where nothing is left out.
    A stage that fails blocks what depends on it and nothing else.

    Args:
        models: of `run.models`; none for all.
        patterns: of `run.patterns`; none for all.
        methods: of `run.methods`; none for all.
        targets: stages, such as `evaluate`, with all that they need; none for all.
        force: run stages that did not change too.
        remote: of DVC; stages that other clones pushed to it are restored, those that run here are pushed. None shares nothing.

    Returns:
        A record per stage: its address, its state (ran, restored, skipped), seconds and the reason of a failure.

    Raises:
        ValueError: if a choice is unknown or leaves nothing, or there is no such remote; before anything runs.
        PipelineFailed: naming what failed and what was blocked.
    """
    return run_stages(select(read_stages(), models, patterns, methods, targets), remote, force, is_tracked=True)


def run_stages(stages: Stages, remote: str | None, force: bool = False, is_tracked: bool = False) -> list[dict[str, Any]]:
    """Run stages that are out of date inside a flow; arguments, result and errors are those of `pipeline`."""
    die_with_worker()  # or its stages would keep the GPU
    if remote:
        check_remote(remote)
    commands = Commands()
    try:
        futures = _run_all(stages, commands, remote, force)
        if is_tracked:
            futures["track"] = track.submit(commands)
        rows = _rows(stages, futures)
    except BaseException:  # cancelling is none of the ordinary exceptions
        commands.stop()
        raise
    _publish(rows)
    wrong = {state: [row["stage"] for row in rows if row["state"] == state] for state in ("failed", "blocked")}
    if any(wrong.values()):
        raise PipelineFailed("; ".join(f"{state}: {', '.join(names)}" for state, names in wrong.items() if names))
    return rows


def _run_all(stages: Stages, commands: Commands, remote: str | None, force: bool) -> dict[str, PrefectFuture]:
    """Run every stage as soon as all that it depends on has ended and a GPU is free."""
    futures: dict[str, PrefectFuture] = {}
    finished: SimpleQueue[tuple[str, str | None]] = SimpleQueue()
    order = TopologicalSorter({address: stage.depends_on for address, stage in stages.items()})
    order.prepare()
    ready, slots = [], gpu_slots()
    while order.is_active():
        ready += order.get_ready()
        while ready and slots:
            address, gpu = ready.pop(0), slots.pop(0)
            needed = [futures[other] for other in stages[address].depends_on]
            futures[address] = repro.submit(address, commands, gpu, remote, force, wait_for=needed)
            futures[address].add_done_callback(lambda _, ended=(address, gpu): finished.put(ended))
        address, gpu = finished.get()
        slots.append(gpu)
        order.done(address)
    return futures


def _is_busy(task: Task, run: TaskRun, state: State) -> bool:
    return isinstance(state.result(raise_on_failure=False), StageBusy)


@task(
    name="stage",
    task_run_name="{address}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=BUSY_TRIES,
    retry_delay_seconds=BUSY_DELAYS,
    retry_condition_fn=_is_busy,
)
def repro(address: str, commands: Commands, gpu: str | None, remote: str | None, force: bool) -> State:
    """Let DVC run a stage, restore its outputs or skip it; the state is named after what it did."""
    shared = ["flows.remote", remote] if remote else ["dvc", "--wait-for-lock", "repro", "--single-item"]
    started = time.perf_counter()
    mend()  # another dvc may have been killed since
    try:
        lines = _run([sys.executable, "-m", *shared, *(["--force"] if force else []), address], commands, gpu)
    except StageBusy:
        raise
    except CommandFailed:
        _put_back(address, commands)
        raise
    outcome = "Skipped" if SKIPPED.format(address) in lines else "Restored" if RESTORED.format(address) in lines else "Ran"
    return Completed(name=outcome, data=time.perf_counter() - started)


def _put_back(address: str, commands: Commands) -> None:
    """Fetch the earlier outputs of a failed stage from DVC's cache; DVC removed them before it ran the stage."""
    mend()  # dvc may have been killed
    if address not in read_records():
        return
    try:
        _run([sys.executable, "-m", "dvc", "--wait-for-lock", "checkout", "--force", address], commands)
    except CommandFailed as error:
        get_run_logger().warning("the earlier outputs of %s are not there: %s", address, error)


@task(name="track", task_run_name="track", cache_policy=NO_CACHE, persist_result=False)
def track(commands: Commands) -> State:
    """Record in MLflow what it does not have yet; also what a failed run has finished. Results wait where MLflow does not answer."""
    started = time.perf_counter()
    try:
        _run([sys.executable, "-m", "flows.track"], commands)
    except TryLater:
        get_run_logger().warning("MLflow does not answer: the results are kept, `make track` records them later")
        return Completed(name="Postponed", data=time.perf_counter() - started)
    return Completed(name="Ran", data=time.perf_counter() - started)


def _run(command: list[str], commands: Commands, gpu: str | None = None) -> list[str]:
    """Run a command, pass its output on to the log, and return its lines."""
    log, lines = get_run_logger(), []

    def keep(line: str) -> None:
        lines.append(line)
        if line:
            log.log(logging.WARNING if line.startswith("WARNING:") else logging.INFO, "%s", line)

    status = commands.run(command, environment(gpu), keep)
    if status:
        failure = TryLater if status == TRY_LATER else StageBusy if any(BUSY in line or CUT_OFF in line for line in lines) else CommandFailed
        raise failure(f"{' '.join(command[2:])} ended with status {status}:\n" + "\n".join(filter(None, lines[-LAST_LINES:])))
    return lines


def environment(gpu: str | None = None) -> dict[str, str]:
    """Return the environment of a command: this Python before any other, output without delay, one GPU."""
    path = os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)))
    return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", **({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})}


def gpu_slots() -> list[str | None]:
    """Return a value of CUDA_VISIBLE_DEVICES for every GPU that this process may use, at least one; None leaves it as it is."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return visible.split(",")
    import torch  # takes seconds

    return [str(index) for index in range(torch.cuda.device_count())] or [None]


def _rows(stages: Stages, futures: Mapping[str, PrefectFuture]) -> list[dict[str, Any]]:
    """Describe how every stage ended."""
    wait(list(futures.values()))  # gives every future its final state
    rows = []
    for address, future in futures.items():
        seconds, reason = 0.0, ""
        if future.state.is_completed():
            outcome, seconds = future.state.name.lower(), future.result()
        elif future.state.name == "NotReady":
            outcome = "blocked"
            reason = f"needs {', '.join(other for other in stages[address].depends_on if not futures[other].state.is_completed())}"
        else:
            outcome, reason = "failed", str(future.result(raise_on_failure=False))
        rows.append({"stage": address, "state": outcome, "seconds": round(seconds, 2), "reason": reason})
    return rows


def _publish(rows: list[dict[str, Any]]) -> None:
    """Show the states in the log of the run, and as its artifact."""
    counts = ", ".join(f"{count} {state}" for state, count in Counter(row["state"] for row in rows).items())
    width = max(len(row["stage"]) for row in rows)
    table = "\n".join(f"{row['stage']:<{width}}  {row['state']:<8}  {row['seconds']:8.2f} s" for row in rows)
    log = get_run_logger()
    log.info("stages: %s\n%s", counts, table)
    for row in rows:
        if row["reason"]:
            log.error("%s %s: %s", row["stage"], row["state"], row["reason"])
    create_table_artifact(key="stages", table=rows, description=f"What DVC did with every stage: {counts}")


def choice_of_stages(parser: argparse.ArgumentParser, argv: list[str] | None) -> dict[str, Any]:
    """Read the arguments that choose stages and a remote.

    Raises:
        SystemExit: if a name is unknown; before Prefect takes seconds to start.
    """
    for name, example in {"models": "llama-5m", "patterns": "2:4", "methods": "wanda", "targets": "evaluate"}.items():
        parser.add_argument(f"--{name}", nargs="+", metavar="NAME", help=f"only these, such as {example}")
    parser.add_argument("--remote", metavar="NAME", help="DVC remote that clones share: restore what others made, push what runs here")
    choice = vars(parser.parse_args(argv))
    try:
        select(read_stages(), *(choice[name] for name in ("models", "patterns", "methods", "targets")))
        if choice["remote"]:
            check_remote(choice["remote"])
    except ValueError as error:
        sys.exit(f"{parser.prog.rpartition('.')[2]}: {error}")
    return choice


def run_as_command(flow: Flow, choice: Mapping[str, Any]) -> None:
    """Run a flow, and say in one line why it failed.

    Raises:
        SystemExit: if it fails. If a server of Prefect does not answer the process ends at once: what waits to be sent is for nobody.
    """
    try:
        flow(**choice)
    except (ValueError, PipelineFailed) as error:
        sys.exit(f"{flow.name}: {error}")
    except httpx.HTTPError as error:
        url = PREFECT_API_URL.value()
        if url is None:  # the flow's own, which ends with this process
            raise
        print(f"{flow.name}: Prefect's server at {url} does not answer ({error}); what has run is kept, run again when it does", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def main(argv: list[str] | None = None) -> None:
    """Run the flow as a command."""
    parser = argparse.ArgumentParser(prog="python -m flows.pipeline", description="Run what is out of date of the pipeline.")
    parser.add_argument("--force", action="store_true", help="run stages that did not change too")
    run_as_command(pipeline, choice_of_stages(parser, argv))


if __name__ == "__main__":
    main()
