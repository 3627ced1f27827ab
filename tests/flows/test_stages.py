"""The stages as commands, on a tiny model: a whole run, what each bad input says, and what survives it."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from flows import assemble, benchmark, calibrate, evaluate, learn, prune, reconstruct, report
from permllm.params import Params
from permllm.sparsity.mask import is_nm_sparse
from permllm.sparsity.pattern import NMPattern

PARAMS = {
    "run": {
        "models": ["tiny"],
        "patterns": ["2:4"],
        "one_shot": ["wanda", "sparsegpt+cp", "cp-foldable"],
        "learned": ["permllm", "permllm+alps"],
        "methods": ["wanda", "sparsegpt+cp", "cp-foldable", "permllm", "permllm+alps"],
    },
    "methods": {
        "wanda": {"score": "wanda"},
        "sparsegpt+cp": {"update": "sparsegpt", "permutation": "cp"},
        "cp-foldable": {"score": "wanda", "permutation": "cp", "layout": "foldable"},
        "permllm": {"score": "wanda", "permutation": "lcp", "learn": {"start": "cp"}},
        "permllm+alps": {"score": "obs", "permutation": "lcp", "update": "alps", "learn": {"recipe": "refit"}},
    },
    "models": {
        "tiny": {
            "source": "model/llama",
            "calibrate": {"text": {"files": "text/*.txt"}, "sequences": 12, "length": 32, "held_out": 4, "batch_size": 4, "seed": 0},
            "learn": {"epochs": 2, "batch_size": 4, "seed": 0},
            "benchmark": {"tokens": [1], "seconds": 0.001},
            "evaluate": {"perplexity": {"text": {"files": "text/*.txt"}, "length": 32}, "zero_shot": {"tasks": {}, "batch_size": 4}},
        }
    },
}


@pytest.fixture
def project(tiny_folder: Path) -> Path:
    """A folder with params.yaml, a tiny checkpoint and some text, entered."""
    write_params(PARAMS)
    return tiny_folder


def write_params(params: dict) -> None:
    Path("params.yaml").write_text(yaml.safe_dump(params))


def changed(path: str, value: object) -> dict:
    """Return the parameters with one entry, named by its dotted path, replaced."""
    params = json.loads(json.dumps(PARAMS))
    *parents, last = path.split("/")
    place = params
    for parent in parents:
        place = place[parent]
    place[last] = value
    return params


def setting(method: str | None = None) -> list[str]:
    return ["--model", "tiny", "--pattern", "2:4", *(["--method", method] if method else [])]


def test_the_whole_pipeline_runs_on_a_tiny_model(project: Path):
    calibrate.main(["--model", "tiny"])
    prune.main(setting("wanda"))
    prune.main(setting("sparsegpt+cp"))
    prune.main(setting("cp-foldable"))
    for method in PARAMS["run"]["learned"]:
        learn.main(setting(method))
        reconstruct.main(setting(method))
    for method in PARAMS["run"]["methods"]:
        assemble.main(setting(method))
        evaluate.main(setting(method))
    evaluate.main(["--model", "tiny", "--method", "dense"])
    benchmark.main(setting())
    report.main([])

    rows = json.loads(Path("data/report/summary.json").read_text())
    assert [row["method"] for row in rows] == ["dense", "wanda", "sparsegpt+cp", "cp-foldable", "permllm", "permllm+alps"]
    assert [row["update"] for row in rows] == [None, None, "sparsegpt", None, None, "alps"]
    assert all(math.isfinite(row["perplexity"]) and row["seconds"] > 0 and row["bytes"] > 0 for row in rows)
    assert [row["gap_closed"] for row in rows[:2]] == [1.0, 0.0]
    assert {path.name for path in Path("data/report/figures").iterdir()} == {"perplexity_tiny.png", "learning_tiny.png", "masks_tiny_2of4.png"}
    assert len(Path("data/learn/tiny/2:4/permllm/history.jsonl").read_text().splitlines()) == 3
    assert "| permllm |" in Path("data/report/table.md").read_text()

    checkpoint = Path("data/assemble/tiny/2:4/permllm")
    orders = load_file(checkpoint / "permllm" / "permutations.safetensors")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    weight = model.model.layers[1].mlp.down_proj.weight
    assert is_nm_sparse(weight[:, orders["1.mlp_out"].long()], NMPattern.parse("2:4"))
    folded = AutoModelForCausalLM.from_pretrained("data/assemble/tiny/2:4/cp-foldable")
    assert all(is_nm_sparse(linear.weight, NMPattern.parse("2:4")) for linear in folded.model.layers.modules() if isinstance(linear, nn.Linear))
    assert json.loads(Path("data/metrics/assemble/tiny/2:4/cp-foldable.json").read_text())["folding_error"] < 1e-5
    assert not list(Path("data/assemble/tiny/2:4").glob(".*"))
    assert "sparsity" not in (checkpoint / "config.json").read_text()


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("run/models", ["llama-9"], "unknown model 'llama-9': choose one of tiny"),
        ("run/methods", ["wandaa"], "unknown method 'wandaa'.*did you mean 'wanda'"),
        ("methods/wanda", {"score": "wand"}, "unknown score 'wand'.*magnitude, obs, ria, wanda"),
        ("methods/wanda", {"score": "wanda", "layout": "folded"}, "unknown layout 'folded': choose one of foldable, free"),
        ("methods/wanda", {"scoer": "wanda"}, "methods.wanda.scoer: Unexpected keyword argument"),
        ("run/patterns", ["4:2", "0:4", "a:b"], "4:2 needs 0 < N < M.*0:4 needs 0 < N < M.*'a:b' is not of the form N:M"),
        ("run/patterns", ["3:5"], "multiples of 5, but model.layers.0.self_attn.q_proj has 32.*model.layers.2.mlp.down_proj has 48"),
        ("methods/permllm/learn", {"recipe": "paper", "block_size": 25}, "block_size 25 is not a multiple of the group size of 2:4"),
        ("methods/permllm/learn", {"recipe": "paper", "block_size": 256}, "q_proj: no block size near 256 divides 32 channels; those that do: 4, 8, 16, 32"),
        ("models/tiny/learn/block_sise", 24, "unknown learn setting .block_sise.*did you mean .block_size"),
        ("models/tiny/learn/epochs", 2.5, "epochs: Input should be a valid integer"),
        ("models/tiny/learn/sequences", 9, "sequences is 9, but the calibration has 8 that are not held out"),
        ("models/tiny/calibrate/held_out", 12, "fewer held_out than sequences"),
        ("models/tiny/calibrate/length", 128, "calibrate.length is 128 tokens.*2 to 64"),
        ("models/tiny/calibrate/sequences", 10_000, "too few for 10000 sequences of 32"),
        ("models/tiny/calibrate/text", {"files": "nowhere/*.txt"}, r"no text file matches 'nowhere/\*.txt'"),
        ("models/tiny/source", "./nowhere", "'./nowhere' is not a directory"),
        ("models/tiny/device", "cuda:7", "'cuda:7' is not on this machine"),
        ("models/tiny/dtype", "int3", "unknown dtype 'int3'"),
    ],
)  # fmt: skip
def test_bad_parameters_name_the_offender_and_leave_artifacts_alone(project: Path, path: str, value: object, said: str):
    calibrate.main(["--model", "tiny"])
    before = {file: file.read_bytes() for file in Path("data").rglob("*") if file.is_file()}
    write_params(changed(path, value))
    with pytest.raises(SystemExit, match=f"(?s){said}"):
        calibrate.main(["--model", "tiny"])
    assert {file: file.read_bytes() for file in Path("data").rglob("*") if file.is_file()} == before


def test_a_pattern_without_quotes_is_no_number(project: Path):
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("'2:4'", "2:4"))  # as `dvc exp run` writes it
    assert Params.read().run.patterns == ("2:4",)


def test_an_empty_text_is_refused_by_name(project: Path):
    Path("text/b.txt").write_text(" \n")
    with pytest.raises(SystemExit, match="empty text in b"):
        calibrate.main(["--model", "tiny"])


def break_weights(change: Callable[[dict], None]) -> None:
    path = Path("model/llama/model.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight is missing"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}), r"model.norm.weight has shape \(7,\), not \(32,\)"),
        (lambda tensors: tensors["model.layers.2.mlp.up_proj.weight"].fill_(math.nan), "NaN or infinity in model.layers.2.mlp.up_proj"),
        (lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].fill_(3e38), "activations hold NaN or infinity after model.layers.1"),
        (lambda tensors: tensors["model.layers.1.input_layernorm.weight"].fill_(math.inf), "NaN or infinity in model.layers.1.input_layernorm"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_tensor(project: Path, change: Callable[[dict], None], said: str):
    break_weights(change)
    with pytest.raises(SystemExit, match=said):
        calibrate.main(["--model", "tiny"])
    assert not Path("data/calibrate/tiny").exists()


def test_a_stage_refuses_the_result_of_another_checkpoint_or_version(project: Path):
    calibrate.main(["--model", "tiny"])
    prune.main(setting("wanda"))
    manifest = Path("data/prune/tiny/2:4/wanda/manifest.json")
    manifest.write_text(manifest.read_text().replace('"format": 3', '"format": 99'))
    with pytest.raises(SystemExit, match="format 99.*reads prune artifacts of format 3.*dvc repro --force"):
        assemble.main(setting("wanda"))
    break_weights(lambda tensors: tensors["model.norm.weight"].add_(1))
    with pytest.raises(SystemExit, match="calibration of tiny was made from another checkpoint.*run the calibrate stage again"):
        prune.main(setting("wanda"))


@pytest.mark.parametrize(
    ("stage", "arguments"),
    [(calibrate, ["--model", "tiny"]), (prune, setting("wanda")), (learn, setting("permllm")), (assemble, setting("wanda"))],
)
def test_no_space_left_is_said_before_anything_is_written(project: Path, monkeypatch: pytest.MonkeyPatch, stage: Any, arguments: list[str]):
    calibrate.main(["--model", "tiny"])
    prune.main(setting("wanda"))
    before = {file: file.read_bytes() for file in Path("data").rglob("*") if file.is_file()}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(SystemExit, match="no space left for .*GB are needed and 0.00 GB are free"):
        stage.main(arguments)
    assert {file: file.read_bytes() for file in Path("data").rglob("*") if file.is_file()} == before


def test_equal_seeds_give_equal_permutations(project: Path):
    calibrate.main(["--model", "tiny"])
    results = []
    for _ in range(2):
        learn.main(setting("permllm"))
        results.append({file.name: file.read_bytes() for file in Path("data/learn/tiny/2:4/permllm").iterdir()})
    assert results[0] == results[1]
