"""A small copy of the project, in which stages are run, disturbed, run again, and their files compared.

The model is a random LLaMA, so that a stage takes about a second. A stage runs bare, as a fork of this process, which
has the libraries in memory (a random moment then lies in its work, not in its imports), or as the child of `dvc repro`.
"""

import contextlib
import importlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

from ruamel.yaml import YAML

from flows.graph import AXES, read_records
from flows.mend import mend
from flows.paths import Setting
from permllm.artifacts import read_yaml, sha256, write_json
from permllm.benchmark.memory import LlamaShape, write_random_llama
from permllm.lcp.run import State
from permllm.scratch import Scratch

MODEL, PATTERN = "random", "2:4"
ONE_SHOT = {"sparsegpt+cp": {"update": "sparsegpt", "permutation": "cp"}, "cp-foldable": {"permutation": "cp", "layout": "foldable"}}
LEARNED = {"permllm": {"permutation": "lcp", "learn": {"start": "cp"}}}
SHAPE = LlamaShape(64, 6, 96, 4, 2, 4096)
PASSAGES = 4
QUESTIONS = [{"query": f"Number {number} is", "choices": ["even", "odd"], "gold": number % 2} for number in range(16)]
RESULTS = ("calibrate", "prune", "learn", "assemble", "benchmark", "metrics")  # below data/
UNREPEATABLE = ("seconds",)  # of a metrics file
SLOW_IMPORTS = ("lm_eval.models.huggingface", "lm_eval.tasks", "datasets", "transformers.models.llama.modeling_llama", "matplotlib.pyplot")
STALE = "0" * 32  # no hash of any input
DONE_ALREADY = r"{}: (\d+) of \d+ are done already"
PATIENCE = 120  # seconds for what takes one or two


class RehearsalError(RuntimeError):
    """What should have worked did not."""


class NotTriedError(RuntimeError):
    """A fault that this machine, or this user, cannot make happen."""


@dataclass(frozen=True)
class Stage:
    """A stage as a command.

    Attributes:
        part: what its log calls the parts that an interrupted run keeps; None if it keeps none.
        makes: which folders below data/ its results lie in.
    """

    name: str
    setting: Setting
    part: str | None = None
    makes: tuple[str, ...] = ()

    @property
    def arguments(self) -> list[str]:
        """What the command is given."""
        return [word for axis in AXES if (value := getattr(self.setting, axis)) for word in (f"--{axis}", value)]

    @property
    def address(self) -> str:
        """What DVC calls it."""
        name = "evaluate_dense" if self.name == "evaluate" and self.setting.pattern is None else self.name
        chosen = [value for value in vars(self.setting).values() if value and value != "dense"]
        return f"{name}@{'-'.join(chosen)}"

    def outputs(self) -> list[Path]:
        """Return the folders of its results."""
        return [self.setting.path(name) for name in self.makes]


def _stages() -> tuple[Stage, ...]:
    model, of = Setting(MODEL), {method: Setting(MODEL, PATTERN, method) for method in (*ONE_SHOT, *LEARNED)}
    return (
        Stage("calibrate", model, "calibrate layer", ("calibrate",)),
        *(Stage("prune", of[method], "prune layer", ("prune",)) for method in ONE_SHOT),
        *(Stage("learn", of[method], "learn epoch", ("learn",)) for method in LEARNED),
        *(Stage("reconstruct", of[method], "prune layer", ("prune",)) for method in LEARNED),
        *(Stage("assemble", setting, None, ("assemble",)) for setting in of.values()),
        *(Stage("evaluate", setting, "evaluate task") for setting in of.values()),
    )


STAGES = _stages()  # in the order of the graph
OTHERS = (Stage("evaluate", Setting(MODEL, None, "dense"), "evaluate task"), Stage("benchmark", Setting(MODEL, PATTERN), None, ("benchmark",)))


def parameters() -> dict[str, Any]:
    """Return params.yaml."""
    text = {"files": "data/prose/*.txt"}
    tasks = {"continuation": text, "openbookqa": {"files": "data/prose/questions.jsonl"}}
    model = {
        "source": f"data/models/{MODEL}",
        "dtype": "float32",
        "device": "cpu",
        "calibrate": {"text": text, "sequences": 40, "length": 96, "held_out": 8, "batch_size": 4},
        "prune": {"sequential": False},
        "learn": {"epochs": 4, "sequences": 8, "batch_size": 2},
        "benchmark": {"tokens": [1], "seconds": 0.001},
        "evaluate": {"perplexity": {"text": text, "length": 96, "batch_size": 4}, "zero_shot": {"tasks": tasks, "per_passage": 2}},
    }
    methods = {**ONE_SHOT, **LEARNED}
    run = {"models": [MODEL], "patterns": [PATTERN], "one_shot": list(ONE_SHOT), "learned": list(LEARNED), "methods": list(methods)}
    return {"run": run, "methods": methods, "models": {MODEL: model}}


@dataclass(frozen=True)
class Ended:
    """How a command ended, when it did.

    Attributes:
        status: as of `subprocess`: negative if a signal ended it.
        log: all that it said.
    """

    status: int
    seconds: float
    log: str


@dataclass(frozen=True)
class Kill:
    """What came of a kill and of the run after it.

    Attributes:
        how: bare, dvc (dvc itself was hit) or child (the stage below dvc).
        lost: what was finished and was gone, or was done again.
        wrong: results whose bytes are not those of the undisturbed run, after the kill or in the end, and what is left over.
        unrecorded: whether the kill came after the stage's results were whole and before dvc.lock had them: dvc runs the stage again.
        mended: whether it left a lock file of dvc cut off.
    """

    stage: str
    how: str
    seconds: float
    lost: tuple[str, ...]
    wrong: tuple[str, ...]
    unrecorded: bool = False
    mended: bool = False


@dataclass(frozen=True)
class Rehearsal:
    """The copy of the project, after its stages have run undisturbed.

    Attributes:
        reference: the hash of every result.
        seconds: what every stage took, bare, by address.
    """

    folder: Path
    reference: Mapping[str, str]
    seconds: Mapping[str, float]

    @classmethod
    def prepare(cls, repository: Path, folder: Path) -> "Rehearsal":
        """Copy the project, run all stages once, and have DVC record them. The process must be in `folder` from then on."""
        _copy_project(repository, folder)
        for module in SLOW_IMPORTS:
            importlib.import_module(module)
        os.chdir(folder)
        new = cls(folder, {}, {})
        seconds = {stage.address: new.run(stage).seconds for stage in (*STAGES, *OTHERS)}
        new.dvc("init", "--quiet", "--no-scm")
        new.record()
        return replace(new, reference=new.hashes(), seconds=seconds)

    def hashes(self) -> dict[str, str]:
        """Return a hash of every result, by its path below data/; that of metrics without what never repeats."""
        paths = (path for name in RESULTS for path in sorted(Path("data", name).rglob("*")) if path.is_file())
        return {str(path): _content(path) for path in paths}

    def differences(self) -> list[str]:
        """Return which results are not those of the undisturbed run, or are left over of others."""
        found = self.hashes()
        left = [str(path) for path in Path(".cache").rglob("*") if path.is_file()]
        return sorted(path for path in found.keys() | self.reference.keys() if found.get(path) != self.reference.get(path)) + left

    def spoiled(self) -> list[str]:
        """Return which results are there and are not those of the undisturbed run; others may be missing."""
        return [path for path, found in self.hashes().items() if "partial" not in path and found != self.reference.get(path)]

    def start(self, stage: Stage, prepare: Callable[[], None] = lambda: None) -> "Running":
        """Start a stage in a process of its own; `prepare` runs there first."""
        log = self.folder / "stage.log"
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            _become(stage, log, prepare)
        return Running(child, log, time.perf_counter())

    def refusal(self, stage: Stage, prepare: Callable[[], None] = lambda: None) -> str:
        """Run a stage that cannot work, and return what it says in its last line.

        Raises:
            RehearsalError: if it does not fail, or fails with a traceback.
        """
        ended = self.start(stage, prepare).wait()
        if ended.status != 1 or "Traceback" in ended.log:
            raise RehearsalError(f"{stage.address} ended with status {ended.status}, but was to refuse:\n{ended.log}")
        return ended.log.splitlines()[-1]

    def run(self, stage: Stage) -> Ended:
        """Run a stage to its end.

        Raises:
            RehearsalError: if it fails.
        """
        ended = self.start(stage).wait()
        if ended.status:
            raise RehearsalError(f"{stage.address} ended with status {ended.status}:\n{ended.log}")
        return ended

    def dvc(self, *arguments: str) -> str:
        """Run dvc to its end, and return all that it said.

        Raises:
            RehearsalError: if it fails.
        """
        done = subprocess.run(_dvc(*arguments), capture_output=True, text=True, env=self.environment)
        if done.returncode:
            raise RehearsalError(f"dvc {' '.join(arguments)} ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    @cached_property
    def environment(self) -> dict[str, str]:
        """What commands run with: this Python first."""
        path = os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)))
        return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

    def record(self) -> None:
        """Have DVC take the results for those of its stages."""
        self.dvc("commit", "--force", *(stage.address for stage in (*STAGES, *OTHERS)))

    def remove(self, stage: Stage) -> None:
        """Forget that a stage has run."""
        for folder in stage.outputs():
            shutil.rmtree(folder, ignore_errors=True)
        stage.setting.metrics(stage.name).unlink(missing_ok=True)

    def repair(self) -> None:
        """Run all stages again, so that what one fault spoiled is no fault of the next."""
        shutil.rmtree(".cache", ignore_errors=True)
        for stage in STAGES:
            self.run(stage)

    def kill_bare(self, stage: Stage, random: Random) -> Kill:
        """Kill a stage at a random moment of its work, run it again, and compare."""
        if random.random() < 0.5:  # else the old result is there, and has to stay
            self.remove(stage)
        before, seconds = self.hashes(), self.seconds[stage.address]
        while True:
            moment = random.uniform(0, seconds)
            ended = self.start(stage).kill_after(moment)
            if ended.status == -signal.SIGKILL:
                break
            self._expect_equal(stage)
            seconds = ended.seconds  # it was faster than the moment: once more
        lost, spoiled, kept = self._gone(before, stage), self.spoiled(), parts_kept(stage)
        lost += _done_again(stage, kept, self.run(stage).log)
        return Kill(stage.address, "bare", moment, tuple(lost), (*spoiled, *self.differences()))

    def kill_dvc(self, stage: Stage, random: Random, seconds: float) -> Kill:
        """Kill `dvc repro` of a stage, or the stage below it, at a random moment; then let dvc end it, and compare.

        Args:
            seconds: what it takes undisturbed.
        """
        while True:
            self.forget(stage)
            mend()  # as the flow does before every stage
            before, recorded, started = self.hashes(), read_records().keys(), time.time_ns()
            running = subprocess.Popen(_dvc(*_repro(stage)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=self.environment)
            moment = random.uniform(0, seconds)
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(moment)
                seconds = (time.time_ns() - started) / 1e9  # it was faster than the moment: once more
                self._expect_equal(stage)
                continue
            children, how = self._children(stage), random.choice(("dvc", "child"))
            for process in children if how == "child" and children else [running.pid]:
                os.kill(process, signal.SIGKILL)
            if running.wait() != 0:
                break
        self.wait_for_the_end(stage)
        metrics = stage.setting.metrics(stage.name)
        is_whole = metrics.exists() and metrics.stat().st_mtime_ns > started
        spoiled, kept, mended = self.spoiled(), parts_kept(stage), mend()
        records = read_records()
        is_recorded = records[stage.address]["deps"][0]["md5"] != STALE
        lost = [f"{address} is recorded no more" for address in sorted(recorded - records.keys())]
        if not is_recorded:
            self.dvc("checkout", "--force", stage.address)  # DVC removes earlier results before it runs a stage, and can put them back
        lost += self._gone(before, stage)
        log = self.dvc(*_repro(stage))
        lost += [f"{stage.address} was recorded and ran again"] if is_recorded and f"Running stage '{stage.address}'" in log else []
        lost += _done_again(stage, kept, log)
        how = how if children else "dvc"
        return Kill(stage.address, how, moment, tuple(lost), (*spoiled, *self.differences()), is_whole and not is_recorded, bool(mended))

    def _gone(self, before: Mapping[str, str], stage: Stage) -> list[str]:
        """Say which results were there before, and are neither there nor where they wait for the new ones."""
        return [
            f"{path} is gone"
            for path in before
            if not Path(path).exists()
            and not any(Path(path).is_relative_to(folder) and folder.with_name(f".{folder.name}.old.partial").exists() for folder in stage.outputs())
        ]

    def _expect_equal(self, stage: Stage) -> None:
        if wrong := self.differences():
            raise RehearsalError(f"{stage.address} has other results than before, undisturbed: {', '.join(wrong)}")

    def forget(self, stage: Stage) -> None:
        """Have dvc.lock say that a stage saw another input, and DVC forget all runs: it runs the stage and restores none."""
        lock = read_yaml(Path("dvc.lock"))
        lock["stages"][stage.address]["deps"][0]["md5"] = STALE
        YAML().dump(lock, Path("dvc.lock"))
        shutil.rmtree(".dvc/cache/runs", ignore_errors=True)

    def _children(self, stage: Stage) -> list[int]:
        return [process for process, command in _processes(self.folder) if f"flows.{stage.name}" in command]

    def wait_for_the_end(self, stage: Stage) -> None:
        """Wait until no process of the stage runs.

        Raises:
            RehearsalError: if one does after minutes.
        """
        deadline = time.monotonic() + PATIENCE
        while self._children(stage):
            if time.monotonic() > deadline:
                raise RehearsalError(f"{stage.address} outlived dvc")
            time.sleep(0.02)


@dataclass(frozen=True)
class Running:
    """A stage that runs."""

    process: int
    log: Path
    started: float

    def kill_after(self, seconds: float) -> Ended:
        """Kill it after some seconds, unless it ends before."""
        handle = os.pidfd_open(self.process)
        select.select([handle], [], [], max(self.started + seconds - time.perf_counter(), 0))
        os.close(handle)
        os.kill(self.process, signal.SIGKILL)  # still ours, even if it has ended: nobody has waited for it
        return self.wait()

    def wait(self) -> Ended:
        """Wait for its end."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        return Ended(status, time.perf_counter() - self.started, self.log.read_text(errors="replace"))


def parts_kept(stage: Stage) -> dict[str, int]:
    """Return how many parts of an interrupted stage are finished, by what its log calls them."""
    found: dict[str, int] = {}
    home = stage.setting.scratch(stage.name)
    for folder in home.iterdir() if home.is_dir() else ():
        if folder.is_dir():
            number = State.read(folder / "state.pt").epochs or len(Scratch(folder)) or len(list(folder.glob("result_*.json")))
            found |= {stage.part: number} if stage.part and number else {}
    return found


def _done_again(stage: Stage, kept: Mapping[str, int], log: str) -> list[str]:
    """Return which finished parts the log of the run after does not take up."""
    problems = []
    for part, number in kept.items():
        taken_up = re.search(DONE_ALREADY.format(part), log)
        if taken_up is None or int(taken_up[1]) != number:
            problems.append(f"{stage.address}: {number} times {part} done, {taken_up[1] if taken_up else 0} taken up")
    return problems


def _content(path: Path) -> str:
    if "metrics" not in path.parts and path.name != "latency.json":
        return sha256(path)
    record = json.loads(path.read_text())
    return json.dumps({name: value for name, value in record.items() if name not in UNREPEATABLE} if path.name != "latency.json" else "measured")


def _copy_project(repository: Path, folder: Path) -> None:
    for name in ("flows", "permllm"):
        shutil.copytree(repository / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copy(repository / name, folder / name)
    prose = folder / "data" / "prose"
    prose.mkdir(parents=True)
    for path in sorted((repository / "data" / "prose").glob("a_*.txt"))[:PASSAGES]:
        shutil.copy(path, prose)
    (prose / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    write_random_llama(folder / "data" / "models" / MODEL, SHAPE, repository / "data" / "models" / "llama-5m")
    write_json(folder / "params.yaml", parameters())


def _become(stage: Stage, log: Path, prepare: Callable[[], None]) -> None:
    """Turn this forked process into a stage."""
    status = 1
    try:
        with log.open("w") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        prepare()
        importlib.import_module(f"flows.{stage.name}").main(stage.arguments)
        status = 0
    except SystemExit as refused:
        print(refused.code, file=sys.stderr)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _dvc(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dvc", *arguments]


def _repro(stage: Stage) -> tuple[str, ...]:
    return "repro", "--single-item", stage.address


def _processes(folder: Path) -> Iterator[tuple[int, str]]:
    """Yield number and command of every process that runs in a folder."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == folder:
                yield int(process.name), (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it ended meanwhile, or belongs to somebody else
            continue
