import math

import pytest
import torch

from permllm.lcp.objective import OBJECTIVES, cosine_distance
from permllm.lcp.recipes import RECIPES, LearnConfig
from permllm.lcp.schedule import cosine_decay, linear_temperature
from permllm.sparsity.pattern import NMPattern


@pytest.mark.parametrize(
    "name", ["block_size", "epochs", "batch_size", "temperature_start", "temperature_end", "sequences", "learning_rate", "last_layers"]
)
@pytest.mark.parametrize("value", [0, -1])
def test_settings_that_must_be_positive_are_named(name, value):
    with pytest.raises(ValueError, match=rf"learning settings must be above 0, but {name} is {value}"):
        LearnConfig(**{name: value})


def test_all_wrong_settings_are_named_at_once():
    with pytest.raises(ValueError, match="epochs is 0, batch_size is -2, last_layers is 0"):
        LearnConfig(epochs=0, batch_size=-2, last_layers=0)


@pytest.mark.parametrize(("name", "value"), [("sinkhorn_iterations", -1), ("weight_decay", -0.1)])
def test_settings_that_must_not_be_negative_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        LearnConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "known"), [("start", "none", "cp, identity, random"), ("recipe", "papr", "paper"), ("objective", "mse", "cosine")]
)
def test_unknown_choices_list_the_known_ones(name, value, known):
    with pytest.raises(ValueError, match=rf"unknown {name} '{value}': choose one of .*{known}"):
        LearnConfig(**{name: value})


def test_a_recipe_fills_what_is_left_open_and_settings_win(monkeypatch):
    monkeypatch.setitem(RECIPES, "short", {"epochs": 3, "start": "cp"})
    config = LearnConfig.from_recipe({"recipe": "short", "start": "identity"})
    assert (config.recipe, config.epochs, config.start, config.block_size) == ("short", 3, "identity", 64)


@pytest.mark.parametrize("settings", [{"recipe": "papr"}, {"epoch": 3}])
def test_an_unknown_recipe_or_setting_is_a_value_error(settings):
    with pytest.raises(ValueError):
        LearnConfig.from_recipe(settings)


def test_the_paper_recipe_is_the_published_one():
    config = LearnConfig.from_recipe({})
    assert (config.block_size, config.epochs, config.batch_size, config.weight_decay) == (64, 50, 16, 0.1)
    assert (config.temperature_start, config.temperature_end, config.sinkhorn_iterations, config.last_layers) == (1.0, 0.1, 5, None)
    assert (config.rate("wanda"), config.rate("ria")) == (1e-3, 5e-3)
    assert LearnConfig(learning_rate=0.5).rate("wanda") == 0.5


def test_a_block_size_that_does_not_fit_names_every_layer_and_the_sizes_that_do():
    with pytest.raises(ValueError) as error:
        LearnConfig(block_size=64).check_widths({"query": 64, "down": 172, "output": 100}, NMPattern(2, 4))
    assert "block_size 64 does not divide the input channels: down has 172, output has 100" in str(error.value)
    assert "query has" not in str(error.value)
    assert str(error.value).endswith("block sizes that fit all layers: 4")


def test_all_fitting_block_sizes_are_listed():
    with pytest.raises(ValueError, match="block sizes that fit all layers: 8, 16, 32$"):
        LearnConfig(block_size=64).check_widths({"query": 32, "down": 96}, NMPattern(4, 8))


def test_no_fitting_block_size_is_said_too():
    with pytest.raises(ValueError, match="none up to 256"):
        LearnConfig(block_size=64).check_widths({"query": 512, "down": 172}, NMPattern(4, 8))


def test_a_block_holds_whole_groups():
    with pytest.raises(ValueError, match=r"block_size 12 is not a multiple of the group size of 4:8; block sizes that fit all layers: 8, 16, 24, 48"):
        LearnConfig(block_size=12).check_widths({"query": 48}, NMPattern(4, 8))


@pytest.mark.parametrize("width", [64, 128])
def test_block_sizes_that_fit_are_accepted(width):
    LearnConfig(block_size=64).check_widths({"query": width}, NMPattern(4, 8))


def test_the_temperature_falls_linearly_from_the_first_step_to_the_last():
    assert [linear_temperature(progress, 1.0, 0.1) for progress in (0, 0.5, 1)] == pytest.approx([1, 0.55, 0.1])


def test_the_learning_rate_decays_along_a_cosine():
    assert [cosine_decay(progress) for progress in (0, 1 / 3, 0.5, 1)] == pytest.approx([1, 0.75, 0.5, 0])


def test_cosine_distance_is_the_mean_over_tokens_of_one_minus_the_cosine():
    dense = torch.tensor([[[1.0, 0.0], [3.0, 4.0]]])
    sparse = torch.tensor([[[2.0, 0.0], [4.0, -3.0]]])
    assert cosine_distance(sparse, dense).item() == pytest.approx((0 + 1) / 2)


@pytest.mark.parametrize("angle", [0.0, 0.3, math.pi / 2, math.pi])
def test_cosine_distance_depends_on_the_angle_alone(angle):
    dense, sparse = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[math.cos(angle), math.sin(angle)]]]) * 7
    assert cosine_distance(sparse, dense).item() == pytest.approx(1 - math.cos(angle), abs=1e-6)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_the_distance_of_equal_states_is_zero_and_has_a_gradient_elsewhere(name):
    dense = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    assert OBJECTIVES[name](dense.bfloat16(), dense.bfloat16()).item() == pytest.approx(0, abs=1e-6)
    sparse = (dense + 0.1 * torch.randn(dense.shape, generator=torch.Generator().manual_seed(1))).requires_grad_()
    distance = OBJECTIVES[name](sparse, dense)
    assert distance > 0 and torch.autograd.grad(distance, sparse)[0].abs().sum() > 0
