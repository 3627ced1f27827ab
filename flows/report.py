"""Stage `report`: compare all settings of the run in a table and figures."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from flows.paths import HISTORY, REPORT, Setting
from flows.stage import run_stage
from permllm.artifacts import replacing_folder, write_json, write_text
from permllm.params import DENSE, Params
from permllm.pruning.storage import load_pruning
from permllm.report.figures import learning_figure, mask_figure, perplexity_figure, save_figure
from permllm.report.summary import markdown_table, records, summarize


def report(params: Params, setting: Setting) -> dict[str, Any]:
    """Compare all settings of the run."""
    run, updates = params.run, {name: params.method(name).update for name in params.run.methods}
    rows = [
        row for model, pattern in product(run.models, run.patterns) for row in summarize(model, pattern, _metrics(params, model, pattern), updates)
    ]
    with replacing_folder(REPORT / "figures") as folder:
        for model in run.models:
            save_figure(perplexity_figure([row for row in rows if row.model == model]), folder / f"perplexity_{model}.png")
            histories = {f"{method}, {pattern}": _history(Setting(model, pattern, method)) for method, pattern in product(run.learned, run.patterns)}
            if histories:
                save_figure(learning_figure(histories, f"{model}: learning the permutations"), folder / f"learning_{model}.png")
            for pattern in run.patterns:
                name, masks = _masks(params, model, pattern)
                save_figure(mask_figure(masks, f"{name}, {pattern}"), folder / f"masks_{model}_{pattern.replace(':', 'of')}.png")
    write_json(REPORT / "summary.json", records(rows))
    write_text(REPORT / "table.md", markdown_table(rows, _free_counterparts(params)))
    return {"rows": len(rows)}


def _metrics(params: Params, model: str, pattern: str) -> dict[str, dict[str, Any]]:
    """Return what the stages measured, by method and stage, the dense model first."""
    metrics = {DENSE: {"evaluate": _read(Setting(model, method=DENSE).metrics("evaluate"))}}
    for method in params.run.methods:
        pruned = ("learn", "reconstruct") if params.method(method).pruning().is_learned else ("prune",)
        metrics[method] = {stage: _read(Setting(model, pattern, method).metrics(stage)) for stage in (*pruned, "assemble", "evaluate")}
    return metrics


def _free_counterparts(params: Params) -> dict[str, str]:
    """Return for every method of another layout the one that differs from it in nothing else, if it is part of the run."""
    methods = {name: params.method(name) for name in params.run.methods}
    return {
        name: other
        for name, method in methods.items()
        for other in methods
        if method.layout != "free" and methods[other] == replace(method, layout="free")
    }


def _history(setting: Setting) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (setting.path("learn") / HISTORY).read_text().splitlines()]


def _masks(params: Params, model: str, pattern: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the masks, by method, of the first linear of the middle decoder layer."""
    masks = {}
    for method in params.run.methods:
        pruning = load_pruning(Setting(model, pattern, method).path("prune"))
        index = len(pruning.manifest["groups"]) // 2
        path, linear = next(item for group in pruning.layer(index).values() for item in group.linears.items())
        masks[method] = linear.mask
    return f"{model}, layer {index}, {path}", masks


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def main(argv: list[str] | None = None) -> None:
    """Run the stage as a command."""
    run_stage("report", report, (), argv)


if __name__ == "__main__":
    main()
