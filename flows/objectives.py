"""Stage `objectives`: which permutations suit which weight update. Not part of the default run; resumes part by part."""

import json
import time
from dataclasses import asdict, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from flows.paths import REPORT, Setting
from flows.stage import run_stage
from flows.study import side_by_side
from permllm.artifacts import fingerprint, source_fingerprint, write_json
from permllm.calibration.samples import tokenize
from permllm.calibration.texts import read_documents
from permllm.lcp.recipes import LearnConfig
from permllm.models.loading import load_model, load_tokenizer
from permllm.objectives import ObjectivePart, after, find_permutations, objective_of
from permllm.params import Params
from permllm.report.figures import objectives_figure, save_figure
from permllm.report.summary import DENSE, gap_closed
from permllm.sparsity.pattern import NMPattern
from permllm.subject import Subject

SCRATCH = Path(".cache/objectives")


def objectives(params: Params, setting: Setting) -> dict[str, Any]:
    """Combine objectives of permutations with weight updates, over seeds."""
    study = params.objectives
    parts = list(study.parts())
    for part in parts:  # all settings are checked before the first part runs
        _config(params, part)
        for update in part.updates:
            after(params.method(part.method).pruning(), update)
    source = source_fingerprint("calibration", "evaluation", "lcp", "models", "permutation", "pruning", "sparsity")
    records = [record for rows in side_by_side("objectives part", study.jobs, _run, [(part, source) for part in parts]) for record in rows]
    write_json(REPORT / "objectives.json", records)
    save_figure(objectives_figure(records), REPORT / "objectives.png")
    return {"rows": len(records)}


def _config(params: Params, part: ObjectivePart) -> LearnConfig:
    method = params.method(part.method)
    config = params.learn(part.model, part.method) if method.pruning().is_learned else LearnConfig(layout=method.layout)
    return replace(config, seed=part.seed)


def _run(part: ObjectivePart, source: str) -> list[dict[str, Any]]:
    """Return the records of a part: those of an earlier run, or new ones."""
    params = _params()
    model_params, method, config = params.model(part.model), params.method(part.method).pruning(), _config(params, part)
    decides = [source, asdict(part), vars(method), asdict(config), model_params.source, model_params.dtype]
    decides += [asdict(model_params.calibrate), asdict(model_params.evaluate.perplexity)]
    path = SCRATCH / f"{fingerprint(decides)}.json"
    if path.exists():
        return json.loads(path.read_text())
    pattern = NMPattern.parse(part.pattern)
    subject, references = _subject(part.model, part.seed), _references(part.model, part.pattern, part.seed)
    started = time.perf_counter()
    permutations = find_permutations(subject, pattern, method, config)
    seconds = time.perf_counter() - started
    records = []
    for update in part.updates:
        found = subject.perplexity(subject.pruned(pattern, after(method, update), permutations))
        closed = gap_closed({**references, part.method: found}, part.method)
        records.append(
            {
                "model": part.model, "sparsity": part.pattern, "layout": method.layout, "objective": objective_of(method, config), "update": update,
                "seed": part.seed, "perplexity": round(found, 4), "gap_closed": closed, "dense_perplexity": round(references[DENSE], 4),
                "permutation_seconds": round(seconds, 1),
            }
        )  # fmt: skip
    write_json(path, records)
    return records


@cache
def _params() -> Params:
    return Params.read()


@lru_cache(maxsize=2)
def _subject(name: str, seed: int) -> Subject:
    model_params = _params().model(name)
    source, judged = model_params.model_source(), model_params.evaluate.perplexity
    tokenizer = load_tokenizer(source)
    calibration, text = (tokenize(list(read_documents(one.text).values()), tokenizer) for one in (model_params.calibrate, judged))
    return Subject.calibrated(load_model(source), calibration, model_params.calibrate, seed, text, judged.length)


@cache
def _references(name: str, pattern: str, seed: int) -> dict[str, float]:
    return _subject(name, seed).references(NMPattern.parse(pattern))


def main(argv: list[str] | None = None) -> None:
    """Run the stage as a command."""
    run_stage("objectives", objectives, (), argv)


if __name__ == "__main__":
    main()
