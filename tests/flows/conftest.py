"""Shared by the tests of the flows: folders with an MLflow database or a tiny model, a Prefect server with workers as real processes."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import psutil
import pytest
from mlflow import MlflowClient

import flows
from flows.pipeline import environment

QUICK = {"PREFECT_WORKER_QUERY_SECONDS": "1", "PREFECT_WORKER_HEARTBEAT_SECONDS": "3", "PREFECT_SERVER_SERVICES_FOREMAN_LOOP_SECONDS": "2"}


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables: they take seconds to make."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def mlflow_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_database: Path) -> Path:
    """A new folder, entered, whose database MLflow uses."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_database, "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return tmp_path


@pytest.fixture
def tiny_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Callable[..., Path]) -> Path:
    """A new folder, entered, with the checkpoint `model/llama` and a text in `text/`; params.yaml is left to the tests."""
    monkeypatch.chdir(tmp_path)
    tiny_checkpoint(tmp_path / "model", "llama")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return tmp_path


class Server:
    """A Prefect server, and what is started beside it, with a home of their own."""

    def __init__(self, home: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.api = f"http://127.0.0.1:{self.port}/api"
        self.home, self.started, self.more = home, [], {}

    @property
    def environment(self) -> dict[str, str]:
        """Nothing of the Prefect of whoever runs the tests."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        own = {"PREFECT_HOME": str(self.home / ".prefect"), "PREFECT_API_URL": self.api, "PATH": environment()["PATH"]}
        return {**inherited, **flows.TELEMETRY_OFF, **QUICK, **own, **self.more}

    def start(self, name: str, *command: str, folder: Path | None = None) -> psutil.Popen:
        """Start `python -m COMMAND` in a folder, where it finds the folder's own `flows`; its output goes to `NAME.log`."""
        here = {**self.environment, **({"PERMLLM_FOLDER": str(folder), "PYTHONPATH": str(folder)} if folder else {})}
        with self.log(name).open("w") as log:
            process = psutil.Popen([sys.executable, "-m", *command], env=here, cwd=folder, stdout=log, stderr=log)
        self.started.append(process)
        return process

    def log(self, name: str) -> Path:
        return self.home / f"{name}.log"

    def call(self, *arguments: str, folder: Path | None = None) -> None:
        command = [sys.executable, "-m", "prefect", *arguments]
        done = subprocess.run(command, env=self.environment, cwd=folder, capture_output=True, text=True, timeout=150)
        assert done.returncode == 0, done.stdout + done.stderr

    def find(self, what: str, **of: Any) -> list[dict[str, Any]]:
        """Return the records of a kind; `of` names the flow run or the deployment that they belong to."""
        query = {owner: {"id": {"any_": [number]}} for owner, number in of.items()}
        request = Request(f"{self.api}/{what}/filter", data=json.dumps(query).encode(), headers={"Content-Type": "application/json"})
        return json.load(urlopen(request, timeout=30))

    def is_healthy(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0 and json.load(urlopen(f"{self.api}/health", timeout=30))

    def start_worker(self, folder: Path) -> psutil.Popen:
        return self.start(f"worker_{folder.name}_{len(self.started)}", "prefect", "worker", "start", "--pool", "gpu", "--limit", "1", folder=folder)

    def stop(self, keep: int = 0) -> None:
        """End what was started after the first `keep`, with all descendants: a worker waits for its run."""
        started, self.started = self.started[keep:], self.started[:keep]
        processes = [descendant for process in started if process.is_running() for descendant in (*process.children(recursive=True), process)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGTERM)
        for process in psutil.wait_procs(processes, timeout=20)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@contextlib.contextmanager
def running_server(home: Path) -> Iterator[Server]:
    """Yield a server when it answers."""
    running = Server(home)
    try:
        running.start("server", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(running.port))
        deadline = time.monotonic() + 90
        while not running.is_healthy():
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.1)
        yield running
    finally:
        running.stop()


@pytest.fixture
def new_server(tmp_path: Path) -> Iterator[Server]:
    """A running server for one test alone, whose clients give up at once when it is gone."""
    with running_server(tmp_path) as running:
        running.more = {"PREFECT_CLIENT_MAX_RETRIES": "0"}
        yield running


@pytest.fixture(scope="session")
def common_server(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[Server]:
    """A running server that knows the project's deployments."""
    with running_server(tmp_path_factory.mktemp("server")) as running:
        running.call("work-pool", "create", "gpu", "--type", "process")
        running.call("--no-prompt", "deploy", "--all", folder=repository)
        yield running


@pytest.fixture
def server(common_server: Server) -> Iterator[Server]:
    """The running server; what a test starts beside it ends with the test."""
    yield common_server
    common_server.stop(keep=1)
