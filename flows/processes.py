"""Commands that leave no process behind, however they or this process end: no orphan keeps a GPU.

Every command runs in a process group of its own with a guard, `python -m flows.processes COMMAND`: this process ends
the group when the guard has ended, and the guard ends it when this process dies.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1
TRY_LATER = 75  # exit status of a command that could not reach what it needs: EX_TEMPFAIL of sysexits.h


class Commands:
    """Commands that run now, and can be stopped together from another thread."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen] = set()
        self._is_stopped = False
        self._lock = threading.Lock()

    def run(self, command: Sequence[str], environment: Mapping[str, str], on_line: Callable[[str], None]) -> int:
        """Run a command, pass on every line of its output as it comes, and return its exit status.

        Raises:
            RuntimeError: if `stop` was called before.
        """
        process = self._start(command, environment)
        reader = threading.Thread(target=lambda: [on_line(line.rstrip()) for line in process.stdout])
        reader.start()
        try:
            return process.wait()
        finally:
            self._running.discard(process)
            _end_group(process)  # what is left of it holds the output open
            reader.join()

    def stop(self) -> None:
        """End all commands with everything that they started, and start no more."""
        with self._lock:
            self._is_stopped = True
            for process in self._running.copy():
                _end_group(process)

    def _start(self, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen:
        guarded = [sys.executable, "-m", "flows.processes", *command]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with self._lock:
            if self._is_stopped:
                raise RuntimeError(f"{' '.join(command)} was not started: the run is being stopped")
            process = subprocess.Popen(guarded, env=dict(environment), **streams, text=True, errors="replace", start_new_session=True)
            self._running.add(process)
            return process


def _end_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)


def die_with_parent() -> None:
    """Ask the kernel to end this process when its parent dies. Only Linux can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def die_with_dvc() -> None:
    """End this process when DVC dies that runs it as a stage: DVC starts a shell, and some shells stay in between. Only Linux can."""
    die_with_parent()
    if sys.platform == "linux" and "DVC_STAGE" in os.environ:
        parent, _, rest = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")
        if parent.endswith("sh"):
            threading.Thread(target=_end_after, args=(int(rest.split()[1]),), daemon=True).start()


def die_with_worker() -> None:
    """End this process when the Prefect worker that started it dies, or died before this call. Only Linux can."""
    if sys.platform == "linux" and "PREFECT__WORKER_NAME" in os.environ:
        die_with_parent()
        if b"prefect" not in Path(f"/proc/{os.getppid()}/cmdline").read_bytes():  # the system gave this process another parent
            os.kill(os.getpid(), signal.SIGTERM)


def _end_after(process: int) -> None:
    """End this process once another has ended."""
    with contextlib.suppress(ProcessLookupError):  # it has
        select.select([os.pidfd_open(process)], [], [])
    os.kill(os.getpid(), signal.SIGTERM)


def guard(command: Sequence[str]) -> int:
    """Run a command; end the whole group when this process is told to end, or loses its parent.

    Returns:
        The exit status, 128 + the signal if the command died of one.
    """
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    die_with_parent()
    status = subprocess.call(command)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(guard(sys.argv[1:]))
