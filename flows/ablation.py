"""Stage `ablation`: what each choice of the recipe is worth. Not part of the default run; resumes row by row."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from flows.paths import REPORT, Setting
from flows.prune import open_calibration
from flows.stage import run_stage
from flows.study import side_by_side
from permllm.ablation import AblationRow, run_row
from permllm.artifacts import fingerprint, read_tensors, source_fingerprint, write_json, write_tensors
from permllm.calibration.samples import tokenize
from permllm.calibration.texts import read_documents
from permllm.models.families import adapter_of
from permllm.models.loading import load_model, load_tokenizer
from permllm.params import Params
from permllm.permutation.permutation import Permutation
from permllm.pruning.permutations import LayerPermutations
from permllm.report.figures import ablation_figure, save_figure
from permllm.report.summary import gap_closed
from permllm.sparsity.pattern import NMPattern
from permllm.subject import Subject

SCRATCH = Path(".cache/ablation")


def ablation(params: Params, setting: Setting) -> dict[str, Any]:
    """Compare recipes and their switches, over seeds."""
    study = params.ablation
    rows = list(study.rows())
    for row in rows:
        if row.is_learned:  # all settings are checked before the first row runs
            row.config(params.model(row.model).learn)
    source = source_fingerprint("calibration", "evaluation", "lcp", "permutation", "pruning", "sparsity")
    folders = {name: SCRATCH / fingerprint([source, open_calibration(params, Setting(name)).fingerprint]) for name in {row.model for row in rows}}
    records = side_by_side("ablation row", study.jobs, _run, [(row, folders[row.model]) for row in rows])
    write_json(REPORT / "ablation.json", records)
    save_figure(ablation_figure(records), REPORT / "ablation.png")
    return {"rows": len(records)}


def _run(row: AblationRow, folder: Path) -> dict[str, Any]:
    """Return a row's record: the one of an earlier run, or a new one."""
    settings = _params().model(row.model)
    path = folder / f"{fingerprint([asdict(row), dict(settings.learn), asdict(settings.evaluate.perplexity)])}.json"
    if path.exists():
        return json.loads(path.read_text())
    started = time.perf_counter()
    record = run_row(_subject(row.model), row, settings.learn, _starts(row, folder))
    perplexities = {**_references(row.model, row.pattern), row.recipe: record["perplexity"]}
    names = {"recipe": "ablation" if row.is_switch else row.recipe, "around": row.recipe if row.is_switch else None, "change": _change(row.change)}
    record = {
        "model": row.model, "sparsity": row.pattern, "score": row.score, **names, "seed": row.seed,
        "gap_closed": gap_closed(perplexities, row.recipe), **record, "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip
    write_json(path, record)
    return record


def _change(change: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_words(value)}" for name, value in change.items())


def _words(value: Any) -> str:
    return " + ".join(f"{weight:g} {name}" for name, weight in value.items()) if isinstance(value, Mapping) else str(value)


@cache
def _params() -> Params:
    return Params.read()


@cache
def _subject(name: str) -> Subject:
    model_params = _params().model(name)
    source, judged = model_params.model_source(), model_params.evaluate.perplexity
    model, calibration = load_model(source), open_calibration(_params(), Setting(name))
    text = tokenize(list(read_documents(judged.text).values()), load_tokenizer(source))
    return Subject(model, adapter_of(model), calibration.samples, list(calibration.statistics), text, judged.length)


@cache
def _references(name: str, pattern: str) -> dict[str, float]:
    return _subject(name).references(NMPattern.parse(pattern))


def _starts(row: AblationRow, folder: Path) -> list[LayerPermutations]:
    """Return what a row begins from; rows that begin alike share it."""
    start = row.config(_params().model(row.model).learn).start if row.is_learned else row.recipe
    path = folder / f"start_{fingerprint([row.pattern, row.score, start, row.seed, row.layout])}.safetensors"
    if not path.exists():
        found = _subject(row.model).starts(NMPattern.parse(row.pattern), row.score, start, row.seed, row.layout)
        write_tensors(path, {f"{index}.{name}": permutation.order for index, layer in enumerate(found) for name, permutation in layer.items()})
    tensors = read_tensors(path)
    layers: list[LayerPermutations] = [{} for _ in _subject(row.model).statistics]
    for name, order in tensors.items():
        index, _, group = name.partition(".")
        layers[int(index)][group] = Permutation(order)
    return layers


def main(argv: list[str] | None = None) -> None:
    """Run the stage as a command."""
    run_stage("ablation", ablation, (), argv)


if __name__ == "__main__":
    main()
