"""Commands leave no process behind, whichever process of theirs or ours is killed."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from flows.processes import Commands

# A command that starts another in between, as DVC starts a shell that starts a stage; the last writes its id.
SLEEPER = [sys.executable, "-c", "import subprocess; subprocess.call(['sh', '-c', 'echo $$ > sleeper.pid; sleep 600; true'])"]


@pytest.fixture
def environment(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """An environment in which children find `flows`, in a new folder; a sleeper that a test leaves behind is ended."""
    monkeypatch.chdir(tmp_path)
    yield {**os.environ, "PYTHONPATH": str(repository)}
    if Path("sleeper.pid").exists():
        with contextlib.suppress(psutil.NoSuchProcess):
            process = sleeper()
            for descendant in (*process.children(), process):
                descendant.kill()


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)


def sleeper() -> psutil.Process:
    """Return the last process of SLEEPER, once it runs."""
    path = Path("sleeper.pid")
    wait_until(lambda: path.exists() and path.read_text().endswith("\n"))
    return psutil.Process(int(path.read_text()))


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_output_is_passed_on_line_by_line_with_the_exit_status(environment: dict[str, str]):
    lines: list[str] = []
    assert Commands().run(["sh", "-c", "echo out; echo error >&2; exit 3"], environment, lines.append) == 3
    assert lines == ["out", "error"]


def test_stop_ends_what_a_command_started_and_starts_no_more(environment: dict[str, str]):
    commands = Commands()
    thread = threading.Thread(target=commands.run, args=(SLEEPER, environment, print))
    thread.start()
    process = sleeper()
    commands.stop()
    thread.join(timeout=20)
    assert not thread.is_alive()
    wait_until(lambda: is_gone(process))
    with pytest.raises(RuntimeError, match="is being stopped"):
        commands.run(["true"], environment, print)


@pytest.mark.parametrize("generation", ["the guard", "the command"])
def test_a_killed_command_leaves_no_orphan_and_does_not_block(environment: dict[str, str], generation: str):
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(Commands().run(SLEEPER, environment, print)))
    thread.start()
    process = sleeper()
    guard = next(parent for parent in process.parents() if "flows.processes" in parent.cmdline())
    victim = guard if generation == "the guard" else guard.children()[0]
    victim.kill()
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert statuses != [0]
    wait_until(lambda: is_gone(process))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_commands_end_when_the_process_that_runs_them_is_killed(environment: dict[str, str]):
    program = f"import os; from flows.processes import Commands; Commands().run({SLEEPER!r}, os.environ, print)"
    owner = subprocess.Popen([sys.executable, "-c", program], env=environment)
    process = sleeper()
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    wait_until(lambda: is_gone(process))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
@pytest.mark.parametrize("shell", ["exec", "stays"])
def test_a_stage_ends_when_dvc_is_killed_whether_the_shell_in_between_stays_or_not(environment: dict[str, str], shell: str):
    announce = "print(os.getpid(), file=open('sleeper.pid', 'w'))"
    stage = f"import os, time; from flows.processes import die_with_dvc; die_with_dvc(); {announce}; time.sleep(600)"
    command = f'{"exec " if shell == "exec" else ""}{sys.executable} -c "{stage}"{"" if shell == "exec" else "; true"}'
    dvc = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess; subprocess.call(['sh', '-c', {command!r}])"], env={**environment, "DVC_STAGE": "learn"}
    )
    process = sleeper()
    time.sleep(0.5)
    assert not is_gone(process)
    dvc.send_signal(signal.SIGKILL)
    dvc.wait()
    wait_until(lambda: is_gone(process))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_a_flow_whose_worker_died_before_it_began_ends(environment: dict[str, str]):
    program = [sys.executable, "-c", "from flows.processes import die_with_worker; die_with_worker()"]
    assert subprocess.call(program, env=environment) == 0
    assert subprocess.call(program, env=environment | {"PREFECT__WORKER_NAME": "gone"}) == -signal.SIGTERM
