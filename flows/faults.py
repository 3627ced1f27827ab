"""The fault campaign: stages are killed at random moments, and meet full disks, damaged files and servers that go away.

`python -m flows.faults` writes data/benchmarks/faults.json: how many kills there were, what they lost, which results were
wrong in the end, and what came of every other fault. Every fault ends with a run that must give the bytes of an undisturbed one.
"""

import argparse
import contextlib
import functools
import json
import os
import platform
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from flows.rehearsal import MODEL, STAGES, Kill, NotTriedError, Rehearsal, RehearsalError, Stage
from permllm.artifacts import unfinished, versions, write_json

RESULT = Path("data/benchmarks/faults.json")
LAST_LINES = 3  # of what went wrong
DVC_SHARE = 0.25  # of the kills, through `dvc repro`; the others kill the stage itself
SMALL_DISK_BYTES = 64 << 20
FILE_LIMIT_BYTES = 20_000
RESULTS = 4  # that MLflow gets: three methods and the dense model
BY_ADDRESS = {stage.address: stage for stage in STAGES}
CALIBRATE = BY_ADDRESS[f"calibrate@{MODEL}"]
METHODS = {"prune": "sparsegpt+cp", "learn": "permllm", "reconstruct": "permllm", "assemble": "sparsegpt+cp", "evaluate": "sparsegpt+cp"}
PRUNE, LEARN, RECONSTRUCT, ASSEMBLE, EVALUATE = (
    next(stage for stage in STAGES if stage.name == name and stage.setting.method == method) for name, method in METHODS.items()
)
SHARDS = {  # a file that is damaged, who made it and who reads it
    "model": (f"data/models/{MODEL}/model-00002-of-00004.safetensors", None, CALIBRATE),
    "calibration": (f"data/calibrate/{MODEL}/layer_001.safetensors", CALIBRATE, PRUNE),
    "calibration, to learn from": (f"data/calibrate/{MODEL}/layer_003.safetensors", CALIBRATE, LEARN),
    "learned orders": (f"{LEARN.setting.path('learn')}/orders.safetensors", LEARN, RECONSTRUCT),
    "pruned layers": (f"{PRUNE.setting.path('prune')}/layer_002.safetensors", PRUNE, ASSEMBLE),
    "checkpoint": (f"{ASSEMBLE.setting.path('assemble')}/model-00003-of-00004.safetensors", ASSEMBLE, EVALUATE),
}


def kill_often(rehearsal: Rehearsal, kills: int, random: Random) -> Iterator[Kill]:
    """Kill stages at random moments, all of them about as often, a part of them under dvc."""
    under_dvc = {round(number / DVC_SHARE) for number in range(int(kills * DVC_SHARE))}
    more = _seconds_of_dvc(rehearsal, ASSEMBLE) if under_dvc else 0.0
    for number in range(kills):
        stage = random.choice(STAGES)
        if number in under_dvc:
            kill = rehearsal.kill_dvc(stage, random, rehearsal.seconds[stage.address] + more)
        else:
            kill = rehearsal.kill_bare(stage, random)
        print(f"kill {number + 1}/{kills}: {kill}", flush=True)
        yield kill


def _seconds_of_dvc(rehearsal: Rehearsal, stage: Stage) -> float:
    """Return how much longer a stage takes under dvc: imports, and what dvc does before and after."""
    started = time.perf_counter()
    rehearsal.dvc("repro", "--single-item", "--force", stage.address)
    return time.perf_counter() - started - rehearsal.seconds[stage.address]


def disk_full_before(rehearsal: Rehearsal, _: Random) -> str:
    """A disk that is too small from the start: refused before anything is written."""
    with _small_disk(rehearsal) as small, _filled():
        said = small.refusal(CALIBRATE)
        _expect("no space left for" in said, said)
    return f"refused: {said}"


def disk_full_midway(rehearsal: Rehearsal, _: Random) -> str:
    """A disk that another process fills when the stage has begun to write; then it is emptied."""
    said = []
    with _small_disk(rehearsal) as small:
        for stage in (CALIBRATE, PRUNE, LEARN, ASSEMBLE):
            small.remove(stage)
            running = small.start(stage)
            _wait_until(lambda stage=stage: _has_begun(stage))
            os.kill(running.process, signal.SIGSTOP)
            with _filled():
                os.kill(running.process, signal.SIGCONT)
                ended = running.wait()
            last = ended.log.splitlines()[-1]
            _expect(ended.status == 1 and "Traceback" not in ended.log and _is_about_space(last), ended.log)
            said.append(last)
            small.run(stage)
        _expect_equal(small)
    return f"refused, then recovered: {'; '.join(said)}"


def file_size_limit(rehearsal: Rehearsal, _: Random) -> str:
    """A limit on the size of files (RLIMIT_FSIZE), which stands for a quota."""
    said = rehearsal.refusal(PRUNE, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT_BYTES, FILE_LIMIT_BYTES)))
    _expect("cannot be written" in said or "too large" in said, said)
    rehearsal.run(PRUNE)
    return f"refused, then recovered: {said}"


def damaged(file: str, maker: Stage | None, reader: Stage, damage: Callable[[bytes, Random], bytes], rehearsal: Rehearsal, random: Random) -> str:
    """A file that changed since it was written: its reader refuses it, its maker mends it."""
    path = Path(file)
    content = path.read_bytes()
    path.unlink()  # another file of the same name: what is linked to the old one stays
    path.write_bytes(damage(content, random))
    said = rehearsal.refusal(reader)
    _expect(path.name in said or str(path.parent) in said, said)
    if maker is None:
        path.write_bytes(content)
    else:
        rehearsal.run(maker)
    rehearsal.run(reader)
    return f"refused, then recovered: {said}"


def truncated(content: bytes, random: Random) -> bytes:
    """Return the first part of a file."""
    return content[: random.randrange(1, len(content))]


def flipped(content: bytes, random: Random) -> bytes:
    """Return a file with one bit of its tensors changed."""
    place = random.randrange(8 + int.from_bytes(content[:8], "little"), len(content))
    return content[:place] + bytes([content[place] ^ 1 << random.randrange(8)]) + content[place + 1 :]


def read_only_folder(rehearsal: Rehearsal, _: Random) -> str:
    """A folder of results that cannot be written."""
    said = []
    for stage, folder in ((PRUNE, Path("data/prune")), (LEARN, Path("data/learn")), (EVALUATE, Path("data/metrics")), (CALIBRATE, Path(".cache"))):
        folder.mkdir(exist_ok=True)
        with _read_only(folder):
            said.append(rehearsal.refusal(stage))
        _expect("Read-only" in said[-1] or "Permission denied" in said[-1], said[-1])
        rehearsal.run(stage)
    return f"refused, then recovered: {'; '.join(said)}"


def mlflow_server_gone(rehearsal: Rehearsal, _: Random) -> str:
    """An MLflow server that dies while curves are copied to it: learning goes on, and one command records all later."""
    port = _free_port()
    command = ["mlflow", "server", "--backend-store-uri", "sqlite:///faults.db", "--port", str(port), "--workers", "1"]
    environment = {**rehearsal.environment, "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    python = functools.partial(subprocess.run, cwd=rehearsal.folder, env=environment, capture_output=True, text=True)
    with _served(command, port, environment) as server:
        live = subprocess.Popen([sys.executable, "-m", "flows.live", "--seconds", "0.1"], env=environment, stderr=subprocess.PIPE, text=True)
        try:
            running = rehearsal.start(LEARN)
            said = live.stderr.readline()  # the first lines are copied
            os.killpg(server.pid, signal.SIGKILL)
            _expect(running.wait().status == 0, "learning failed")
            before = python([sys.executable, "-m", "flows.track"])
        finally:
            live.kill()
            live.wait()
    _expect("new lines" in said and before.returncode == 75 and "does not answer" in before.stderr, said + before.stderr)
    rehearsal.record()  # as `dvc repro` would have done
    with _served(command, port, environment):
        after = python([sys.executable, "-m", "flows.track"])
    _expect(after.returncode == 0 and after.stdout.endswith(f"{RESULTS} new, 0 already there\n"), after.stdout + after.stderr)
    return f"recovered: learning went on; {before.stderr.splitlines()[-1]}; then: {after.stdout.splitlines()[-1]}"


def prefect_server_gone(rehearsal: Rehearsal, _: Random) -> str:
    """A Prefect server that dies while the flow runs: a new run goes on."""
    port = _free_port()
    home = {**rehearsal.environment, "PREFECT_HOME": str(rehearsal.folder / ".prefect")}
    flow = [sys.executable, "-m", "flows.pipeline", "--targets", EVALUATE.address]
    rehearsal.forget(EVALUATE)
    with _served(["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)], port, home, "/api/health") as server:
        log = rehearsal.folder / "flow.log"
        with log.open("w") as file:
            run = subprocess.Popen(flow, env={**home, "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}, stdout=file, stderr=file)
            _wait_until(lambda: "Running stage" in log.read_text() or run.poll() is not None)
            os.killpg(server.pid, signal.SIGKILL)
            try:
                status = run.wait(timeout=240)
            except subprocess.TimeoutExpired as error:
                run.kill()
                run.wait()
                raise RehearsalError("the flow did not end in four minutes after the server was gone") from error
    rehearsal.wait_for_the_end(EVALUATE)
    again = subprocess.run(flow, env=home, capture_output=True, text=True)
    _expect(again.returncode == 0, log.read_text() + again.stdout + again.stderr)
    return f"recovered: the flow ended with status {status}, and a new run went on"


FAULTS: dict[str, Callable[[Rehearsal, Random], str]] = {
    "disk full before the start (tmpfs of limited size)": disk_full_before,
    "disk full midway (tmpfs of limited size)": disk_full_midway,
    "file size limit (RLIMIT_FSIZE)": file_size_limit,
    **{f"truncated shard: {name}": functools.partial(damaged, *given, truncated) for name, given in SHARDS.items()},
    **{f"flipped bit: {name}": functools.partial(damaged, *given, flipped) for name, given in SHARDS.items() if given[1] is not None},
    "read-only folder": read_only_folder,
    "MLflow server gone": mlflow_server_gone,
    "Prefect server gone": prefect_server_gone,
}


def meet(fault: str, rehearsal: Rehearsal, random: Random) -> str:
    """Let a fault happen, and return what came of it; `failed` and why, if it is not as it should be."""
    try:
        outcome = FAULTS[fault](rehearsal, random)
        _expect_equal(rehearsal)
    except NotTriedError as reason:
        return f"not tried: {reason}"
    except (RehearsalError, subprocess.SubprocessError, OSError) as error:
        rehearsal.repair()
        return "failed: " + " / ".join(str(error).splitlines()[-LAST_LINES:])
    return f"{outcome}; bytes equal"


@contextlib.contextmanager
def _small_disk(rehearsal: Rehearsal) -> Iterator[Rehearsal]:
    """Yield the rehearsal in a folder on a disk that is small, entered."""
    small = rehearsal.folder / "small"
    small.mkdir(exist_ok=True)
    _system("mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_BYTES}", "tmpfs", str(small))
    try:
        shutil.copytree("data", small / "data")
        shutil.copy("params.yaml", small)
        with contextlib.chdir(small):
            yield rehearsal
    finally:
        _system("umount", str(small))
        small.rmdir()


@contextlib.contextmanager
def _filled() -> Iterator[None]:
    """Have no byte left on the disk of this folder."""
    filler = Path("filler")
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def _read_only(folder: Path) -> Iterator[None]:
    """Make a folder read-only: root ignores permissions, so for root it is mounted anew."""
    if os.geteuid():
        mode = folder.stat().st_mode
        folder.chmod(0o555)
        try:
            yield
        finally:
            folder.chmod(mode)
        return
    _system("mount", "--bind", str(folder), str(folder))
    try:
        _system("mount", "-o", "remount,ro,bind", str(folder))
        yield
    finally:
        _system("umount", str(folder))


@contextlib.contextmanager
def _served(command: list[str], port: int, environment: dict[str, str], path: str = "/health") -> Iterator[subprocess.Popen]:
    """Run a server, and yield it when it answers."""
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([sys.executable, "-m", *command], env=environment, start_new_session=True, **silent)
    try:
        _wait_until(lambda: _answers(f"http://127.0.0.1:{port}{path}"))
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError:
        return False
    return True


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _system(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NotTriedError(f"`{' '.join(command)}` ended with status {done.returncode} ({done.stderr.strip()}); it needs root")


def _has_begun(stage: Stage) -> bool:
    places = [stage.setting.scratch(stage.name), *map(unfinished, stage.outputs())]
    return any(path.suffix in (".json", ".safetensors", ".pt") and "partial" not in path.name for place in places for path in place.rglob("*"))


def _is_about_space(line: str) -> bool:
    return any(words in line for words in ("No space left", "no space left", "is the disk full?"))


def _wait_until(is_so: Callable[[], bool], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            raise RehearsalError(f"nothing happened within {seconds} seconds")
        time.sleep(0.002)


def _expect(is_so: bool, said: str) -> None:
    if not is_so:
        raise RehearsalError(f"expected otherwise: {said}")


def _expect_equal(rehearsal: Rehearsal) -> None:
    if wrong := rehearsal.differences():
        raise RehearsalError(f"bytes differ: {', '.join(wrong)}")


def campaign(repository: Path, kills: int, seed: int, faults: list[str]) -> Iterator[dict[str, Any]]:
    """Run the campaign, and yield its record whenever a kill or a fault has been added."""
    started, home = time.perf_counter(), Path.cwd()
    done: list[Kill] = []
    outcomes: dict[str, str] = {}
    with TemporaryDirectory(prefix="permllm-faults-") as folder:
        try:
            rehearsal = Rehearsal.prepare(repository, Path(folder).resolve())
            for fault in faults:
                outcomes[fault] = meet(fault, rehearsal, Random(seed))
                print(f"{fault}: {outcomes[fault]}", flush=True)
                yield _record(done, outcomes, seed, started)
            for kill in kill_often(rehearsal, kills, Random(seed)):
                done.append(kill)
                yield _record(done, outcomes, seed, started)
        finally:
            os.chdir(home)


def _record(done: list[Kill], outcomes: dict[str, str], seed: int, started: float) -> dict[str, Any]:
    return {
        "kills": len(done),
        "lost": sum(bool(kill.lost) for kill in done),
        "wrong": sum(bool(kill.wrong) for kill in done),
        "ran_again_unrecorded": sum(kill.unrecorded for kill in done),
        "cut_off_locks_mended": sum(kill.mended for kill in done),
        "killed": dict(sorted(Counter(f"{kill.stage.partition('@')[0]}, {kill.how}" for kill in done).items())),
        "problems": [problem for kill in done for problem in (*kill.lost, *kill.wrong)],
        "faults": outcomes,
        "seed": seed,
        "seconds": round(time.perf_counter() - started),
        "versions": {**versions(), "system": platform.platform()},
    }


def main(argv: list[str] | None = None) -> None:
    """Run the fault campaign, and write what came of it."""
    parser = argparse.ArgumentParser(prog="python -m flows.faults", description=main.__doc__)
    parser.add_argument("--kills", type=int, default=100, help="at least 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", nargs="*", choices=FAULTS, default=list(FAULTS), metavar="FAULT", help=f"of: {'; '.join(FAULTS)}")
    parser.add_argument("--result", type=Path, default=RESULT)
    chosen = parser.parse_args(argv)
    root = Path.cwd()  # the campaign works elsewhere
    import torch

    torch.set_num_threads(1)  # forks of a process with more of them hang
    command = " ".join(["python -m flows.faults", *(sys.argv[1:] if argv is None else argv)])
    for record in campaign(root, chosen.kills, chosen.seed, chosen.faults):
        write_json(root / chosen.result, {**record, "command": command})
    failed = [fault for fault, outcome in record["faults"].items() if outcome.startswith("failed")]
    print(json.dumps({name: record[name] for name in ("kills", "lost", "wrong")}), f"failed: {', '.join(failed) or 'none'}")
    sys.exit(bool(record["lost"] or record["wrong"] or failed))


if __name__ == "__main__":
    main()
