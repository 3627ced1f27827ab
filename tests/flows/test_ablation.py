"""The ablation study on a tiny model: its rows, and that a second run takes up what the first one left."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from flows import ablation, calibrate
from permllm.lcp.recipes import LearnConfig

pytestmark = pytest.mark.slow

PARAMS = {
    "run": {"models": ["tiny"], "patterns": ["2:4"], "one_shot": ["wanda"], "learned": [], "methods": ["wanda"]},
    "methods": {"wanda": {"score": "wanda"}},
    "ablation": {
        "seeds": [0, 1],
        "learn": {"epochs": 1},
        "named": [{"model": "tiny", "patterns": ["2:4"], "scores": ["wanda"], "recipes": ["paper", "best", "amd", "search", "cp", "random"]}],
        "switches": [
            {"model": "tiny", "pattern": "2:4", "score": "ria", "learn": {"epochs": 2}, "around": {"best": [{}, {"objective": {"cosine": 0.5}}]}}
        ],
    },
    "models": {
        "tiny": {
            "source": "model/llama",
            "calibrate": {"text": {"files": "text/*.txt"}, "sequences": 12, "length": 32, "held_out": 4, "batch_size": 4, "seed": 0},
            "learn": {"epochs": 9, "batch_size": 4},
            "evaluate": {"perplexity": {"text": {"files": "text/*.txt"}, "length": 32}, "zero_shot": {"tasks": {}}},
        }
    },
}


@pytest.fixture
def project(tiny_folder: Path) -> Path:
    Path("params.yaml").write_text(yaml.safe_dump(PARAMS))
    calibrate.main(["--model", "tiny"])
    return tiny_folder


def test_every_recipe_and_switch_is_a_row_with_its_settings_and_a_second_run_takes_up_what_is_there(project):
    ablation.main([])
    text = Path("data/report/ablation.json").read_text()
    rows = json.loads(text)
    assert [row["recipe"] for row in rows[::2]] == ["paper", "best", "amd", "search", "cp", "random", "ablation", "ablation"]
    assert [row["seed"] for row in rows] == [0, 1] * 8
    settings = LearnConfig.from_recipe({"recipe": "amd", "batch_size": 4, "epochs": 1})
    amd = rows[4]
    assert {name: amd[name] for name in ("estimator", "block_count", "epochs", "batch_size")} == {
        name: getattr(settings, name) for name in ("estimator", "block_count", "epochs", "batch_size")
    }
    assert (rows[-1]["around"], rows[-1]["change"], rows[-1]["epochs"], rows[-1]["score"]) == ("best", "objective 0.5 cosine", 2, "ria")
    assert all(row["perplexity"] > 1 and row["heldout_loss"] > 0 and row["gap_closed"] is not None for row in rows)
    assert Path("data/report/ablation.png").stat().st_size > 0

    finished = sorted(Path(".cache/ablation").rglob("*.json"))
    assert len(finished) == len(rows)
    finished[0].unlink()  # as if the run had been interrupted before this row
    times = {path: path.stat().st_mtime_ns for path in finished[1:]}
    shutil.rmtree("data/report")
    ablation.main([])
    again = json.loads(Path("data/report/ablation.json").read_text())
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in rows]
    assert {path: path.stat().st_mtime_ns for path in finished[1:]} == times
