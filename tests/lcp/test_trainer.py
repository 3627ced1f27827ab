"""Learning permutations on tiny models, checked by pruning copies of the model and running them as they are."""

from itertools import pairwise

import pytest
import torch

from permllm.assembly.folding import fold
from permllm.calibration.capture import dense_statistics
from permllm.calibration.samples import CalibrationSet
from permllm.lcp import group_permutations, trainer
from permllm.lcp.guided import GuidedGroups
from permllm.lcp.masked_linear import MaskedLinear
from permllm.lcp.objective import HIDDEN_OBJECTIVES, LOGIT_OBJECTIVES, NextTokens, cosine_distance
from permllm.lcp.trainer import LearningError, find_starts, learn_permutations
from permllm.models.adapter import Heads
from permllm.models.families import adapter_of
from permllm.models.streaming import LoadedModel
from permllm.permutation.heuristic import heuristic_permutation
from permllm.pruning.layerwise import apply_layer, model_weights, prune_in_parallel
from permllm.pruning.methods import PruningMethod
from permllm.pruning.metrics import PRUNING_METRICS
from permllm.pruning.permutations import PERMUTATIONS
from permllm.sparsity.pattern import NMPattern

PATTERN = NMPattern(2, 4)
GUIDED = {"optimizer": "guided", "objective": "kl", "moves": 0.5, "curvature": 1.0, "start": "search"}
VARIANTS = {
    "as it is": {},
    "relative error": {"objective": "relative_error"},
    "smooth l1": {"objective": "smooth_l1"},
    "kl": {"objective": "kl"},
    "kl of few tokens": {"objective": "kl", "teacher_tokens": 4},
    "cross-entropy": {"objective": "cross_entropy"},
    "mixed": {"objective": {"kl": 1.0, "relative_error": 0.3}, "layer_objective": {"cosine": 0.1, "smooth_l1": 0.2}},
    "soft": {"estimator": "soft", "mask_temperature": 1.0},
    "gumbel": {"gumbel": 0.5},
    "soft gumbel": {"estimator": "soft", "gumbel": 0.5},
    "scion": {"optimizer": "scion", "learning_rate": 0.3},
    "scion by sign": {"optimizer": "scion", "learning_rate": 0.3, "norm": "sign"},
    "low rank": {"rank": 4},
    "low rank scion": {"rank": 4, "optimizer": "scion", "learning_rate": 0.3},
    "mask temperature": {"mask_temperature": 0.5},
    "uniform logits": {"start": "identity", "logits": "uniform"},
    "random start": {"start": "random"},
    "search": {"start": "search"},
    "whole layers": {"block_size": None},
    "block count": {"block_size": None, "block_count": 4},
    "no sweeps": {"sinkhorn_iterations": 0},
    "uneven batches": {"batch_size": 3},
    "some sequences": {"sequences": 5},
    "window": {"window": 1},
    "window with layer objective": {"window": 2, "layer_objective": {"cosine": 0.5}},
    "last layers": {"last_layers": 1},
    "window of last layers": {"last_layers": 2, "window": 1},
    "uniform logits in a window": {"start": "identity", "logits": "uniform", "window": 1},
    "uniform logits in the last layers": {"start": "identity", "logits": "uniform", "last_layers": 1},
    "patience": {"patience": 1},
    "recomputed": {"recompute_layers": True},
    "guided": GUIDED,
    "guided by the cosine": {**GUIDED, "objective": "cosine"},
    "guided by states": {**GUIDED, "objective": {"relative_error": 1.0, "smooth_l1": 0.5}, "layer_objective": {"cosine": 0.1}},
    "guided by text": {**GUIDED, "objective": "cross_entropy", "recompute_layers": True},
    "guided in a window": {**GUIDED, "objective": "cosine", "window": 1, "last_layers": 2},
}


def weight_of(layer, group):
    return torch.cat([layer.get_submodule(path).weight for path in group.readers])


def outputs(model, tokens):
    """Return the hidden states after every decoder layer in the model's own forward, and the logits."""
    seen = []
    handles = [layer.register_forward_hook(lambda _, arguments, output: seen.append(output)) for layer in adapter_of(model).layers(model)]
    with torch.no_grad():
        logits = model(tokens).logits
    for handle in handles:
        handle.remove()
    return seen, logits


def loss_between(sparse, dense, tokens, config):
    """Return the loss of a pruned model on some sequences by running both models, without any of the trainer's code."""
    (sparse_states, sparse_logits), (dense_states, dense_logits) = (outputs(model, tokens) for model in (sparse, dense))
    values, indices = dense_logits.log_softmax(-1).topk(min(config.teacher_tokens, dense_logits.shape[-1]))
    next_tokens = NextTokens(tokens, indices, values)
    loss = 0.0
    for name, weight in config.objectives.items():
        hidden = name in HIDDEN_OBJECTIVES
        loss += weight * (
            HIDDEN_OBJECTIVES[name](sparse_states[-1], dense_states[-1]) if hidden else LOGIT_OBJECTIVES[name](sparse_logits, next_tokens)
        )
    fixed = len(dense_states) - (config.last_layers or len(dense_states))
    width = config.window or len(dense_states)
    learned = slice(fixed + (len(dense_states) - fixed - 1) // width * width, None)  # of the last window
    for name, weight in config.layer_objective.items():
        loss += weight * sum(HIDDEN_OBJECTIVES[name](*states) for states in zip(sparse_states[learned], dense_states[learned], strict=True))
    return float(loss)


def measured_loss(dense, sparse, samples, rows, method, config, permutations=None, pattern=PATTERN):
    """Prune `sparse`, a copy of `dense`, and return the loss of it."""
    adapter = adapter_of(dense)
    statistics = list(dense_statistics(LoadedModel(dense, adapter), samples.tokens, 4))
    layers = prune_in_parallel(model_weights(dense, adapter), adapter, statistics, pattern, method, permutations)
    for layer, pruned in zip(adapter.layers(sparse), layers, strict=True):
        apply_layer(layer, pruned)
    return loss_between(sparse, dense, samples.tokens[rows], config)


@pytest.fixture
def measure(model, family, tiny_model, samples, config):
    """`measure(result, **settings)`: the loss of the really pruned model on the held-out sequences."""

    def loss(result, samples=samples, rows=samples.held_out_rows, score="wanda", pattern="2:4", **settings):
        method, pattern = PruningMethod(score, "lcp"), NMPattern.parse(pattern)
        return measured_loss(model, tiny_model(family), samples, rows, method, config(**settings), result.permutations, pattern)

    return loss


@pytest.mark.parametrize("family", ["llama"], indirect=True)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_result_is_never_worse_than_the_start_and_its_loss_is_that_of_the_pruned_model(learn, measure, variant):
    result = learn(**{"epochs": 2, **VARIANTS[variant]})
    assert result.stopped is None
    assert result.best.held_out_loss <= result.start.held_out_loss
    assert measure(result, **VARIANTS[variant]) == pytest.approx(result.best.held_out_loss, rel=1e-4)


@pytest.mark.parametrize("settings", [{"objective": "kl"}, {"logits": "uniform", "window": 3}, GUIDED], ids=["kl", "window", "guided"])
def test_every_family_learns(learn, measure, settings):
    result = learn(**settings, epochs=2)
    assert result.best.held_out_loss <= result.start.held_out_loss
    assert measure(result, **settings) == pytest.approx(result.best.held_out_loss, rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [{"learning_rate": 0.5}, {"estimator": "soft"}, {"logits": "uniform", "block_size": 8}, GUIDED],
    ids=["hard", "soft", "uniform", "guided"],
)
def test_a_foldable_layout_learns_orders_that_fold(learn, measure, model, adapter, settings):
    result = learn(**settings, layout="foldable", epochs=2)
    assert result.best.held_out_loss <= result.start.held_out_loss
    assert measure(result, **settings, layout="foldable") == pytest.approx(result.best.held_out_loss, rel=1e-4)
    folding = fold(adapter, Heads.of(model.config), result.permutations, [name for name, _ in model.named_parameters()])
    assert folding.is_complete


@pytest.mark.parametrize("family", ["llama"], indirect=True)
@pytest.mark.parametrize("settings", [{}, {"estimator": "soft"}, GUIDED], ids=["hard", "soft", "guided"])
@pytest.mark.parametrize("pattern", ["4:8", "1:4", "3:4"])
def test_every_pattern_learns(learn, measure, pattern, settings):
    result = learn(pattern=pattern, **settings, epochs=2)
    assert result.best.held_out_loss <= result.start.held_out_loss
    assert measure(result, pattern=pattern, **settings) == pytest.approx(result.best.held_out_loss, rel=1e-4)


@pytest.mark.parametrize("family", ["llama"], indirect=True)
@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 10.0},
        {"learning_rate": 10.0, "objective": "kl", "estimator": "soft"},
        {"learning_rate": 1e4, "gumbel": 10.0},
        {"optimizer": "scion", "learning_rate": 1.0, "radius": 1e3},
        {"learning_rate": 10.0, "window": 1},
        {"optimizer": "guided", "moves": 1.0, "curvature": 1e-9, "epochs": 5},
    ],
)
def test_a_learning_rate_that_is_far_too_high_never_makes_it_worse(learn, measure, settings):
    settings = {"start": "search", **settings}
    result = learn(**settings)
    assert result.best.held_out_loss <= result.start.held_out_loss
    assert measure(result, **settings) == pytest.approx(result.best.held_out_loss, rel=1e-4)
    harmed = [record for record in result.history if record.epoch and not record.is_best]
    assert harmed  # it did do harm


@pytest.mark.parametrize("score", sorted(PRUNING_METRICS))
@pytest.mark.parametrize("family", ["llama", "opt"], indirect=True)
def test_the_history_marks_the_best_epoch_and_the_temperatures(learn, measure, score):
    result = learn(score)
    history = result.history
    assert [record.epoch for record in history] == [0, 1, 2, 3] and {record.window for record in history} == {0}
    losses = [record.held_out_loss for record in history]
    assert [record.is_best for record in history] == [loss < min(losses[:epoch], default=float("inf")) for epoch, loss in enumerate(losses)]
    assert result.start is history[0] and result.best.held_out_loss == min(losses)
    assert history[0].training_loss is None and all(record.training_loss > 0 for record in history[1:])
    assert [record.temperature for record in history] == pytest.approx([1, 1 - 0.9 / 5, 1 - 0.9 * 3 / 5, 0.1])
    assert measure(result, score=score) == pytest.approx(min(losses), rel=1e-4)


@pytest.mark.parametrize("start", sorted(PERMUTATIONS))
@pytest.mark.parametrize("family", ["llama", "opt"], indirect=True)
def test_a_start_is_one_shot_pruning_with_that_permutation_and_seed(learn, model, adapter, family, tiny_model, samples, config, start):
    settings = {"start": start, "seed": 5, "epochs": 1}
    record = learn(**settings).history[0]
    method = PruningMethod("wanda", start, seed=5)
    measured = measured_loss(model, tiny_model(family), samples, samples.held_out_rows, method, config(**settings))
    assert measured == pytest.approx(record.held_out_loss, rel=1e-4)
    statistics = list(dense_statistics(LoadedModel(model, adapter), samples.tokens, 4))
    starts = find_starts(LoadedModel(model, adapter), statistics, PATTERN, "wanda", config(**settings))
    pruned = prune_in_parallel(model_weights(model, adapter), adapter, statistics, PATTERN, method)
    for layer, one_shot in zip(starts, pruned, strict=True):
        assert all(permutation.canonical(4) == one_shot[name].permutation for name, permutation in layer.items())


@pytest.mark.parametrize("family", ["llama"], indirect=True)
@pytest.mark.parametrize(
    "settings", [{"objective": "cosine"}, {"objective": "kl"}, {"estimator": "soft"}, {"optimizer": "scion"}, {"rank": 8}, GUIDED]
)
def test_learning_finds_better_permutations_than_the_start(learn, samples, settings):
    """On the training sequences themselves; what it gains on others depends on the model."""
    if settings != GUIDED:
        settings = {"start": "identity", "mask_temperature": 1.0, "learning_rate": 0.2, **settings}
    settings = {"epochs": 6, **settings}
    result = learn(samples=CalibrationSet(samples.tokens), **settings)
    assert result.best.held_out_loss < 0.97 * result.start.held_out_loss


@pytest.mark.parametrize("family", ["llama", "opt"], indirect=True)
def test_guided_moves_come_after_the_gradients_of_a_whole_epoch(learn, samples):
    """The loss of an epoch's steps is that of the permutations before it, whatever the order of the sequences."""
    history = learn(samples=CalibrationSet(samples.tokens), **GUIDED).history
    assert len({record.held_out_loss for record in history}) > 1
    for before, record in pairwise(history):
        assert record.training_loss == pytest.approx(before.held_out_loss, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "opt"], indirect=True)
def test_guided_moves_do_not_depend_on_how_the_sequences_are_cut_into_batches(learn):
    whole, uneven = (learn(**GUIDED, batch_size=batch_size, epochs=2) for batch_size in (8, 3))
    assert whole.permutations == uneven.permutations


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_the_noise_falls_to_zero_and_evaluations_have_none(learn, monkeypatch):
    asked, original = [], group_permutations.LearnedGroups.update

    def record(groups, temperature, *, hard=False, noise=0.0):
        asked.append((hard, noise))
        original(groups, temperature, hard=hard, noise=noise)

    monkeypatch.setattr(group_permutations.LearnedGroups, "update", record)
    learn(gumbel=0.5)  # three epochs of two steps
    assert [noise for hard, noise in asked if not hard] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0])
    assert [hard for hard, _ in asked] == [True] + [False, False, True] * 3 and not any(noise for hard, noise in asked if hard)


@pytest.mark.parametrize("settings", [{"logits": "uniform", "start": "identity"}, {"start": "random"}, {"gumbel": 0.5}, GUIDED])
@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_equal_seeds_learn_equal_permutations_and_others_do_not(learn, settings):
    """Whatever the state of the global generator is."""
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(results))
        results.append(learn(seed=seed, epochs=1, **settings))
    first, second, other = results
    assert first.permutations == second.permutations and first.history == second.history
    assert first.history != other.history


def tensors_of(model):
    """Return all values, and how they lie in memory."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: (tensor.clone(), (tensor.dtype, tensor.stride(), tensor.is_contiguous(), tensor.requires_grad)) for name, tensor in named}


def assert_unchanged(model, modules, before):
    assert list(dict(model.named_modules()).items()) == list(modules.items())
    after = tensors_of(model)
    assert after.keys() == before.keys()
    for name, (values, layout) in after.items():
        assert layout == before[name][1] and torch.equal(values, before[name][0])
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("settings", [{"objective": "kl"}, {**GUIDED, "objective": "cosine", "window": 2}], ids=["logits", "guided"])
def test_the_model_is_the_same_afterwards(learn, model, draw_tokens, settings):
    modules, before = dict(model.named_modules()), tensors_of(model)
    logits = model(draw_tokens(2, 8)).logits
    learn(**settings, epochs=1)
    assert_unchanged(model, modules, before)
    assert torch.equal(model(draw_tokens(2, 8)).logits, logits)


@pytest.mark.parametrize("settings", [{}, {"objective": "kl"}, GUIDED], ids=["cosine", "kl", "guided"])
@pytest.mark.parametrize("family", ["qwen2"], indirect=True)
def test_a_model_whose_parameters_want_gradients_is_left_without_any(learn, model, settings):
    """As `from_pretrained` returns it: norms, biases and the head are frozen too."""
    model.requires_grad_(True)
    modules, before = dict(model.named_modules()), tensors_of(model)
    learn(**settings, epochs=1)
    assert_unchanged(model, modules, before)


class Interruption(Exception):
    """Raised by a test in the middle of a run."""


@pytest.mark.parametrize("problem", [Interruption, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["epoch", "objective", "layer", "target"])
@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_the_model_is_the_same_after_an_exception(learn, model, adapter, monkeypatch, problem, where):
    modules, before = dict(model.named_modules()), tensors_of(model)

    def interrupt(*arguments, **named):
        raise problem

    def interrupt_epoch(record):
        if record.epoch == 1:
            raise problem

    if where == "objective":
        monkeypatch.setitem(LOGIT_OBJECTIVES, "kl", interrupt)
    if where == "target":
        monkeypatch.setattr(trainer, "finish", interrupt)
    handles = [adapter.layers(model)[2].mlp.register_forward_hook(lambda *_: torch.is_grad_enabled() and interrupt())] if where == "layer" else []
    with pytest.raises(problem):
        learn(objective="kl", on_epoch=interrupt_epoch)
    for handle in handles:
        handle.remove()
    assert_unchanged(model, modules, before)


@pytest.mark.parametrize("logits", ["identity", "uniform"])
@pytest.mark.parametrize("family", ["llama", "opt"], indirect=True)
def test_the_first_layers_keep_the_heuristic_permutations_in_partial_mode(learn, model, adapter, samples, logits):
    result = learn(last_layers=1, start="random", logits=logits, epochs=1)
    statistics = list(dense_statistics(LoadedModel(model, adapter), samples.tokens, 4))
    for index, layer in enumerate(adapter.layers(model)):
        for name, group in adapter.linear_groups.items():
            weight = weight_of(layer, group)
            score = PRUNING_METRICS["wanda"](weight, statistics[index][name]).of(weight)
            assert (result.permutations[index][name] == heuristic_permutation(score, PATTERN)) == (index < 2)


@pytest.mark.parametrize("settings", [{}, {"logits": "uniform"}, {"window": 1}, {"estimator": "soft", "gumbel": 1.0}])
@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_channels_never_leave_their_block_of_the_start(learn, settings):
    moved = 0
    for layer in learn(**{"start": "identity", **settings}).permutations:
        for permutation in layer.values():
            blocks = permutation.order.view(-1, 16).sort(-1).values
            assert torch.equal(blocks.flatten(), torch.arange(len(permutation)))
            moved += not torch.equal(permutation.order, torch.arange(len(permutation)))
    assert moved


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_without_held_out_sequences_the_training_ones_choose(learn, measure, samples):
    everything = CalibrationSet(samples.tokens)
    result = learn(samples=everything)
    measured = measure(result, samples=everything, rows=everything.training_rows)
    assert measured == pytest.approx(result.best.held_out_loss, rel=1e-4)


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_held_out_sequences_are_not_learned_on(learn, samples, draw_tokens):
    """Other held-out sequences: other losses on them, but the same training."""
    others = CalibrationSet(torch.cat([samples.tokens[samples.training_rows], draw_tokens(4, 16, seed=9)]), held_out=4)
    first, second = learn(), learn(samples=others)
    for record, other in zip(first.history[1:], second.history[1:], strict=True):
        assert record.training_loss == pytest.approx(other.training_loss, rel=1e-5)
    assert first.history[0].held_out_loss != second.history[0].held_out_loss


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_only_the_first_sequences_are_learned_on_if_so_many_are_asked_for(learn, samples, draw_tokens):
    tokens = samples.tokens.clone()
    tokens[5:8] = draw_tokens(3, 16, seed=9)
    first, second = learn(sequences=5), learn(samples=CalibrationSet(tokens, held_out=4), sequences=5)
    assert first.history == second.history and first.history != learn().history


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_more_sequences_than_there_are_is_an_error(learn):
    with pytest.raises(ValueError, match="sequences is 9, but the calibration has 8 that are not held out"):
        learn(sequences=9)


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_the_learning_rate_follows_its_schedule(learn, monkeypatch):
    """With a rate of zero after the first step, and one temperature, nothing moves after the first epoch."""
    seen = []
    monkeypatch.setattr(group_permutations, "cosine_decay", lambda progress: seen.append(progress) or float(progress == 0))
    history = learn(logits="uniform", temperature_end=1.0).history
    assert seen == pytest.approx([step / 6 for step in range(7)])
    assert history[0].held_out_loss != history[1].held_out_loss == history[2].held_out_loss == history[3].held_out_loss


@pytest.mark.parametrize("settings", [{}, {"window": 1}])
@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_every_epoch_is_reported_as_it_ends(learn, settings):
    seen = []
    result = learn(on_epoch=seen.append, **settings)
    assert seen == result.history


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_windows_learn_one_after_another_each_from_its_start(learn):
    """The first window's losses are those of a model of which only these layers are pruned."""
    history = learn(window=2, last_layers=3).history
    assert [(record.window, record.epoch) for record in history] == [(window, epoch) for window in (0, 1) for epoch in range(4)]
    assert [record.training_loss is None for record in history] == [record.epoch == 0 for record in history]
    assert history[0].is_best and history[4].is_best


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_window_over_all_layers_is_learning_them_together(learn):
    together, window = learn(), learn(window=3)
    assert together.permutations == window.permutations and together.history == window.history


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_patience_ends_a_run_that_no_longer_improves(learn):
    """At such a rate no permutation moves, so that no epoch is better than the start."""
    for patience, last in ((1, 1), (2, 2), (5, 3)):
        assert [record.epoch for record in learn(learning_rate=1e-9, patience=patience).history] == list(range(last + 1))
    history = learn(learning_rate=1e-9, patience=1, window=1).history
    assert [(record.window, record.epoch) for record in history] == [(window, epoch) for window in range(3) for epoch in range(2)]


@pytest.mark.parametrize(
    "settings", [{}, {"objective": "kl", "precision": "bfloat16"}, {"estimator": "soft", "layer_objective": {"cosine": 1.0}}, GUIDED]
)
@pytest.mark.parametrize("family", ["llama", "opt"], indirect=True)
def test_recomputing_the_layers_changes_nothing(learn, settings):
    """Bit for bit: the second forward pass repeats the first."""
    kept, recomputed = learn(**settings, epochs=2), learn(**settings, epochs=2, recompute_layers=True)
    assert recomputed.history == kept.history and recomputed.permutations == kept.permutations


@pytest.mark.parametrize("settings", [{}, {"estimator": "soft"}, {"objective": "kl"}, {"window": 1}, GUIDED])
@pytest.mark.parametrize("family", ["llama", "qwen2"], indirect=True)
def test_products_in_bfloat16_learn_too(learn, measure, settings):
    """bfloat16 has 8 bits: what it adds to a distance of this size is a few per cent."""
    exact, result = learn(**settings, epochs=1), learn(**settings, epochs=2, precision="bfloat16")
    assert result.history[0].held_out_loss == pytest.approx(exact.history[0].held_out_loss, rel=0.05)
    assert result.best.held_out_loss <= result.start.held_out_loss
    assert measure(result, **settings) == pytest.approx(result.best.held_out_loss, rel=0.05)


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_products_in_bfloat16_have_nearly_the_gradient_of_exact_ones(learn, monkeypatch):
    gradients = []
    pull_back = group_permutations.LearnedGroups.pull_back

    def record(groups):
        pull_back(groups)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in groups.parameters()]))

    monkeypatch.setattr(group_permutations.LearnedGroups, "pull_back", record)
    for estimator in ("hard", "soft"):
        gradients.clear()
        for precision in ("model", "bfloat16"):
            learn(estimator=estimator, precision=precision, batch_size=8, epochs=1, mask_temperature=1.0)
        error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
        assert 0 < error < 0.1


@pytest.mark.parametrize("settings", [{}, {"last_layers": 2, "window": 1}], ids=["all", "window"])
def test_exactly_the_layers_that_learn_are_masked(learn, model, adapter, settings):
    linears = [list(adapter.linears(layer)) for layer in adapter.layers(model)]
    seen = []

    def look(record):
        layers = adapter.layers(model)
        seen.append([{type(layer.get_submodule(path)) for path in paths} for layer, paths in zip(layers, linears, strict=True)])

    learn(**settings, epochs=1, on_epoch=look)
    masked = [[True] * 3] * 2 if not settings else [[False, True, False]] * 2 + [[False, False, True]] * 2
    assert seen == [[{MaskedLinear if is_masked else torch.nn.Linear} for is_masked in layers] for layers in masked]


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_linears_are_put_back_when_the_masking_itself_fails(learn, model, monkeypatch):
    modules, before, made = dict(model.named_modules()), tensors_of(model), []
    original = trainer.mask_rule
    monkeypatch.setattr(trainer, "mask_rule", lambda *arguments: made.append(1) or (original(*arguments) if len(made) < 10 else 1 / 0))
    with pytest.raises(ZeroDivisionError):
        learn()
    assert_unchanged(model, modules, before)


@pytest.mark.parametrize("family", ["llama", "opt"], indirect=True)
@pytest.mark.parametrize("settings", [{}, {"optimizer": "guided"}], ids=["logits", "guided"])
def test_starts_that_are_known_already_are_taken_as_they_are(learn, model, adapter, samples, config, settings):
    statistics = list(dense_statistics(LoadedModel(model, adapter), samples.tokens, 4))
    starts = find_starts(LoadedModel(model, adapter), statistics, PATTERN, "wanda", config(start="random", seed=7))
    given = learn_permutations(LoadedModel(model, adapter), samples, statistics, PATTERN, "wanda", config(**settings), starts=starts)
    expected = learn_permutations(
        LoadedModel(model, adapter), samples, statistics, PATTERN, "wanda", config(start="random", seed=7, epochs=1, **settings)
    )
    assert given.history[0].held_out_loss == expected.history[0].held_out_loss != learn(**settings, epochs=1).history[0].held_out_loss


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_statistics_of_too_few_layers_are_an_error_and_leave_the_model_as_it_is(model, adapter, samples, config):
    statistics = list(dense_statistics(LoadedModel(model, adapter), samples.tokens, 4))[:2]
    modules, before = dict(model.named_modules()), tensors_of(model)
    with pytest.raises(ValueError, match="statistics of 2 decoder layers, but the model has 3"):
        learn_permutations(LoadedModel(model, adapter), samples, statistics, PATTERN, "wanda", config())
    assert_unchanged(model, modules, before)


def break_objective(monkeypatch, when):
    """Let the cosine distance be NaN in the calls for which `when(number of training calls, of evaluations)` holds."""
    calls = {True: 0, False: 0}

    def breaking(sparse, dense):
        calls[sparse.requires_grad] += 1
        return cosine_distance(sparse, dense) * (float("nan") if when(calls[True], calls[False]) else 1)

    monkeypatch.setitem(HIDDEN_OBJECTIVES, "cosine", breaking)


@pytest.mark.parametrize("family", ["llama", "opt"], indirect=True)
def test_a_loss_that_is_not_a_number_ends_the_run_with_the_best_so_far_and_says_where(learn, measure, monkeypatch, caplog):
    undisturbed = learn(logits="uniform")
    break_objective(monkeypatch, lambda training, evaluation: training == 4)
    result = learn(logits="uniform")
    monkeypatch.undo()
    assert result.history == undisturbed.history[:2]
    last = f"last good state: epoch 1, held-out loss {result.history[1].held_out_loss:.6g}"
    advice = "Lower learning_rate, or load the model in float32"
    assert result.stopped == f"the loss is nan at step 3 (epoch 2), though all hidden states are finite; {last}. {advice}"
    assert result.stopped in caplog.text
    assert result.best.held_out_loss == min(record.held_out_loss for record in result.history)
    assert measure(result) == pytest.approx(result.best.held_out_loss, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "opt_post_norm"], indirect=True)
@pytest.mark.parametrize("broken", [0, 1, 2])
def test_the_first_layer_whose_output_is_not_finite_is_named(learn, model, adapter, broken):
    modules, steps = dict(model.named_modules()), []

    def hook(layer, arguments, output):
        steps.append(torch.is_grad_enabled())
        return output * float("nan") if sum(steps) >= 3 else output

    handle = adapter.layers(model)[broken].register_forward_hook(hook)
    result = learn()
    handle.remove()
    assert f"the loss is nan at step 2 (epoch 2), first in {adapter.layer_path(broken)};" in result.stopped
    assert [record.epoch for record in result.history] == [0, 1]
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_held_out_loss_that_is_not_a_number_is_never_the_best(learn, monkeypatch):
    """Otherwise nothing that follows counts as better, and the start is returned silently."""
    break_objective(monkeypatch, lambda training, evaluation: evaluation == 3)
    result = learn()
    assert "the held-out loss is nan after epoch 2" in result.stopped and "last good state: epoch 1" in result.stopped
    assert [record.epoch for record in result.history] == [0, 1]


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_guided_moves_never_follow_a_gradient_that_is_not_finite(learn, measure, monkeypatch):
    regroup = GuidedGroups.regroup

    def breaking(groups, linears, *arguments):
        breaking.rounds += 1
        if breaking.rounds == 2:
            linears[1]["mlp_out"][0].gradient[3, 2] = float("inf")
        return regroup(groups, linears, *arguments)

    breaking.rounds = 0
    monkeypatch.setattr(GuidedGroups, "regroup", breaking)
    result = learn(**GUIDED)
    assert "gradients of the masked weights are no longer finite, first in a group mlp_out at the end of epoch 2" in result.stopped
    assert "Raise curvature" in result.stopped and "learning_rate" not in result.stopped
    assert [record.epoch for record in result.history] == [0, 1]
    assert measure(result, **GUIDED) == pytest.approx(result.best.held_out_loss, rel=1e-4)


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_start_whose_loss_is_not_a_number_is_an_error(learn, model, monkeypatch):
    modules = dict(model.named_modules())
    break_objective(monkeypatch, lambda training, evaluation: True)
    with pytest.raises(LearningError, match="the held-out loss is nan after epoch 0, though all hidden states are finite"):
        learn()
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize("settings", [{}, {"objective": "kl"}, GUIDED], ids=["cosine", "kl", "guided"])
@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_start_with_a_broken_layer_is_an_error_that_names_it(learn, model, adapter, settings):
    modules = dict(model.named_modules())

    def hook(layer, arguments, output):
        return output * float("nan") if isinstance(layer.self_attn.q_proj, MaskedLinear) else output

    handle = adapter.layers(model)[1].register_forward_hook(hook)
    with pytest.raises(LearningError, match=r"the held-out loss is nan after epoch 0, first in model\.layers\.1"):
        learn(**settings)
    handle.remove()
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_layers_after_a_window_that_breaks_keep_their_starts(learn, measure, model, adapter, samples, config, monkeypatch):
    undisturbed = learn(window=1, logits="uniform")
    break_objective(monkeypatch, lambda training, evaluation: training == 9)  # two steps an epoch: step 2 of the second window
    result = learn(window=1, logits="uniform")
    assert "at step 2 (epoch 2)" in result.stopped
    assert result.history == undisturbed.history[:6] and result.permutations[0] == undisturbed.permutations[0]
    statistics = list(dense_statistics(LoadedModel(model, adapter), samples.tokens, 4))
    assert result.permutations[2] == find_starts(LoadedModel(model, adapter), statistics, PATTERN, "wanda", config())[2]


@pytest.mark.parametrize("estimator", ["hard", "soft"])
@pytest.mark.parametrize("batch_size", [4, 8])
@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_learning_rate_that_breaks_the_logits_is_named_with_the_epoch(learn, measure, estimator, batch_size):
    """After one step an epoch, or two."""
    result = learn(learning_rate=1e25, estimator=estimator, batch_size=batch_size, epochs=6)
    problem, _, last = result.stopped.partition("; last good state: ")
    assert f"epoch {len(result.history)}" in problem and last.startswith(f"epoch {len(result.history) - 1},")
    assert "Lower learning_rate" in last
    assert measure(result) == pytest.approx(result.best.held_out_loss, rel=1e-4)


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_layer_that_no_block_size_fits_is_named_before_the_run(learn):
    with pytest.raises(ValueError) as error:
        learn(block_size=256)
    assert all(f"model.layers.{index}.mlp.down_proj: no block size near 256 divides 48 channels" in str(error.value) for index in range(3))


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_block_sizes_that_differ_from_the_one_asked_for_are_logged(learn, caplog):
    with caplog.at_level("INFO"):
        learn(block_size=32, epochs=1)
    assert "layers of 48 channels are permuted in blocks of 24: 32 does not divide them" in caplog.text
    assert "layers of 32 channels" not in caplog.text


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_an_unknown_score_lists_the_known_ones(learn):
    with pytest.raises(ValueError, match="magnitude, obs, ria, wanda"):
        learn("wand")


@pytest.mark.parametrize("family", ["llama", "opt"], indirect=True)
@pytest.mark.parametrize("settings", [{}, {"objective": "kl"}, {"estimator": "soft", "recompute_layers": True}, GUIDED])
def test_a_bfloat16_model_learns(family, tiny_model, samples, config, settings):
    model = tiny_model(family).bfloat16()
    adapter, before = adapter_of(model), tensors_of(model)
    statistics = list(dense_statistics(LoadedModel(model, adapter), samples.tokens, 4))
    result = learn_permutations(LoadedModel(model, adapter), samples, statistics, PATTERN, "wanda", config(**settings))
    assert result.best.held_out_loss <= result.start.held_out_loss
    assert all(0 < record.held_out_loss < 1 for record in result.history)
    assert_unchanged(model, dict(model.named_modules()), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama"], indirect=True)
@pytest.mark.parametrize("variant", VARIANTS)
def test_permutations_learn_on_a_gpu(model, adapter, samples, config, variant):
    model = model.cuda()
    statistics = list(dense_statistics(LoadedModel(model, adapter), samples.tokens, 4))
    result = learn_permutations(LoadedModel(model, adapter), samples, statistics, PATTERN, "wanda", config(**VARIANTS[variant]))
    assert result.best.held_out_loss <= result.start.held_out_loss
    pruned = list(prune_in_parallel(model_weights(model, adapter), adapter, statistics, PATTERN, PruningMethod("wanda", "lcp"), result.permutations))
    apply_layer(adapter.layers(model)[0], pruned[0])
