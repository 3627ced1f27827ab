import math

import pytest

from permllm.lcp.recipes import RECIPES, LearnConfig, with_recipe
from permllm.lcp.schedule import cosine_decay, linear_temperature
from permllm.sparsity.pattern import NMPattern

POSITIVE = ["epochs", "batch_size", "temperature_start", "temperature_end", "radius", "momentum", "teacher_tokens", "sequences", "learning_rate"]
POSITIVE += ["last_layers", "block_size", "rank", "mask_temperature", "window", "patience", "moves", "curvature"]


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("value", [0, -1])
def test_settings_that_must_be_positive_are_named(name, value):
    with pytest.raises(ValueError, match=rf"learning settings must be above 0, but {name} is {value}"):
        LearnConfig(**{name: value})


def test_a_block_count_must_be_positive_too():
    with pytest.raises(ValueError, match="block_count is 0"):
        LearnConfig(block_size=None, block_count=0)


def test_a_setting_that_is_not_a_number_is_named():
    with pytest.raises(ValueError, match="learning_rate is nan"):
        LearnConfig(learning_rate=float("nan"))


def test_all_wrong_settings_are_named_at_once():
    with pytest.raises(ValueError, match="epochs is 0, batch_size is -2, last_layers is 0"):
        LearnConfig(epochs=0, batch_size=-2, last_layers=0)


@pytest.mark.parametrize(("name", "value"), [("sinkhorn_iterations", -1), ("weight_decay", -0.1), ("gumbel", -0.5)])
def test_settings_that_must_not_be_negative_are_named(name, value):
    with pytest.raises(ValueError, match=f"learning settings must be at least 0, but {name} is {value}"):
        LearnConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "known"),
    [
        ("start", "none", "cp, identity, random, search"),
        ("recipe", "papr", "amd, best, paper, refit; did you mean 'paper'"),
        ("objective", "mse", "cosine, cross_entropy, kl, relative_error, smooth_l1"),
        ("logits", "eye", "identity, uniform"),
        ("estimator", "hrd", "hard, soft; did you mean 'hard'"),
        ("optimizer", "sgd", "adamw, guided, scion"),
        ("precision", "float16", "bfloat16, model"),
        ("norm", "l2", "sign, spectral"),
    ],
)
def test_unknown_choices_list_the_known_ones(name, value, known):
    with pytest.raises(ValueError, match=rf"unknown {name} '{value}': choose one of {known}"):
        LearnConfig(**{name: value})


def test_terms_of_both_objectives_are_checked():
    with pytest.raises(ValueError, match=r"unknown objective 'kll'.*did you mean 'kl'"):
        LearnConfig(objective={"cosine": 1.0, "kll": 0.1})
    with pytest.raises(ValueError, match="unknown layer_objective 'kl': choose one of cosine, relative_error, smooth_l1"):
        LearnConfig(layer_objective={"kl": 1.0})
    with pytest.raises(ValueError, match="terms of layer_objective need weights above 0, but cosine has weight -1"):
        LearnConfig(layer_objective={"cosine": -1})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 2, "objective": "kl"}, "window trains towards hidden states, but objective compares next tokens"),
        ({"window": 2, "objective": {"cosine": 1.0, "cross_entropy": 0.1}}, "window trains towards hidden states"),
        ({"block_size": 64, "block_count": 4}, "block_size and block_count exclude each other; set one of them to null"),
        ({"rank": 8, "logits": "uniform"}, "rank keeps the logits around a soft identity, but logits is uniform"),
        ({"objective": {}}, "objective holds no term"),
        (
            {"optimizer": "guided", "gumbel": 0.5, "estimator": "soft", "rank": 8, "logits": "identity"},
            "guided does not use logits, rank, estimator, gumbel;",
        ),
        ({"layout": "foldable", "window": 2}, "layout foldable shares an order between all layers, so they learn together: window"),
        ({"optimizer": "guided", "norm": "sign"}, "optimizer guided does not use norm"),
        ({"optimizer": "scion", "weight_decay": 0.2}, "optimizer scion does not use weight_decay"),
        ({"moves": 0.1, "radius": 2.0}, "optimizer adamw does not use moves, radius"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LearnConfig(**settings)


def test_all_contradictions_are_named_at_once():
    with pytest.raises(ValueError, match=r"window trains .*; block_size and .*; rank keeps"):
        LearnConfig(window=1, objective="kl", block_count=4, rank=8)


@pytest.mark.parametrize(("name", "value"), [("learning_rate", 1.5), ("momentum", 1.5)])
def test_settings_that_scion_cannot_use_are_refused_before_the_run(name, value):
    with pytest.raises(ValueError, match=name):
        LearnConfig(**{"optimizer": "scion", "learning_rate": 0.1, name: value})


def test_an_objective_by_name_has_weight_one():
    assert LearnConfig(objective="kl").objectives == {"kl": 1.0}
    assert LearnConfig(objective={"kl": 1.0, "cosine": 0.5}).objectives == {"kl": 1.0, "cosine": 0.5}


def test_a_recipe_fills_what_is_left_open_and_settings_win(monkeypatch):
    monkeypatch.setitem(RECIPES, "short", {"epochs": 3, "start": "cp"})
    config = LearnConfig.from_recipe({"recipe": "short", "start": "identity"})
    assert (config.recipe, config.epochs, config.start, config.block_size) == ("short", 3, "identity", 64)


@pytest.mark.parametrize("settings", [{"recipe": "papr"}, {"epoch": 3}])
def test_an_unknown_recipe_or_setting_is_a_value_error(settings):
    with pytest.raises(ValueError, match=r"unknown (recipe|learn setting)"):
        LearnConfig.from_recipe(settings)


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_every_recipe_is_a_valid_configuration_that_names_itself(recipe):
    config = LearnConfig.from_recipe({"recipe": recipe})
    assert config.recipe == recipe and RECIPES[recipe].items() <= vars(config).items()


def test_without_a_recipe_the_best_one_is_taken():
    assert LearnConfig.from_recipe({}) == LearnConfig.from_recipe({"recipe": "best"})
    assert with_recipe({"epochs": 3}) == {**RECIPES["best"], "epochs": 3, "recipe": "best"}


def test_the_paper_recipe_is_the_published_one():
    """Its first permutations are random inside blocks."""
    config = LearnConfig.from_recipe({"recipe": "paper"})
    assert config == LearnConfig()
    assert (config.block_size, config.epochs, config.batch_size, config.weight_decay) == (64, 50, 16, 0.1)
    assert (config.temperature_start, config.temperature_end, config.sinkhorn_iterations, config.last_layers) == (1.0, 0.1, 5, None)
    assert (config.start, config.logits, config.objectives, config.mask_temperature) == ("identity", "uniform", {"cosine": 1.0}, None)
    assert (config.estimator, config.optimizer, config.gumbel, config.rank, config.window) == ("hard", "adamw", 0, None, None)
    assert (config.rate("wanda"), config.rate("ria")) == (1e-3, 5e-3)
    assert LearnConfig(learning_rate=0.5).rate("wanda") == 0.5


@pytest.mark.parametrize(
    ("text", "wanted", "expected"),
    [
        ("2:4", 64, {172: 172, 352: 88, 11008: 64, 13824: 64, 18944: 64, 48: 48, 32: 32, 16: 16}),
        ("4:8", 64, {352: 88, 11008: 64, 13824: 64, 18944: 64, 48: 48}),
        ("2:4", 128, {172: 172, 352: 176, 11008: 128, 13824: 128, 18944: 128}),
        ("4:8", 128, {352: 176, 11008: 128, 13824: 128, 18944: 128}),
        ("2:4", 32, {352: 32, 11008: 32, 13824: 32, 18944: 32, 48: 24}),
        ("2:4", None, {172: 172, 352: 352, 11008: 11008}),
    ],
)
def test_a_layer_takes_the_fitting_block_size_nearest_to_that_asked_for(text, wanted, expected):
    config = LearnConfig(block_size=wanted)
    assert {channels: config.fitting_block_size(channels, NMPattern.parse(text)) for channels in expected} == expected


@pytest.mark.parametrize("text", ["2:4", "4:8"])
@pytest.mark.parametrize("wanted", [16, 64, 100, 128])
def test_no_other_fitting_block_size_is_nearer(text, wanted):
    pattern, config = NMPattern.parse(text), LearnConfig(block_size=wanted)
    for channels in range(64, 512, 8):
        size = config.fitting_block_size(channels, pattern) if _nearest(channels, pattern, wanted) else None
        assert size == _nearest(channels, pattern, wanted)


def _nearest(channels, pattern, wanted):
    sizes = [size for size in range(1, channels + 1) if channels % size == 0 and size % pattern.group == 0 and 1 / 4 <= size / wanted <= 4]
    return min(sizes, key=lambda size: max(size / wanted, wanted / size), default=None)


@pytest.mark.parametrize(("count", "expected"), [(1, {172: 172, 4096: 4096}), (4, {172: 172, 352: 88, 4096: 1024, 11008: 2752})])
def test_a_block_count_asks_for_blocks_per_layer(count, expected):
    config = LearnConfig(block_size=None, block_count=count)
    assert {channels: config.fitting_block_size(channels, NMPattern(2, 4)) for channels in expected} == expected


@pytest.mark.parametrize("width", [32, 64, 128, 172, 352, 11008])
def test_widths_with_a_fitting_block_size_are_accepted(width):
    LearnConfig(block_size=64).check_widths({"down": width}, NMPattern(2, 4))


def test_a_rank_that_saves_nothing_is_refused():
    config = LearnConfig(block_size=64, rank=16, logits="identity")
    config.check_widths({"down": 128}, NMPattern(2, 4))
    with pytest.raises(ValueError, match="up: rank 16 is no less than the 16 channels of a block"):
        config.check_widths({"down": 128, "up": 16}, NMPattern(2, 4))


def test_layers_that_no_block_size_fits_are_all_named_with_the_sizes_that_do():
    widths = {"query": 64, "down": 4 * 331, "output": 4 * 337}  # 331 and 337 are prime
    with pytest.raises(ValueError) as error:
        LearnConfig(block_size=64).check_widths(widths, NMPattern(2, 4))
    assert "down: no block size near 64 divides 1324 channels; those that do: 4, 1324" in str(error.value)
    assert "output: no block size near 64 divides 1348 channels; those that do: 4, 1348" in str(error.value)
    assert "query" not in str(error.value)


def test_layers_that_the_pattern_does_not_divide_are_all_named():
    with pytest.raises(ValueError, match="multiples of 8, but down has 172, output has 100;"):
        LearnConfig(block_size=64).check_widths({"query": 64, "down": 172, "output": 100}, NMPattern(4, 8))


@pytest.mark.parametrize("text", ["4:8", "3:5"])
def test_a_block_holds_whole_groups(text):
    pattern = NMPattern.parse(text)
    with pytest.raises(ValueError, match=rf"block_size 12 is not a multiple of the group size of {text}"):
        LearnConfig(block_size=12).check_widths({"query": 6 * pattern.group}, pattern)


def test_the_temperature_falls_linearly_from_the_first_step_to_the_last():
    assert [linear_temperature(progress, 1.0, 0.1) for progress in (0, 0.5, 1)] == pytest.approx([1, 0.55, 0.1])


def test_the_learning_rate_decays_along_a_cosine():
    assert [cosine_decay(progress) for progress in (0, 1 / 3, 0.5, 1)] == pytest.approx([1, 0.75, 0.5, 0])
    assert cosine_decay(0.25) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
