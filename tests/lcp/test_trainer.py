"""Learning permutations on tiny models, checked by pruning copies of the model and running them as they are."""

from dataclasses import replace

import pytest
import torch

from permllm.calibration.capture import dense_statistics
from permllm.calibration.samples import CalibrationSet
from permllm.lcp import trainer
from permllm.lcp.objective import cosine_distance
from permllm.lcp.recipes import LearnConfig
from permllm.lcp.trainer import LearningError, learn_permutations, masked_layers
from permllm.models.families import adapter_of
from permllm.permutation.heuristic import heuristic_permutation
from permllm.pruning.layerwise import apply_layer, model_weights, prune_in_parallel
from permllm.pruning.methods import PruningMethod
from permllm.pruning.metrics import PRUNING_METRICS
from permllm.sparsity.pattern import NMPattern

PATTERN = NMPattern(2, 4)
CONFIG = LearnConfig(block_size=16, start="cp", epochs=3, batch_size=4, learning_rate=0.1)


@pytest.fixture
def samples(draw_tokens):
    return CalibrationSet(draw_tokens(12, 16), held_out=4)


@pytest.fixture
def learn(model, adapter, samples):
    """`learn(score, **settings)`: a run on a tiny model."""
    statistics = list(dense_statistics(model, adapter, samples.tokens, 4))

    def run(score="wanda", samples=samples, **settings):
        return learn_permutations(model, adapter, samples, statistics, PATTERN, score, replace(CONFIG, **settings))

    return run


def prune_learned(model, adapter, statistics, result):
    return prune_in_parallel(model_weights(model, adapter), adapter, statistics, PATTERN, PruningMethod("wanda", "lcp"), result.permutations)


def last_hidden(model, adapter, tokens):
    """Return what the last decoder layer puts out in the model's own forward."""
    seen = []
    handle = adapter.layers(model)[-1].register_forward_hook(lambda _, arguments, output: seen.append(output))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    return seen[0]


def measured_loss(dense, sparse, samples, rows, result):
    """Prune `sparse` with learned permutations and return the distance of its output to the dense model's."""
    adapter = adapter_of(dense)
    statistics = list(dense_statistics(dense, adapter, samples.tokens, 4))
    layers = prune_learned(dense, adapter, statistics, result)
    for layer, pruned in zip(adapter.layers(sparse), layers, strict=True):
        apply_layer(layer, pruned)
    tokens = samples.tokens[rows]
    return cosine_distance(last_hidden(sparse, adapter, tokens), last_hidden(dense, adapter, tokens)).item()


@pytest.mark.parametrize("start", ["identity", "cp", "random"])
def test_the_reported_loss_is_that_of_the_pruned_model_on_the_held_out_sequences(learn, model, family, tiny_model, samples, start):
    result = learn(start=start)
    measured = measured_loss(model, tiny_model(family), samples, samples.held_out_rows, result)
    assert measured == pytest.approx(min(record.held_out_loss for record in result.history), rel=1e-4)


def test_the_start_of_identity_is_one_shot_pruning_without_a_permutation(learn, model, adapter, family, tiny_model, samples):
    start = learn(start="identity", epochs=1).history[0]
    statistics = dense_statistics(model, adapter, samples.tokens, 4)
    layers = prune_in_parallel(model_weights(model, adapter), adapter, statistics, PATTERN, PruningMethod("wanda"))
    sparse, tokens = tiny_model(family), samples.tokens[samples.held_out_rows]
    for layer, pruned in zip(adapter.layers(sparse), layers, strict=True):
        apply_layer(layer, pruned)
    measured = cosine_distance(last_hidden(sparse, adapter, tokens), last_hidden(model, adapter, tokens)).item()
    assert measured == pytest.approx(start.held_out_loss, rel=1e-4)


@pytest.mark.parametrize("score", sorted(PRUNING_METRICS))
def test_the_result_is_never_worse_than_the_start_on_the_held_out_sequences(learn, score):
    history = learn(score).history
    assert [record.epoch for record in history] == [0, 1, 2, 3]
    best = [record for record in history if record.is_best][-1]
    assert best.held_out_loss == min(record.held_out_loss for record in history) <= history[0].held_out_loss
    assert history[0].training_loss is None and history[0].is_best
    assert [record.temperature for record in history] == pytest.approx([1, 1 - 0.9 / 5, 1 - 0.9 * 3 / 5, 0.1])


@pytest.mark.parametrize("family", ["llama", "opt"], indirect=True)
def test_learning_finds_better_permutations_than_the_start(learn, samples):
    """On the training sequences themselves; what it gains on others depends on the model."""
    everything = CalibrationSet(samples.tokens)
    history = learn(samples=everything, start="identity", epochs=15).history
    assert min(record.held_out_loss for record in history) < 0.95 * history[0].held_out_loss


def test_equal_seeds_learn_equal_permutations_and_others_do_not(learn):
    first, second, other = (learn(start="random", seed=seed) for seed in (1, 1, 2))
    assert first.permutations == second.permutations and first.history == second.history
    assert first.permutations != other.permutations


def test_the_state_of_the_global_generator_does_not_matter(learn):
    torch.manual_seed(1)
    first = learn(start="random", epochs=1)
    torch.manual_seed(2)
    assert learn(start="random", epochs=1).permutations == first.permutations


def test_the_model_is_the_same_afterwards(learn, model, draw_tokens):
    modules, tensors = dict(model.named_modules()), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = model(draw_tokens(2, 8)).logits
    learn()
    assert dict(model.named_modules()) == modules
    assert model.state_dict().keys() == tensors.keys() and all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model(draw_tokens(2, 8)).logits, logits)


def test_the_first_layers_keep_the_heuristic_permutations_in_partial_mode(learn, model, adapter, samples):
    result = learn(last_layers=1, start="random", epochs=1)
    statistics = list(dense_statistics(model, adapter, samples.tokens, 4))
    for index, layer in enumerate(adapter.layers(model)):
        for name, group in adapter.linear_groups.items():
            score = torch.cat([PRUNING_METRICS["wanda"](layer.get_submodule(path).weight, statistics[index][name]) for path in group.readers])
            assert (result.permutations[index][name] == heuristic_permutation(score, PATTERN)) == (index < 2)


def test_the_loss_in_partial_mode_counts_the_pruned_layers_before(learn, model, family, tiny_model, samples):
    result = learn(last_layers=1)
    measured = measured_loss(model, tiny_model(family), samples, samples.held_out_rows, result)
    assert measured == pytest.approx(min(record.held_out_loss for record in result.history), rel=1e-4)


def test_channels_never_leave_their_block_of_the_start(learn):
    for layer in learn(start="identity").permutations:
        for permutation in layer.values():
            blocks = permutation.order.view(-1, 16).sort(-1).values
            assert torch.equal(blocks.flatten(), torch.arange(len(permutation)))


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_without_held_out_sequences_the_training_ones_choose(learn, model, family, tiny_model, samples):
    everything = CalibrationSet(samples.tokens)
    result = learn(samples=everything)
    measured = measured_loss(model, tiny_model(family), everything, everything.training_rows, result)
    assert measured == pytest.approx(min(record.held_out_loss for record in result.history), rel=1e-4)


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_held_out_sequences_are_not_learned_on(learn, samples, draw_tokens):
    """Other held-out sequences: other losses on them, but the same training."""
    others = CalibrationSet(torch.cat([samples.tokens[samples.training_rows], draw_tokens(4, 16, seed=9)]), held_out=4)
    first, second = learn(), learn(samples=others)
    for record, other in zip(first.history[1:], second.history[1:], strict=True):
        assert record.training_loss == pytest.approx(other.training_loss, rel=1e-5)
    assert first.history[0].held_out_loss != second.history[0].held_out_loss


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_more_sequences_than_there_are_is_an_error(learn):
    with pytest.raises(ValueError, match="sequences"):
        learn(sequences=9)  # 8 of the 12 are not held out


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_the_learning_rate_follows_its_schedule(learn, monkeypatch):
    """With a rate of zero after the first step, and one temperature, nothing moves after the first epoch."""
    seen = []
    monkeypatch.setattr(trainer, "cosine_decay", lambda progress: seen.append(progress) or float(progress == 0))
    history = learn(start="random", temperature_end=1.0).history
    assert seen == pytest.approx([step / 6 for step in range(7)])
    assert history[0].held_out_loss != history[1].held_out_loss == history[2].held_out_loss == history[3].held_out_loss


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_every_epoch_is_reported_as_it_ends(learn, model, adapter, samples):
    seen = []
    statistics = list(dense_statistics(model, adapter, samples.tokens, 4))
    result = learn_permutations(model, adapter, samples, statistics, PATTERN, "wanda", CONFIG, on_epoch=seen.append)
    assert seen == result.history


def test_masked_layers_put_every_linear_back_whatever_happens(model, adapter, samples):
    statistics = list(dense_statistics(model, adapter, samples.tokens, 4))
    modules = dict(model.named_modules())
    for problem in (KeyboardInterrupt, None):
        try:
            with masked_layers(model, adapter, statistics, PATTERN, "wanda", CONFIG, 0, torch.Generator()) as groups:
                assert len(groups) == 3 and groups[0].keys() == adapter.linear_groups.keys()
                assert not any(dict(model.named_modules())[path] is modules[path] for path in adapter.paths(3))
                if problem:
                    raise problem
        except KeyboardInterrupt:
            pass
        assert dict(model.named_modules()) == modules


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_statistics_of_too_few_layers_are_an_error_and_leave_the_model_as_it_is(model, adapter, samples):
    statistics = list(dense_statistics(model, adapter, samples.tokens, 4))[:2]
    modules = dict(model.named_modules())
    with pytest.raises(ValueError):
        learn_permutations(model, adapter, samples, statistics, PATTERN, "wanda", CONFIG)
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_loss_that_is_not_a_number_stops_the_run_and_says_where(learn, model, monkeypatch):
    modules = dict(model.named_modules())
    calls = []

    def breaking(sparse, dense):
        calls.append(sparse.requires_grad)
        return cosine_distance(sparse, dense) * (float("nan") if sum(calls) == 4 else 1)

    monkeypatch.setitem(trainer.OBJECTIVES, "cosine", breaking)
    with pytest.raises(LearningError, match=r"the loss is nan at step 3 \(epoch 2\); lower learning_rate, or load the model in float32"):
        learn()
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_learning_rate_that_breaks_the_logits_is_named(learn):
    with pytest.raises(LearningError, match="learning_rate"):
        learn(learning_rate=1e20)


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_held_out_loss_that_is_not_a_number_is_never_the_best(learn, monkeypatch):
    """Otherwise nothing that follows counts as better, and the start is returned silently."""
    calls = []

    def breaking(sparse, dense):
        calls.append(1)
        return cosine_distance(sparse, dense) * (float("nan") if len(calls) == 1 else 1)

    monkeypatch.setitem(trainer.OBJECTIVES, "cosine", breaking)
    with pytest.raises(LearningError):
        learn()


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_block_size_that_does_not_fit_names_every_layer_and_the_fitting_sizes(learn):
    with pytest.raises(ValueError, match="block_size 32 does not divide the input channels") as error:
        learn(block_size=32)
    assert all(f"model.layers.{index}.mlp.down_proj has 48" in str(error.value) for index in range(3))
    assert str(error.value).endswith("block sizes that fit all layers: 4, 8, 16")


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_an_unknown_score_lists_the_known_ones(learn):
    with pytest.raises(ValueError, match="magnitude, ria, wanda"):
        learn("wand")


@pytest.mark.parametrize("family", ["llama", "opt"], indirect=True)
def test_a_bfloat16_model_learns(family, tiny_model, samples):
    model = tiny_model(family).bfloat16()
    adapter = adapter_of(model)
    statistics = list(dense_statistics(model, adapter, samples.tokens, 4))
    result = learn_permutations(model, adapter, samples, statistics, PATTERN, "wanda", CONFIG)
    assert all(0 < record.held_out_loss < 1 for record in result.history)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama"], indirect=True)
@pytest.mark.parametrize("start", ["identity", "cp", "random"])
@pytest.mark.parametrize("last_layers", [1, None])
def test_permutations_learn_on_a_gpu(model, adapter, samples, start, last_layers):
    model = model.cuda()
    statistics = list(dense_statistics(model, adapter, samples.tokens, 4))
    config = replace(CONFIG, start=start, last_layers=last_layers)
    result = learn_permutations(model, adapter, samples, statistics, PATTERN, "wanda", config)
    pruned = list(prune_learned(model, adapter, statistics, result))
    apply_layer(adapter.layers(model)[0], pruned[0])
