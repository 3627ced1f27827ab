"""MLflow gets a run for every finished result, once; results are made by hand here, as DVC would record them."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from flows import track as track_module
from flows.experiment import EXPERIMENT, Experiment, UnreachableError
from flows.graph import Stage, Stages
from flows.live import copy_lines
from flows.paths import Setting
from flows.track import track
from permllm.artifacts import unfinished

MODEL, PATTERN = "tiny", "2:4"
METHODS = {"wanda": ("prune",), "permllm": ("learn", "reconstruct")}  # and the stages behind it


def address(stage: str, *key: str) -> str:
    return f"{stage}@{'-'.join((MODEL, *key))}"


STAGES: Stages = {
    found.address: found
    for found in (
        Stage(address("calibrate"), Setting(MODEL)),
        Stage(address("benchmark", PATTERN), Setting(MODEL, PATTERN)),
        Stage(address("evaluate_dense"), Setting(MODEL)),
        *(
            Stage(address(stage, PATTERN, method), Setting(MODEL, PATTERN, method), needs)
            for method, (*before, pruned_by) in METHODS.items()
            for stage, needs in (
                *((stage, (address("calibrate"),)) for stage in before),
                (pruned_by, (address("calibrate"), *(address(stage, PATTERN, method) for stage in before))),
                ("assemble", (address(pruned_by, PATTERN, method),)),
                ("evaluate", (address("assemble", PATTERN, method),)),
            )
        ),
    )
}


class Pipeline:
    """Stands for DVC: writes what a stage leaves below data/, and its entry in dvc.lock."""

    def __init__(self) -> None:
        self.entries: dict[str, Any] = {}

    def run(self, stage: str, *key: str, measured: dict | None = None, files: dict | None = None, params: dict | None = None) -> None:
        name = stage.removesuffix("_dense")
        metrics = Setting(MODEL, *key).metrics(name) if stage == name else Setting(MODEL, method="dense").metrics(name)
        outs = [{"path": str(metrics), "md5": write(metrics, {"seconds": 1.5, **(measured or {})})}]
        folders = {str(Path(path).parent): f"{write(Path(path), content)}.dir" for path, content in (files or {}).items()}
        outs += [{"path": path, "md5": md5} for path, md5 in folders.items()]
        needed = [out for other in STAGES[address(stage, *key)].depends_on for out in self.entries[other]["outs"]]
        deps = [out for out in needed if "metrics" not in out["path"]]
        self.entries[address(stage, *key)] = {"cmd": stage, "deps": deps, "params": {"params.yaml": params or {}}, "outs": outs}
        self.record()

    def record(self) -> None:
        Path("dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": self.entries}))

    def run_method(self, method: str, perplexity: float, weights: str = "first", seconds: float = 1.5) -> None:
        (*before, stage), key = METHODS[method], (PATTERN, method)
        quality = {"retained_score": 0.7, "output_error": 0.1, "seconds": seconds}
        manifest = {
            "method_settings": {"score": "wanda", "permutation": "identity"},
            "settings": {"sequential": False},
            "seed": 5,
            "weights": weights,
        }
        files = {f"data/prune/{MODEL}/{PATTERN}/{method}/manifest.json": manifest}
        if before:
            history = [{"epoch": 0, "training_loss": None, "held_out_loss": 0.5}, {"epoch": 1, "training_loss": 0.4, "held_out_loss": 0.3}]
            folder = f"data/learn/{MODEL}/{PATTERN}/{method}"
            learned = {f"{folder}/history.jsonl": "\n".join(map(json.dumps, history)), f"{folder}/manifest.json": {"settings": {"epochs": 2}}}
            self.run("learn", *key, files=learned)
        self.run(stage, *key, measured=quality, files=files)
        self.run("assemble", *key, measured={"bytes": 9}, files={f"data/assemble/{MODEL}/{PATTERN}/{method}/model": weights})
        self.run("evaluate", *key, measured={"perplexity": perplexity, "zero_shot": {"arc": {"acc": 0.25}}})

    def run_all(self) -> None:
        model_params = {f"models.{MODEL}.source": "there", f"models.{MODEL}.calibrate": {"sequences": 8, "text": {"files": "*.txt"}}}
        self.run("calibrate", files={f"data/calibrate/{MODEL}/samples": "samples"}, params=model_params)
        rows = [
            {"kernel": kernel, "tokens": tokens, "linears": linears, "ms": latency_ms}
            for kernel, latency_ms in (("dense", 2.0), ("masked", 3.0), ("gather", 1.0), ("semi_structured", None))
            for tokens in (1, 64)
            for linears in (4, 6)  # of two shapes
        ]
        self.run("benchmark", PATTERN, files={f"data/benchmark/{MODEL}/{PATTERN}/latency.json": {"machine": {"device": "cpu"}, "rows": rows}})
        self.run("evaluate_dense", measured={"perplexity": 20.0, "zero_shot": {"arc": {"acc": 0.5}}})
        self.run_method("wanda", 30.0)
        self.run_method("permllm", 25.0)


def write(path: Path, content: Any) -> str:
    """Write a text or a record, and return its hash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def pipeline(mlflow_folder: Path) -> Pipeline:
    """A finished pipeline in a new folder, which is entered."""
    finished = Pipeline()
    finished.run_all()
    return finished


def runs(query: str = "") -> list[Run]:
    client = MlflowClient()
    return client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id], query)


def the_run(method: str) -> Run:
    (run,) = runs(f"tags.model = '{MODEL}' and tags.sparsity = '{PATTERN}' and tags.method = '{method}'")
    return run


def test_a_second_track_adds_no_run(pipeline: Pipeline):
    assert track(STAGES) == (3, 0)
    assert track(STAGES) == (0, 3)
    assert len(runs()) == 3


def test_runs_are_found_by_model_sparsity_and_method(pipeline: Pipeline):
    track(STAGES)
    assert {the_run(method).info.run_name for method in ("dense", *METHODS)} == {"tiny 2:4 dense", "tiny 2:4 wanda", "tiny 2:4 permllm"}
    assert runs("tags.sparsity = '4:8'") == []
    assert [run.data.tags["method"] for run in runs("metrics.`evaluate/perplexity` < 22")] == ["dense"]


def test_a_run_has_what_the_stages_measured(pipeline: Pipeline):
    track(STAGES)
    measured = the_run("wanda").data.metrics
    assert measured == {
        "calibrate/seconds": 1.5,
        "prune/seconds": 1.5,
        "prune/retained_score": 0.7,
        "prune/output_error": 0.1,
        "assemble/seconds": 1.5,
        "assemble/bytes": 9,
        "evaluate/seconds": 1.5,
        "evaluate/perplexity": 30.0,
        "evaluate/arc/acc": 0.25,
        "benchmark/seconds": 1.5,
        "benchmark/dense_1_tokens_ms": 20.0,
        "benchmark/dense_64_tokens_ms": 20.0,
        "benchmark/masked_1_tokens_ms": 30.0,
        "benchmark/masked_64_tokens_ms": 30.0,
    }
    dense = the_run("dense").data.metrics
    assert dense.keys() == {name for name in measured if name.startswith(("evaluate", "benchmark/seconds", "benchmark/dense"))}


def test_learned_and_one_shot_methods_compare_under_one_name(pipeline: Pipeline):
    track(STAGES)
    assert {run.data.tags["method"] for run in runs("metrics.`prune/retained_score` > 0")} == set(METHODS)


def test_a_run_has_the_settings_and_hashes_behind_it(pipeline: Pipeline):
    track(STAGES)
    run = the_run("permllm")
    assert run.data.params == {
        "source": "there",
        "calibrate/sequences": "8",
        "calibrate/text/files": "*.txt",
        "score": "wanda",
        "permutation": "identity",
        "learn/epochs": "2",
        "prune/sequential": "False",
        "seed": "5",
        "machine/device": "cpu",
    }
    outs = {out["path"]: out["md5"] for entry in pipeline.entries.values() for out in entry["outs"]}
    assert run.data.tags["dvc.md5.assemble"] == outs[f"data/assemble/{MODEL}/{PATTERN}/permllm"]
    assert run.data.tags["dvc.md5.metrics.evaluate"] == outs[f"data/metrics/evaluate/{MODEL}/{PATTERN}/permllm.json"]


def test_learning_curves_are_logged_by_epoch(pipeline: Pipeline):
    track(STAGES)
    run = the_run("permllm").info.run_id
    for name, curve in {"held_out_loss": [(0, 0.5), (1, 0.3)], "training_loss": [(1, 0.4)]}.items():
        assert [(point.step, point.value) for point in MlflowClient().get_metric_history(run, f"learn/{name}")] == curve


def test_another_result_of_one_method_adds_one_run_and_keeps_the_old(pipeline: Pipeline):
    track(STAGES)
    pipeline.run_method("wanda", 29.0, weights="second")
    assert track(STAGES) == (1, 2)
    assert [run.data.metrics["evaluate/perplexity"] for run in runs("tags.method = 'wanda'")] == [29.0, 30.0]


def test_the_same_result_in_other_seconds_adds_none(pipeline: Pipeline):
    track(STAGES)
    pipeline.run_method("wanda", 30.0, seconds=99.0)
    assert track(STAGES) == (0, 3)


def test_a_run_that_was_not_finished_is_written_again(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch):
    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_terminated", killed)
        with pytest.raises(KeyboardInterrupt):
            track(STAGES)
    assert [run.info.status for run in runs()] == ["RUNNING"]
    assert track(STAGES) == (3, 0)
    assert [run.info.status for run in runs()] == ["FINISHED"] * 3


def test_what_a_server_that_is_gone_does_not_get_is_tracked_later(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        patch.setattr(track_module, "read_stages", lambda: STAGES)
        track_module.main()
    assert ended.value.code == 75
    assert track(STAGES) == (3, 0)


def test_a_server_that_is_gone_is_named(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(UnreachableError, match=r"MLflow at http://127.0.0.1:9 does not answer; all results are kept, and `python -m flows.track`"):
        track(STAGES)


@pytest.mark.parametrize("learns_again", [False, True])
def test_a_finished_result_takes_the_place_of_its_live_run(pipeline: Pipeline, learns_again: bool):
    setting = Setting(MODEL, PATTERN, "permllm")
    line = json.dumps({"epoch": 0, "training_loss": None, "held_out_loss": 0.5})
    with Experiment.open() as experiment:
        copy_lines(experiment, setting, [line])
    if learns_again:
        unfinished(setting.path("learn")).mkdir(parents=True)
    assert the_run("permllm").info.status == "RUNNING"
    track(STAGES)
    assert [run.info.status for run in runs("tags.method = 'permllm'")] == ["FINISHED"] + ["RUNNING"] * learns_again


def forget_a_stage(pipeline: Pipeline) -> None:
    del pipeline.entries[address("evaluate", PATTERN, "wanda")]
    pipeline.record()


def prune_without_evaluating(pipeline: Pipeline) -> None:
    pipeline.run("prune", PATTERN, "wanda", files={f"data/prune/{MODEL}/{PATTERN}/wanda/manifest.json": {"weights": "second"}})


def measure_by_hand(pipeline: Pipeline) -> None:
    write(Setting(MODEL, PATTERN, "wanda").metrics("evaluate"), {"perplexity": 1.0})


def remove_an_artifact(pipeline: Pipeline) -> None:
    shutil.rmtree(Setting(MODEL, PATTERN, "wanda").path("prune"))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (forget_a_stage, "evaluate@tiny-2:4-wanda did not run yet"),
        (prune_without_evaluating, "different versions of data/prune/tiny/2:4/wanda; run the pipeline again"),
        (measure_by_hand, "dvc.lock records another data/metrics/evaluate/tiny/2:4/wanda.json"),
        (remove_an_artifact, "dvc.lock records another data/prune/tiny/2:4/wanda; run `dvc checkout`"),
    ],
)
def test_a_result_that_is_not_whole_is_left_out_with_the_reason(
    pipeline: Pipeline, caplog: pytest.LogCaptureFixture, spoil: Callable[[Pipeline], None], said: str
):
    spoil(pipeline)
    assert track(STAGES) == (2, 0)
    assert "tiny 2:4 wanda is not tracked" in caplog.text
    assert said in caplog.text


def test_nothing_finished_is_nothing_tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert track(STAGES) == (0, 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("reported", "attached"), [(25.0, ["figures/masks_tiny_2of4.png", "figures/perplexity_tiny.png"]), (24.0, [])])
def test_figures_are_attached_if_the_report_knows_the_result(pipeline: Pipeline, reported: float, attached: list[str]):
    for name in ("perplexity_tiny", "masks_tiny_2of4", "masks_tiny_4of8", "perplexity_other"):
        write(Path(f"data/report/figures/{name}.png"), "figure")
    write(Path("data/report/summary.json"), [{"model": MODEL, "sparsity": PATTERN, "method": "permllm", "perplexity": reported}])
    track(STAGES)
    assert [artifact.path for artifact in MlflowClient().list_artifacts(the_run("permllm").info.run_id, "figures")] == attached
