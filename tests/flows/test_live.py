"""Learning curves appear in MLflow while they are learned, once, and a server that is gone stops nothing."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from flows import live
from flows.experiment import EXPERIMENT, Experiment
from flows.live import copy_lines, follow, learning
from flows.paths import Setting
from permllm.artifacts import unfinished

SETTING = Setting("tiny", "2:4", "permllm")


def lines(count: int, first_loss: float = 0.5) -> list[str]:
    records = [{"epoch": 0, "training_loss": None, "held_out_loss": first_loss}]
    records += [{"epoch": epoch, "training_loss": 0.4 / epoch, "held_out_loss": 0.3 / epoch} for epoch in range(1, count)]
    return [json.dumps(record) + "\n" for record in records]


def learn(count: int, half: str = "") -> None:
    history = unfinished(SETTING.path("learn")) / "history.jsonl"
    history.parent.mkdir(parents=True, exist_ok=True)
    history.write_text("".join(lines(count)) + half)


def runs() -> list[Run]:
    client = MlflowClient()
    return client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])


def points(name: str) -> list[tuple[int, float]]:
    (run,) = runs()
    return [(point.step, point.value) for point in MlflowClient().get_metric_history(run.info.run_id, f"learn/{name}")]


def test_a_history_is_seen_while_it_is_written_and_half_a_line_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert list(learning([SETTING])) == []
    learn(2, half='{"epoch": 2')
    assert list(learning([SETTING, Setting("tiny", "4:8", "permllm")])) == [(SETTING, lines(2))]


def test_new_lines_are_added_once_to_a_run_that_is_running(mlflow_folder):
    with Experiment.open() as experiment:
        assert [copy_lines(experiment, SETTING, lines(count)) for count in (2, 2, 4)] == [2, 0, 2]
    (run,) = runs()
    assert run.info.status == "RUNNING" and run.data.tags["method"] == "permllm"
    assert points("held_out_loss") == [(0, 0.5), (1, 0.3), (2, 0.15), (3, pytest.approx(0.1))]
    assert points("training_loss") == [(1, 0.4), (2, 0.2), (3, pytest.approx(0.4 / 3))]


def test_another_try_takes_the_place_of_the_run(mlflow_folder):
    with Experiment.open() as experiment:
        copy_lines(experiment, SETTING, lines(3))
        copy_lines(experiment, SETTING, lines(2, first_loss=0.6))
    assert points("held_out_loss") == [(0, 0.6), (1, 0.3)]


def looks(monkeypatch, *steps) -> None:
    """Follow; before every further look one of the steps happens."""
    left = iter(steps)

    def sleep(_: float) -> None:
        step = next(left, None)
        if step is None:
            raise KeyboardInterrupt
        step()

    monkeypatch.setattr(live.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        follow([SETTING], 0)


def test_following_goes_on_when_the_server_is_gone_and_catches_up_when_it_is_back(mlflow_folder, monkeypatch, caplog):
    there = f"sqlite:///{mlflow_folder}/mlflow.db"
    learn(1)
    gone = lambda: (monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9"), learn(2))  # noqa: E731
    back = lambda: (monkeypatch.setenv("MLFLOW_TRACKING_URI", there), learn(4))  # noqa: E731
    looks(monkeypatch, gone, lambda: learn(3), back)
    assert [record.levelname for record in caplog.records if "does not answer" in record.message] == ["WARNING"]
    assert len(points("held_out_loss")) == 4


def test_nothing_that_learns_is_nothing_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    looks(monkeypatch, lambda: None)
    assert list(Path().iterdir()) == []
