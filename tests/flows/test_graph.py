"""The graph of stages as DVC reads it, and choosing from it."""

from pathlib import Path

import pytest

from flows.graph import Stage, Stages, needs_of, parts, read_stages, select
from flows.paths import Setting


@pytest.fixture(scope="module")
def stages() -> Stages:
    """Two models, of which one has dashes in its name, two patterns and two methods; a report of all."""
    found = {}
    for model in ("a", "b-c"):
        found[f"calibrate@{model}"] = Stage(f"calibrate@{model}", Setting(model))
        for pattern in ("2:4", "4:8"):
            for method in ("wanda", "ria+cp"):
                key = f"{model}-{pattern}-{method}"
                found[f"prune@{key}"] = Stage(f"prune@{key}", Setting(model, pattern, method), (f"calibrate@{model}",))
                found[f"evaluate@{key}"] = Stage(f"evaluate@{key}", Setting(model, pattern, method), (f"prune@{key}",))
    found["report"] = Stage("report", Setting(), tuple(address for address in found if address.startswith("evaluate")))
    return found


def test_the_project_has_a_result_for_every_combination_of_its_matrix(repository: Path):
    stages = read_stages(repository)
    evaluated = [stage.setting for stage in stages.values() if stage.name == "evaluate"]
    axes = [{getattr(setting, axis) for setting in evaluated} for axis in ("model", "pattern", "method")]
    assert len(set(evaluated)) == len(axes[0]) * len(axes[1]) * len(axes[2]) == len(evaluated)
    assert {f"evaluate@{setting.model}-{setting.pattern}-{setting.method}" for setting in evaluated} <= needs_of(stages, "report")


def test_every_stage_of_the_project_comes_after_what_it_depends_on(repository: Path):
    stages = read_stages(repository)
    position = {address: number for number, address in enumerate(stages)}
    assert all(position[other] < position[address] for address, stage in stages.items() for other in stage.depends_on)


def test_no_choice_is_all_stages(stages: Stages):
    assert select(stages) == stages


def test_a_choice_narrows_the_matrix_and_keeps_what_is_needed(stages: Stages):
    chosen = select(stages, models=["b-c"], patterns=["2:4"], methods=["wanda"])
    assert list(chosen) == ["calibrate@b-c", "prune@b-c-2:4-wanda", "evaluate@b-c-2:4-wanda"]


def test_the_report_is_left_out_with_the_first_setting_that_is(stages: Stages):
    assert "report" in select(stages, methods=["wanda", "ria+cp"])
    assert "report" not in select(stages, methods=["wanda"])


def test_a_target_comes_with_all_that_it_needs(stages: Stages):
    assert list(select(stages, targets=["evaluate@a-4:8-wanda"])) == ["calibrate@a", "prune@a-4:8-wanda", "evaluate@a-4:8-wanda"]
    assert select(stages, targets=["report"]) == stages
    assert {stage.name for stage in select(stages, targets=["prune"]).values()} == {"calibrate", "prune"}


def test_unknown_names_are_refused_together_with_the_choices(stages: Stages):
    with pytest.raises(ValueError) as refused:
        select(stages, models=["d"], patterns=["2:5"], methods=["wandb"], targets=["prunes", "prune@a-2:4-ria"])
    for said in (
        "unknown model 'd': choose one of a, b-c",
        "unknown pattern '2:5': choose one of 2:4, 4:8",
        "unknown method 'wandb': choose one of ria+cp, wanda; did you mean 'wanda'?",
        "unknown target 'prunes': choose one of calibrate, evaluate, prune, report",
        "unknown target 'prune@a-2:4-ria': choose one of prune@a-2:4-ria+cp, prune@a-2:4-wanda",
    ):
        assert said in str(refused.value)


def test_a_target_that_the_other_choices_leave_nothing_of_is_refused(stages: Stages):
    with pytest.raises(ValueError, match="nothing is left of report, evaluate@a-2:4-ria"):
        select(stages, methods=["wanda"], targets=["prune", "report", "evaluate@a-2:4-ria+cp"])


def test_a_part_is_all_that_only_its_setting_needs_after_what_several_need(stages: Stages):
    chosen = parts(select(stages, models=["a"], patterns=["2:4"]))
    assert chosen == {
        "calibrate@a": (),
        "evaluate@a-2:4-wanda": ("calibrate@a",),
        "evaluate@a-2:4-ria+cp": ("calibrate@a",),
    }


def test_the_parts_of_the_project_do_every_stage_of_a_setting_once(repository: Path):
    stages = read_stages(repository)
    divided = parts(stages)
    done = [
        address for target, before in divided.items() for address in needs_of(stages, target).difference(*(needs_of(stages, each) for each in before))
    ]
    assert sorted(done) == sorted(address for address, stage in stages.items() if stage.setting != Setting())
