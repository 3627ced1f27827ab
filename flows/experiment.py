"""The experiment in MLflow: one writer at a time, and a server that may be gone."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from flows.paths import Setting

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "permllm"
ARTIFACTS = Path("mlartifacts")
LIVE = "live"  # tag of a run whose result is not finished yet: its setting
CURVES = ("held_out_loss", "training_loss")
ANSWER_SECONDS = 5
RETRIES = "3"  # of a request; MLflow's own number takes minutes


class UnreachableError(RuntimeError):
    """MLflow's server does not answer. Nothing is lost: what a run is made of lies on the disk."""

    def __init__(self, uri: str) -> None:
        super().__init__(f"MLflow at {uri} does not answer; all results are kept, and `python -m flows.track` records them when it does")


@dataclass(frozen=True)
class Experiment:
    """The experiment, open for writing."""

    client: MlflowClient
    identity: str

    @classmethod
    @contextlib.contextmanager
    def open(cls) -> Iterator[Experiment]:
        """Yield the experiment, made if it is not there, to this process alone: neither a run nor the database is made twice.

        Raises:
            UnreachableError: if the server does not answer, or stops to.
        """
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", RETRIES)
        from mlflow import MlflowClient  # takes seconds
        from mlflow.exceptions import MlflowException

        logging.getLogger("alembic").setLevel(logging.WARNING)
        with FileLock("mlflow.db.lock"):
            client = MlflowClient()
            if _is_gone(client.tracking_uri):
                raise UnreachableError(client.tracking_uri)
            try:
                yield cls(client, _identity(client))
            except MlflowException as error:
                if _is_gone(client.tracking_uri):
                    raise UnreachableError(client.tracking_uri) from error
                raise

    def live_runs(self, setting: Setting) -> list:
        """Return the runs of a setting whose result is not finished."""
        return self.client.search_runs([self.identity], f"tags.`{LIVE}` = '{setting.title}'")

    def delete_live_runs(self, setting: Setting) -> None:
        """Remove the runs of a setting whose result is not finished."""
        for run in self.live_runs(setting):
            self.client.delete_run(run.info.run_id)


def _identity(client: MlflowClient) -> str:
    found = client.get_experiment_by_name(EXPERIMENT)
    if found:
        return found.experiment_id
    is_remote = client.tracking_uri.startswith("http")  # a server chooses the place itself
    return client.create_experiment(EXPERIMENT, None if is_remote else ARTIFACTS.absolute().as_uri())


def _is_gone(uri: str) -> bool:
    """Return whether there is no answer; a database is not asked."""
    if not uri.startswith("http"):
        return False
    try:
        urllib.request.urlopen(f"{uri}/health", timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError:  # an answer
        return False
    except OSError:
        return True
    return False


def setting_tags(setting: Setting) -> dict[str, str]:
    """Return what a run is found by."""
    return {"model": setting.model, "sparsity": setting.pattern, "method": setting.method}


def curve(lines: Iterable[str]) -> Iterator[tuple[str, int, float]]:
    """Yield name, step and value of the learning curves that the lines of a history hold."""
    for record in map(json.loads, lines):
        for name in CURVES:
            if record[name] is not None:
                yield f"learn/{name}", record["epoch"], record[name]
