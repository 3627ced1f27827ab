"""A sweep over several workers: each takes a part of the stages at a time, and a part whose worker died goes to another.

The worker machines have a clone of the repository each and share results through a DVC remote; workers that run in one
folder need none. The sweep itself is the flow of this file, run where its report shall lie: `python -m flows.sweep`.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Mapping
from graphlib import TopologicalSorter
from typing import Any
from uuid import UUID

from prefect import flow, get_client, get_run_logger
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter
from prefect.client.schemas.objects import FlowRun, StateType, WorkerStatus
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelling, Crashed
from prefect.task_runners import ThreadPoolTaskRunner

from flows.graph import parts, read_stages, select
from flows.pipeline import PipelineFailed, choice_of_stages, run_as_command, run_stages
from flows.remote import check_remote

PART = "part/default"  # the deployment in prefect.yaml
ATTEMPTS = 3  # of a part whose workers die
SECONDS_BETWEEN_LOOKS = 2.0
LIVE = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED]


@flow(name="part", flow_run_name="{target}", task_runner=ThreadPoolTaskRunner(), persist_result=False)
def part(target: str, remote: str | None = None) -> list[dict[str, Any]]:
    """Run a part of a sweep on this worker: a stage with what it needs and nobody has done."""
    return run_stages(select(read_stages(), targets=[target]), remote)


@flow(name="sweep", task_runner=ThreadPoolTaskRunner(), persist_result=False)
def sweep(
    models: list[str] | None = None,
    patterns: list[str] | None = None,
    methods: list[str] | None = None,
    targets: list[str] | None = None,
    remote: str | None = None,
) -> list[dict[str, Any]]:
    """Have workers run the stages that are out of date; then bring the results here, report and track them.

    Arguments and result are those of the flow `pipeline`.

    Raises:
        ValueError: if a choice is unknown, there is no such remote, or the server has no deployment of parts; before anything runs.
        PipelineFailed: naming the parts that failed and those that wait for them; all others have run.
    """
    stages = select(read_stages(), models, patterns, methods, targets)
    if remote:
        check_remote(remote)
    with get_client(sync_client=True) as client:
        _run_parts(Parts(client, remote), parts(stages))
    return run_stages(stages, remote, is_tracked=True)


class Parts:
    """The parts of a sweep that are on their way at Prefect's server.

    Attributes:
        runs: the part of every run that has not ended, by the run's id.
    """

    def __init__(self, client: SyncPrefectClient, remote: str | None) -> None:
        self.runs: dict[UUID, str] = {}
        self._client, self._remote = client, remote
        self._own: set[UUID] = set()  # runs that this sweep asked for; it does not cancel those of others
        self._attempts: Counter[str] = Counter()
        try:
            self._deployment = client.read_deployment_by_name(PART)
        except ObjectNotFound as error:
            raise ValueError(f"the server at {client.api_url} does not know {PART} yet: start a worker with `make worker`") from error

    def start(self, target: str) -> None:
        """Ask for a run of a part, or join the one that another sweep has asked for."""
        live = self._read(state={"type": {"any_": LIVE}}, name={"any_": [target]})
        same = [run for run in live if run.parameters == {"target": target, "remote": self._remote}]
        if same:
            get_run_logger().info("%s was asked for by another sweep", target)
            self.runs[same[0].id] = target
            return
        run = run_deployment(PART, flow_run_name=target, parameters={"target": target, "remote": self._remote}, timeout=0, as_subflow=False)
        self._attempts[target] += 1
        self.runs[run.id] = target
        self._own.add(run.id)

    def ended(self) -> Mapping[str, FlowRun]:
        """Return the parts that have ended since the last call; those whose worker died are started again instead."""
        found = {}
        lost = self._lost_workers()
        for run in self._read(id={"any_": list(self.runs)}) if self.runs else ():
            if run.state.type in (StateType.PENDING, StateType.RUNNING) and run.labels.get("prefect.worker.name") in lost:
                run.state = Crashed(message=f"worker {run.labels['prefect.worker.name']} is gone")
                self._client.set_flow_run_state(run.id, run.state, force=True)
            if not run.state.is_final():
                continue
            target = self.runs.pop(run.id)
            if run.state.is_crashed() and self._attempts[target] < ATTEMPTS:
                get_run_logger().warning("%s goes to another worker: %s", target, run.state.message)
                self.start(target)
            else:
                found[target] = run
        return found

    def cancel(self) -> None:
        """Cancel what this sweep asked for and has not ended."""
        for run in self._own & self.runs.keys():
            self._client.set_flow_run_state(run, Cancelling())

    def _lost_workers(self) -> set[str]:
        """Return the workers that the server has not heard of for three of their heartbeats."""
        workers = self._client.read_workers_for_work_pool(self._deployment.work_pool_name)
        return {worker.name for worker in workers if worker.status == WorkerStatus.OFFLINE}

    def _read(self, **query: Any) -> list[FlowRun]:
        of_part = DeploymentFilter(id={"any_": [self._deployment.id]})
        return self._client.read_flow_runs(flow_run_filter=FlowRunFilter(**query), deployment_filter=of_part)


def _run_parts(waiting: Parts, needs: Mapping[str, tuple[str, ...]]) -> None:
    """Start every part as soon as those that it needs have completed, until all that can has ended."""
    order, failed = TopologicalSorter(needs), {}
    order.prepare()
    try:
        while order.is_active():
            for target in order.get_ready():
                waiting.start(target)
            if not waiting.runs:
                break  # the others need one that failed
            for target, run in waiting.ended().items():
                get_run_logger().info("%s: %s", target, run.state.name)
                if run.state.is_completed():
                    order.done(target)
                else:
                    failed[target] = run.state
            time.sleep(SECONDS_BETWEEN_LOOKS)
    except BaseException:  # cancelling is none of the ordinary exceptions
        waiting.cancel()
        raise
    if failed:
        blocked = [target for target, others in needs.items() if failed.keys() & others]
        reasons = ", ".join(f"{target} ({state.name}: {state.message})" for target, state in failed.items())
        raise PipelineFailed(f"failed: {reasons}" + (f"; blocked: {', '.join(blocked)}" if blocked else ""))


def main(argv: list[str] | None = None) -> None:
    """Run the flow as a command."""
    parser = argparse.ArgumentParser(prog="python -m flows.sweep", description="Have several workers run what is out of date of the pipeline.")
    choice = choice_of_stages(parser, argv)
    if not PREFECT_API_URL.value():
        sys.exit("sweep: needs a Prefect server with workers: set PREFECT_API_URL, such as http://127.0.0.1:4200/api")
    run_as_command(sweep, choice)


if __name__ == "__main__":
    main()
