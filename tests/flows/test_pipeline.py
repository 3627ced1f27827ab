"""The flow on a small DVC project: states, failures, busy stages, GPUs; and once through a server and a worker."""

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from prefect.artifacts import Artifact
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.testing.utilities import prefect_test_harness

import flows
from flows import pipeline as module
from flows import sweep as sweep_module
from flows.mend import mend
from flows.pipeline import PipelineFailed, pipeline

GRAPH = {
    "stages": {
        "calibrate": {
            "matrix": {"model": "${run.models}"},
            "cmd": "python stage.py calibrate ${item.model}",
            "deps": ["stage.py"],
            "params": ["models.${item.model}"],
            "outs": ["data/calibrate/${item.model}"],
        },
        "prune": {
            "matrix": {"model": "${run.models}", "method": "${run.methods}"},
            "cmd": "python stage.py prune ${item.model} ${item.method}",
            "deps": ["data/calibrate/${item.model}"],
            "params": ["methods.${item.method}"],
            "outs": ["data/prune/${item.model}/${item.method}"],
        },
        "report": {"cmd": "python stage.py report", "deps": ["data/prune"], "outs": ["data/report"]},
    }
}
PARAMS = {"run": {"models": ["a"], "methods": ["wanda", "ria+cp"]}, "models": {"a": "", "b": ""}, "methods": {"wanda": "", "ria+cp": ""}}
STAGE = """
import os, pathlib, sys, time, yaml
name, *item = sys.argv[1:]
params = yaml.safe_load(open("params.yaml"))
word, _, seconds = str({**params["models"], **params["methods"]}.get(item[-1], "") if item else "").partition(" ")
if word == "fail":
    sys.exit(f"{name} cannot use {item[-1]}")
started = time.time()
time.sleep(float(seconds or 0))
out = pathlib.Path("data", name, *item)
out.parent.mkdir(parents=True, exist_ok=True)
out.write_text(f"{os.environ.get('CUDA_VISIBLE_DEVICES')} {started} {time.time()}")
"""


@pytest.fixture(scope="session")
def empty_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder under git and DVC."""
    folder = tmp_path_factory.mktemp("project")
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--quiet"], cwd=folder, check=True)
    (folder / "dvc.yaml").write_text(yaml.safe_dump(GRAPH, sort_keys=False))
    (folder / "stage.py").write_text(STAGE)
    return folder


@pytest.fixture
def project(tmp_path: Path, empty_project: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of three stages that take no time, entered, where children find `flows`."""
    folder = tmp_path / "project"
    shutil.copytree(empty_project, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(repository))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    set_params()
    return folder


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def prefect() -> Iterator[None]:
    """A Prefect of its own for the flows in this process."""
    with prefect_test_harness(server_startup_timeout=120):
        yield


def set_params(models: dict[str, str] | None = None, methods: dict[str, str] | None = None, run: dict[str, list[str]] | None = None) -> None:
    """Write params.yaml; what a stage does follows from the value of its model or method: nothing, `fail` or `sleep SECONDS`."""
    changes = {"run": run, "models": models, "methods": methods}
    Path("params.yaml").write_text(yaml.safe_dump({section: {**PARAMS[section], **(change or {})} for section, change in changes.items()}))


def two_clones(folder: Path) -> Path:
    """Give the project a remote, in a folder that is not there yet, and return a copy of it."""
    subprocess.run([sys.executable, "-m", "dvc", "remote", "add", "--quiet", "shared", str(folder / "remote")], check=True)
    return shutil.copytree(folder / "project", folder / "clone")


def states(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {row["stage"]: row["state"] for row in rows}


def published() -> dict[str, str]:
    """Return the states in the latest table artifact."""
    return states(json.loads(Artifact.get("stages").data))


def test_a_stage_runs_then_is_skipped_then_restored(project: Path, prefect: None):
    assert states(pipeline(targets=["calibrate"])) == {"calibrate@a": "ran", "track": "ran"}
    assert published() == {"calibrate@a": "ran", "track": "ran"}
    assert states(pipeline(targets=["calibrate"]))["calibrate@a"] == "skipped"
    Path("data/calibrate/a").unlink()
    assert states(pipeline(targets=["calibrate"]))["calibrate@a"] == "restored"


def test_a_failure_blocks_what_depends_on_it_and_nothing_else(project: Path, prefect: None):
    set_params(methods={"wanda": "fail"})
    with pytest.raises(PipelineFailed, match="failed: prune@a-wanda; blocked: report"):
        pipeline()
    rows = {row["stage"]: row for row in json.loads(Artifact.get("stages").data)}
    assert states(rows.values()) == {"calibrate@a": "ran", "prune@a-wanda": "failed", "prune@a-ria+cp": "ran", "report": "blocked", "track": "ran"}
    assert "prune cannot use wanda" in rows["prune@a-wanda"]["reason"]
    assert rows["report"]["reason"] == "needs prune@a-wanda"


def test_what_a_failed_stage_had_made_before_is_put_back(project: Path, prefect: None):
    pipeline(targets=["prune"])
    before = Path("data/prune/a/wanda").read_text()
    set_params(methods={"wanda": "fail"})
    with pytest.raises(PipelineFailed, match="failed: prune@a-wanda"):
        pipeline(targets=["prune"])
    assert Path("data/prune/a/wanda").read_text() == before


def test_a_stage_that_another_process_runs_is_tried_again(project: Path, prefect: None, caplog: pytest.LogCaptureFixture):
    set_params(models={"a": "sleep 3"})
    other = subprocess.Popen([sys.executable, "-m", "dvc", "repro", "--quiet", "calibrate@a"], env=module.environment())
    wait_until(lambda: Path(".dvc/tmp/rwlock").exists() and "calibrate" in Path(".dvc/tmp/rwlock").read_text())
    rows = pipeline(targets=["calibrate"])
    assert other.wait() == 0
    assert states(rows)["calibrate@a"] == "skipped"
    assert module.BUSY in caplog.text


def test_the_lock_of_a_dvc_that_was_killed_is_taken_over(project: Path, prefect: None, caplog: pytest.LogCaptureFixture):
    set_params(models={"a": "sleep 600"})
    dead = psutil.Popen([sys.executable, "-m", "dvc", "repro", "--quiet", "calibrate@a"], env=module.environment())
    wait_until(lambda: any("stage.py" in process.cmdline() for process in dead.children(recursive=True)))
    for process in (*dead.children(recursive=True), dead):
        process.kill()
    dead.wait()
    assert str(dead.pid) in Path(".dvc/tmp/rwlock").read_text()
    set_params()
    assert states(pipeline(targets=["calibrate"]))["calibrate@a"] == "ran"
    assert f"(Pid {dead.pid}), in RWLock-file 'data/calibrate/a' had been killed" in caplog.text


@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_lock_files_that_a_killed_dvc_left_cut_off_are_mended(project: Path, prefect: None, kept: float, caplog: pytest.LogCaptureFixture):
    pipeline(targets=["prune"])
    pipeline(targets=["calibrate"])  # it sees the locks whole
    whole = Path("dvc.lock").read_text()
    Path("dvc.lock").write_text(whole[: int(kept * len(whole))])
    Path(".dvc/tmp/rwlock").write_text('{"write": {"data'[: int(kept * 30)])
    rows = pipeline(targets=["prune"])
    assert states(rows) == {"calibrate@a": "skipped", "prune@a-wanda": "skipped", "prune@a-ria+cp": "skipped", "track": "ran"}
    assert Path("dvc.lock").read_text() == whole
    assert "dvc.lock was cut off" in caplog.text
    assert "rwlock was cut off" in caplog.text


def test_a_lock_file_that_is_cut_off_anywhere_is_noticed(project: Path):
    subprocess.run([sys.executable, "-m", "dvc", "repro", "--quiet"], env=module.environment(), check=True)
    assert mend() == []
    whole = Path("dvc.lock").read_text()
    for end in (place for place in range(len(whole)) if place % 20 == 0 or whole[place - 1] == "\n"):
        Path("dvc.lock").write_text(whole[:end])
        assert mend() == ["dvc.lock"], f"cut off after {whole[:end][-40:]!r}"
        assert Path("dvc.lock").read_text() == whole


def test_a_lock_file_that_git_has_is_meant_to_be_so(project: Path):
    subprocess.run([sys.executable, "-m", "dvc", "repro", "--quiet", "calibrate"], env=module.environment(), check=True)
    subprocess.run(["git", "add", "dvc.lock"], check=True)
    subprocess.run([sys.executable, "-m", "dvc", "repro", "--quiet"], env=module.environment(), check=True)
    mend()
    subprocess.run(["git", "checkout", "--quiet", "dvc.lock"], check=True)
    earlier = Path("dvc.lock").read_text()
    assert mend() == []
    assert Path("dvc.lock").read_text() == earlier


def test_the_list_of_locks_is_left_alone_while_another_dvc_is_at_work(project: Path):
    set_params(models={"a": "sleep 600"})
    other = psutil.Popen([sys.executable, "-m", "dvc", "repro", "--quiet", "calibrate@a"], env=module.environment())
    wait_until(lambda: any("stage.py" in process.cmdline() for process in other.children(recursive=True)))
    Path(".dvc/tmp/rwlock").write_text("{")
    assert mend() == []
    for process in (*other.children(recursive=True), other):
        process.kill()
    other.wait()
    assert mend() == ["rwlock"]


def test_what_dvc_recorded_after_the_copy_of_its_lock_file_is_restored(project: Path, prefect: None):
    pipeline(targets=["calibrate"])
    subprocess.run([sys.executable, "-m", "dvc", "repro", "--quiet", "prune@a-wanda", "prune@a-ria+cp"], env=module.environment(), check=True)
    Path("dvc.lock").write_text("")
    states_after = states(pipeline(targets=["prune"]))
    assert states_after == {"calibrate@a": "skipped", "prune@a-wanda": "restored", "prune@a-ria+cp": "restored", "track": "ran"}


def test_a_lock_file_that_is_cut_off_without_a_copy_is_refused_and_one_with_a_conflict_left_alone(project: Path):
    subprocess.run([sys.executable, "-m", "dvc", "repro", "--quiet"], env=module.environment(), check=True)
    whole = Path("dvc.lock").read_text()
    Path("dvc.lock").write_text(whole[:-20])
    with pytest.raises(SystemExit, match=r"dvc\.lock is cut off.*git checkout dvc\.lock"):
        module.main([])
    conflict = f"<<<<<<< here\n{whole}=======\n>>>>>>> there\n"
    Path("dvc.lock").write_text(conflict)
    assert mend() == []
    assert Path("dvc.lock").read_text() == conflict


def test_results_wait_where_mlflow_does_not_answer(project: Path, prefect: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    axes = {"model": ["a"], "pattern": ["2:4"], "method": ["wanda"]}
    for name, matrix in {"benchmark": {axis: axes[axis] for axis in ("model", "pattern")}, "evaluate": axes}.items():
        item = [f"${{item.{axis}}}" for axis in matrix]
        graph = yaml.safe_load(Path("dvc.yaml").read_text())
        graph["stages"][name] = {"matrix": matrix, "cmd": " ".join(["python stage.py", name, *item]), "outs": ["/".join(["data", name, *item])]}
        Path("dvc.yaml").write_text(yaml.safe_dump(graph, sort_keys=False))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
    assert states(pipeline(targets=["benchmark", "evaluate"])) == {"benchmark@a-2:4": "ran", "evaluate@a-2:4-wanda": "ran", "track": "postponed"}
    assert "`make track` records them later" in caplog.text


def test_clones_restore_what_others_pushed_to_their_remote(project: Path, prefect: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clone = two_clones(tmp_path)
    (tmp_path / "remote").mkdir()
    assert set(states(pipeline(targets=["prune"], remote="shared")).values()) == {"ran"}
    monkeypatch.chdir(clone)
    rows = states(pipeline(targets=["prune"], remote="shared"))
    assert rows == {"calibrate@a": "restored", "prune@a-wanda": "restored", "prune@a-ria+cp": "restored", "track": "ran"}
    assert Path("data/prune/a/wanda").read_text() == (project / "data/prune/a/wanda").read_text()


def test_without_its_remote_work_goes_on_and_one_command_pushes_the_results_later(
    project: Path, prefect: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    clone = two_clones(tmp_path)
    assert states(pipeline(targets=["calibrate"], remote="shared"))["calibrate@a"] == "ran"
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING" and "cannot be reached" in record.getMessage()]
    (tmp_path / "remote").mkdir()
    (command,) = re.findall("`dvc (push .*)`", "".join(warnings))
    subprocess.run([sys.executable, "-m", "dvc", *command.split()], check=True)
    monkeypatch.chdir(clone)
    assert states(pipeline(targets=["calibrate"], remote="shared"))["calibrate@a"] == "restored"


def test_a_record_in_the_remote_without_its_outputs_is_made_again(project: Path, prefect: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clone = two_clones(tmp_path)
    (tmp_path / "remote").mkdir()
    pipeline(targets=["calibrate"], remote="shared")
    shutil.rmtree(tmp_path / "remote" / "files")  # as a push leaves it that was killed in between
    monkeypatch.chdir(clone)
    assert states(pipeline(targets=["calibrate"], remote="shared"))["calibrate@a"] == "ran"
    assert (tmp_path / "remote" / "files").exists()


def test_stages_share_the_gpus_one_at_a_time_on_each(project: Path, prefect: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    set_params(models={"a": "sleep 2", "b": "sleep 2"}, run={"models": ["a", "b"]})
    pipeline(targets=["calibrate"])
    (gpu, start, end), (other_gpu, other_start, other_end) = (Path(f"data/calibrate/{model}").read_text().split() for model in "ab")
    assert {gpu, other_gpu} == {"4", "7"}
    assert float(start) < float(other_end) and float(other_start) < float(end)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_no_stage_behind(project: Path, prefect: None, how: signal.Signals):
    set_params(models={"a": "sleep 600"})
    here = {**module.environment(), "PREFECT_API_URL": PREFECT_API_URL.value()}
    run = psutil.Popen(
        [sys.executable, "-m", "flows.pipeline", "--targets", "calibrate"], env=here, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    descendants = []
    try:
        wait_until(lambda: any("stage.py" in process.cmdline() for process in run.children(recursive=True)))
        descendants = run.children(recursive=True)
        run.send_signal(how)
        assert run.wait(timeout=30) != 0
        assert psutil.wait_procs(descendants, timeout=10)[1] == []
    finally:
        for process in (run, *descendants):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def test_without_a_gpu_stages_run_one_at_a_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert module.gpu_slots() == [""]


def test_a_command_finds_this_python_first():
    assert shutil.which("python", path=module.environment()["PATH"]) == str(Path(sys.executable).parent / "python")


def test_the_command_refuses_unknown_names_before_anything_runs(project: Path):
    with pytest.raises(SystemExit, match="unknown model 'c': choose one of a"):
        module.main(["--models", "c"])
    with pytest.raises(SystemExit, match="there is no DVC remote 'shared': `dvc remote add shared URL` adds it"):
        module.main(["--remote", "shared"])
    assert not Path("data").exists()


def test_a_sweep_without_a_server_is_refused_before_anything_runs(project: Path):
    with temporary_settings(restore_defaults={PREFECT_API_URL}), pytest.raises(SystemExit, match="needs a Prefect server with workers"):
        sweep_module.main([])


def test_the_deployment_turns_off_the_telemetry_of_all_tools(repository: Path):
    for deployment in yaml.safe_load((repository / "prefect.yaml").read_text())["deployments"]:
        assert deployment["work_pool"]["job_variables"]["env"] == flows.TELEMETRY_OFF


@pytest.mark.slow
def test_where_the_server_dies_all_stages_run_and_the_flow_says_so(project: Path, new_server: Any, repository: Path):
    set_params(models={"a": "sleep 5"})
    Path("flows").symlink_to(repository / "flows")
    flow = new_server.start("flow", "flows.pipeline", "--targets", "prune", folder=project)
    wait_until(lambda: "Running stage" in new_server.log("flow").read_text())
    for process in (*new_server.started[0].children(recursive=True), new_server.started[0]):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert flow.wait(timeout=120) == 1
    said = new_server.log("flow").read_text()
    assert "stages: 4 ran" in said
    assert said.splitlines()[-1].startswith(f"pipeline: Prefect's server at {new_server.api} does not answer")


@pytest.fixture
def worker(project: Path, server: Any, repository: Path) -> psutil.Popen:
    """A worker in the folder of the project."""
    Path("flows").symlink_to(repository / "flows")
    return server.start_worker(project)


@pytest.mark.slow
def test_a_worker_completes_the_deployed_pipeline(worker: psutil.Popen, server: Any):
    server.call("deployment", "run", "pipeline/default", "--param", 'methods=["wanda"]', "--watch", "--watch-timeout", "120")

    (deployment,) = (deployment for deployment in server.find("deployments") if deployment["entrypoint"] == "flows/pipeline.py:pipeline")
    assert [schedule["schedule"]["cron"] for schedule in deployment["schedules"]] == ["0 2 * * *"]
    (run,) = (run for run in server.find("flow_runs", deployments=deployment["id"]) if run["state_type"] != "SCHEDULED")
    assert run["state_type"] == "COMPLETED"
    assert run["parameters"]["methods"] == ["wanda"]
    finished = {"calibrate@a": "Ran", "prune@a-wanda": "Ran", "track": "Ran"}
    # The server takes the states of tasks from events, which arrive late.
    wait_until(lambda: {task["name"]: task["state_name"] for task in server.find("task_runs", flow_runs=run["id"])} == finished)
    (artifact,) = server.find("artifacts", flow_runs=run["id"])
    assert artifact["key"] == "stages"
    assert states(json.loads(artifact["data"])) == {name: state.lower() for name, state in finished.items()}


@pytest.mark.slow
def test_sweeps_share_parts_and_cancelling_the_one_that_asked_ends_the_stages_of_its_workers(project: Path, worker: psutil.Popen, server: Any):
    set_params(models={"a": "sleep 600"})
    sweep = server.start("sweep", "flows.sweep", "--targets", "prune", folder=project)
    wait_until(lambda: any("stage.py" in process.cmdline() for process in worker.children(recursive=True)))
    running = worker.children(recursive=True)
    other = server.start("other", "flows.sweep", "--targets", "prune", folder=project)
    wait_until(lambda: "calibrate@a was asked for by another sweep" in server.log("other").read_text())
    other.send_signal(signal.SIGINT)
    assert other.wait(timeout=30) != 0
    assert all(process.is_running() for process in running)
    sweep.send_signal(signal.SIGINT)
    assert sweep.wait(timeout=30) != 0
    assert psutil.wait_procs(running, timeout=30)[1] == []
    wait_until(lambda: {run["name"]: run["state_type"] for run in server.find("flow_runs")}["calibrate@a"] == "CANCELLED")


@pytest.mark.slow
def test_what_a_machine_did_that_is_gone_goes_to_another_worker(project: Path, worker: psutil.Popen, server: Any):
    """Both workers run in one folder, so the second takes over the locks of the first."""
    set_params(models={"a": "sleep 600"}, methods={"wanda": "fail"})
    sweep = server.start("sweep", "flows.sweep", "--targets", "prune", folder=project)
    wait_until(lambda: any("stage.py" in process.cmdline() for process in worker.children(recursive=True)))
    for process in (worker, *worker.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended with the one before
            process.kill()
    set_params(methods={"wanda": "fail"})
    server.start_worker(project)
    assert sweep.wait(timeout=200) == 1
    said = server.log("sweep").read_text()
    assert "calibrate@a goes to another worker: worker ProcessWorker" in said
    assert "sweep: failed: prune@a-wanda (Failed" in said
    assert Path("data/prune/a/ria+cp").exists()
