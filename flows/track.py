"""MLflow: one run per model, sparsity and method, copied once from what DVC recorded of its stages.

A stage that DVC skips or restores does not run, so the stages cannot log for themselves. A run carries the fingerprint
of all stages behind it, of commands, code, settings and outputs: what MLflow has is not added again, and old runs stay.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.experiment import Experiment, UnreachableError, curve, setting_tags
from flows.graph import Stages, needs_of, read_records, read_stages
from flows.paths import DATA, HISTORY, REPORT, Setting
from flows.processes import TRY_LATER
from permllm.artifacts import unfinished
from permllm.report.summary import DENSE

METRICS = DATA / "metrics"
READ = ("metrics", "prune", "learn", "benchmark")  # artifacts that a run is filled from
KERNELS = ("dense", "masked", "semi_structured")
PRUNED = ("retained_score", "output_error")  # the stage `reconstruct` prunes too: one name, so that methods compare
METRICS_PER_BATCH = 1000
SOURCES = ("dvc.yaml", "params.yaml", "flows", "permllm")
logger = logging.getLogger("permllm")


class NotRecordedError(ValueError):
    """There is no finished result of a setting that DVC has recorded."""


@dataclass(frozen=True)
class Result:
    """A finished result, as dvc.lock has it.

    Attributes:
        setting: with model, pattern and method; the dense model is a method of every pattern.
        entries: of dvc.lock, by the address of the stage.
    """

    setting: Setting
    entries: Mapping[str, Mapping[str, Any]]

    @property
    def fingerprint(self) -> str:
        """The hash of all entries, 16 hexadecimal digits; without the metrics, which hold seconds that never repeat."""
        entries = {}
        for address, entry in self.entries.items():
            entries[address] = {**entry, "outs": [out for out in entry.get("outs", ()) if METRICS not in Path(out["path"]).parents]}
        return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def outputs(self) -> dict[Path, str]:
        """The hash of every output."""
        return {Path(out["path"]): out["md5"] for entry in self.entries.values() for out in entry.get("outs", ())}

    def check(self) -> None:
        """Refuse stages that do not fit together, and files that are not those that DVC recorded.

        Raises:
            NotRecordedError: naming the files.
        """
        hashes = defaultdict(set)
        for entry in self.entries.values():
            for record in (*entry.get("deps", ()), *entry.get("outs", ())):
                hashes[record["path"]].add(record.get("md5"))
        mixed = [path for path, found in hashes.items() if len(found) > 1]
        if mixed:
            raise NotRecordedError(f"its stages saw different versions of {', '.join(mixed)}; run the pipeline again")
        wrong = [str(path) for path, md5 in self.outputs.items() if path.parts[1] in READ and not _is_there(path, md5)]
        if wrong:
            raise NotRecordedError(f"dvc.lock records another {', '.join(wrong)}; run `dvc checkout` or the pipeline again")


def _is_there(path: Path, md5: str) -> bool:
    """Return whether an output is there; of a file, whether it is the one that was recorded."""
    return path.is_dir() or (path.is_file() and hashlib.md5(path.read_bytes()).hexdigest() == md5)


def settings_of(stages: Stages) -> dict[Setting, set[str]]:
    """Return the settings that have a result, each with the addresses of all stages behind it."""
    benchmarks = {stage.setting: address for address, stage in stages.items() if stage.name == "benchmark"}
    settings = {}
    for address, stage in stages.items():
        model, pattern = stage.setting.model, stage.setting.pattern
        if stage.name == "evaluate":
            settings[stage.setting] = needs_of(stages, address) | {benchmarks[Setting(model, pattern)]}
        elif stage.name == "evaluate_dense":
            settings |= {Setting(model, of.pattern, DENSE): needs_of(stages, address) | {benchmarks[of]} for of in benchmarks if of.model == model}
    return settings


def finished_results(stages: Stages) -> Iterator[Result]:
    """Yield the results that are complete, and say in the log why others are not."""
    entries = read_records()
    for setting, addresses in settings_of(stages).items():
        result = Result(setting, {address: entries[address] for address in sorted(addresses & entries.keys())})
        try:
            missing = sorted(addresses - entries.keys())
            if missing:
                raise NotRecordedError(f"{', '.join(missing)} did not run yet")
            result.check()
        except NotRecordedError as reason:
            logger.warning("%s is not tracked: %s", result.setting.title, reason)
        else:
            yield result


def track(stages: Stages) -> tuple[int, int]:
    """Write a run for every finished result that MLflow does not have.

    Returns:
        How many results were new, and how many were there already.
    """
    results = list(finished_results(stages))
    if not results:
        return 0, 0
    with Experiment.open() as experiment:
        new = [result for result in results if not _is_logged(experiment, result)]
        for result in new:
            _log(experiment, result)
        for result in results:
            if not unfinished(result.setting.path("learn")).exists():  # else it learns again
                experiment.delete_live_runs(result.setting)
    return len(new), len(results) - len(new)


def _is_logged(experiment: Experiment, result: Result) -> bool:
    """Return whether there is a whole run of the result; remove what a killed `track` left of one."""
    client = experiment.client
    runs = client.search_runs([experiment.identity], f"tags.`dvc.fingerprint` = '{result.fingerprint}'")
    for run in runs:
        if run.info.status != "FINISHED":
            client.delete_run(run.info.run_id)
    return any(run.info.status == "FINISHED" for run in runs)


def _log(experiment: Experiment, result: Result) -> None:
    """Write a run; it counts once its status is FINISHED, which comes last."""
    from mlflow.entities import Metric, Param

    client = experiment.client
    now = int(time.time() * 1000)
    metrics = [Metric(name, value, now, step) for name, step, value in _metrics(result)]
    params = [Param(name, str(value)) for name, value in _params(result).items()]
    run = client.create_run(experiment.identity, start_time=now, tags=_tags(result), run_name=result.setting.title).info.run_id
    client.log_batch(run, metrics[:METRICS_PER_BATCH], params)
    for start in range(METRICS_PER_BATCH, len(metrics), METRICS_PER_BATCH):
        client.log_batch(run, metrics[start : start + METRICS_PER_BATCH])
    client.log_dict(run, dict(result.entries), "dvc.lock.json")
    for figure in _figures(result):
        client.log_artifact(run, str(figure), "figures")
    client.set_terminated(run)


def _tags(result: Result) -> dict[str, str]:
    """Return what a run is found by, and where it comes from."""
    hashes = {}
    for path, md5 in result.outputs.items():
        name = path.parts[1:3] if METRICS in path.parents else path.parts[1:2]
        hashes[f"dvc.md5.{'.'.join(name)}"] = md5
    return {
        **setting_tags(result.setting),
        "dvc.fingerprint": result.fingerprint,
        "git.commit": _git("rev-parse", "HEAD"),
        "git.changed": _git("diff", "--name-only", "HEAD", "--", *SOURCES),
        **hashes,
    }


def _git(*arguments: str) -> str:
    return " ".join(subprocess.run(["git", *arguments], capture_output=True, text=True).stdout.split())


def _params(result: Result) -> dict[str, Any]:
    """Return the settings that the stages ran with: those DVC recorded, and of the pruning what its manifest says."""
    prefix = f"models.{result.setting.model}."
    recorded = {name: value for entry in result.entries.values() for name, value in entry.get("params", {}).get("params.yaml", {}).items()}
    params = {name.removeprefix(prefix): value for name, value in recorded.items() if name.startswith(prefix)}
    if result.setting.method != DENSE:
        manifest, learned = _read(result.setting.path("prune") / "manifest.json"), result.setting.path("learn")
        params |= {**manifest["method_settings"], "prune": manifest["settings"], "seed": manifest["seed"]}
        if learned in result.outputs:
            params["learn"] = _read(learned / "manifest.json")["settings"]
    params["machine"] = _latency(result.setting)["machine"]
    return dict(_flat(params))


def _metrics(result: Result) -> Iterator[tuple[str, int, float]]:
    """Yield name, step and value: what the stages measured, the learning curves by epoch, and latencies."""
    for path in result.outputs:
        if METRICS in path.parents:
            stage, measured = path.parts[2], _read(path)
            measured |= measured.pop("zero_shot", {})
            for name, value in _flat(measured):
                yield f"{'prune' if name in PRUNED else stage}/{name}", 0, value
    history = result.setting.path("learn") / HISTORY
    if history.parent in result.outputs:
        yield from curve(history.read_text().splitlines())
    for name, latency_ms in _latencies_ms(result.setting).items():
        yield f"benchmark/{name}", 0, latency_ms


def _latencies_ms(setting: Setting) -> Mapping[str, float]:
    """Return the latency of all linears of the model together, by kernel and batch size."""
    totals: Counter[str] = Counter()
    for row in _latency(setting)["rows"]:
        if row["kernel"] in KERNELS[: 1 if setting.method == DENSE else None] and row["ms"] is not None:
            totals[f"{row['kernel']}_{row['tokens']}_tokens_ms"] += row["linears"] * row["ms"]
    return totals


def _latency(setting: Setting) -> dict[str, Any]:
    return _read(Setting(setting.model, setting.pattern).path("benchmark") / "latency.json")


def _figures(result: Result) -> list[Path]:
    """Return the report's figures of a result; none if the report was made without it."""
    setting, summary = result.setting, REPORT / "summary.json"
    evaluated = _read(next(path for path in result.outputs if METRICS / "evaluate" in path.parents))
    rows = _read(summary) if summary.exists() else []
    reported = {(row["model"], row["sparsity"], row["method"]): row["perplexity"] for row in rows}
    known = reported.get((setting.model, setting.pattern, setting.method), math.nan)
    if not math.isclose(known, evaluated["perplexity"], rel_tol=1e-4):  # the report rounds
        return []
    names = [f"perplexity_{setting.model}", f"learning_{setting.model}", f"masks_{setting.model}_{setting.pattern.replace(':', 'of')}"]
    return [path for name in names if (path := REPORT / "figures" / f"{name}.png").exists()]


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a nested record, named by their path."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def main() -> None:
    """Track as a command. Its exit status is `TRY_LATER` if MLflow's server does not answer."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        new, known = track(read_stages())
    except UnreachableError as error:
        logger.warning("%s", error)
        sys.exit(TRY_LATER)
    except ValueError as error:
        sys.exit(f"track: {error}")
    print(f"{new} new, {known} already there")


if __name__ == "__main__":
    main()
