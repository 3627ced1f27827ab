"""The study of objectives and updates on a tiny model: its rows, and that a second run takes up what the first one left."""

import json
from pathlib import Path

import pytest
import yaml

from flows import objectives

pytestmark = pytest.mark.slow

METHODS = {
    "wanda": {"score": "wanda"},
    "cp-foldable": {"score": "obs", "permutation": "cp", "layout": "foldable"},
    "permllm": {"score": "obs", "permutation": "lcp", "learn": {"recipe": "refit", "epochs": 1}},
}
PARAMS = {
    "run": {"models": ["tiny"], "patterns": ["2:4"], "one_shot": ["wanda"], "learned": [], "methods": ["wanda"]},
    "methods": METHODS,
    "objectives": {
        "seeds": [0, 1],
        "rows": [{"model": "tiny", "patterns": ["2:4"], "methods": list(METHODS), "updates": ["none", "alps"]}],
    },
    "models": {
        "tiny": {
            "source": "model/llama",
            "calibrate": {"text": {"files": "text/*.txt"}, "sequences": 12, "length": 32, "held_out": 4, "batch_size": 4, "seed": 0},
            "learn": {"batch_size": 4},
            "evaluate": {"perplexity": {"text": {"files": "text/*.txt"}, "length": 32}, "zero_shot": {"tasks": {}}},
        }
    },
}


@pytest.fixture
def project(tiny_folder: Path) -> Path:
    Path("params.yaml").write_text(yaml.safe_dump(PARAMS))
    return tiny_folder


def test_every_permutation_meets_every_update_and_a_second_run_takes_up_what_is_there(project):
    objectives.main([])
    result = Path("data/report/objectives.json")
    text = result.read_text()
    rows = json.loads(text)
    assert [row["objective"] for row in rows[::4]] == ["none", "cp, obs", "lcp refit, obs"]
    assert [(row["seed"], row["update"]) for row in rows[:4]] == [(0, "none"), (0, "alps"), (1, "none"), (1, "alps")]
    assert [row["layout"] for row in rows[::4]] == ["free", "foldable", "free"]
    assert rows[0]["gap_closed"] == 0.0 and all(row["perplexity"] > 1 for row in rows)
    kept = {path: path.stat().st_mtime_ns for path in Path(".cache/objectives").iterdir()}
    result.unlink()
    objectives.main([])
    assert result.read_text() == text
    assert {path: path.stat().st_mtime_ns for path in Path(".cache/objectives").iterdir()} == kept


def test_an_unknown_update_is_refused_before_anything_runs(project):
    rows = {**PARAMS["objectives"]["rows"][0], "updates": ["alp"]}
    Path("params.yaml").write_text(yaml.safe_dump({**PARAMS, "objectives": {"seeds": [0], "rows": [rows]}}))
    with pytest.raises(SystemExit, match="unknown weight update 'alp'.*did you mean 'alps'"):
        objectives.main([])
    assert not Path(".cache/objectives").exists() or not list(Path(".cache/objectives").iterdir())
