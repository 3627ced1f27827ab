"""Checkpoints trained by others, and the shipped one: awkward widths, grouped queries, learned positions."""

from copy import deepcopy

import pytest
import torch

from permllm.calibration.capture import advance, capture_decoder_inputs, dense_statistics
from permllm.calibration.samples import draw_windows, tokenize
from permllm.calibration.texts import TextSource, read_documents
from permllm.evaluation.perplexity import perplexity
from permllm.models.families import adapter_of
from permllm.models.loading import ModelSource, context_length, load_model, load_tokenizer
from permllm.models.streaming import LoadedModel
from permllm.pruning.layerwise import apply_layer, model_weights, prune_in_parallel
from permllm.pruning.methods import PruningMethod
from permllm.sparsity.mask import is_nm_sparse
from permllm.sparsity.pattern import NMPattern

# By name: decoder layers, the widths of their inputs.
CHECKPOINTS = {
    "stories260K-llama": (5, {64, 172}),
    "BabyLlama-tok361": (5, {128, 352}),
    "TinyStoriesGPT-char-opt": (4, {64, 256}),
}


@pytest.fixture(params=sorted(CHECKPOINTS))
def real(request, third_party):
    """A checkpoint by others: its name, the model, and tokens of the kind of text that it was trained on."""
    folder = third_party / "models" / request.param
    source = ModelSource(str(folder), device="cpu")
    stories = read_documents(TextSource(files=str(third_party / "text/tinystories_sample/stories_clean.jsonl")))
    return request.param, load_model(source), tokenize(list(stories.values())[:80], load_tokenizer(source))


def test_real_checkpoints_have_the_expected_layers_and_predict_their_text(real):
    name, model, tokens = real
    layers, widths = CHECKPOINTS[name]
    adapter = adapter_of(model)
    assert len(adapter.layers(model)) == layers and set(adapter.widths(model).values()) == widths
    length = context_length(model.config)
    assert perplexity(LoadedModel.of(model), tokens[: 20 * length], length) < model.config.vocab_size / 10


def test_stepping_through_real_checkpoints_gives_their_own_hidden_states(real):
    _, model, tokens = real
    adapter = adapter_of(model)
    samples = draw_windows(tokens, 4, min(64, context_length(model.config)), seed=0)
    own = []
    handles = [layer.register_forward_hook(lambda _, arguments, output: own.append(output)) for layer in adapter.layers(model)]
    with torch.no_grad():
        model(samples.tokens)
    for handle in handles:
        handle.remove()
    inputs = capture_decoder_inputs(model, adapter, samples.tokens)
    for index, layer in enumerate(adapter.layers(model)):
        advance(layer, inputs, 2, adapter.layer_path(index))
        torch.testing.assert_close(inputs.hidden, own[index], atol=1e-5, rtol=1e-5)


def test_real_checkpoints_are_pruned_to_two_of_four_and_still_predict(real):
    _, model, tokens = real
    adapter, pattern = adapter_of(model), NMPattern(2, 4)
    pattern.check_widths(adapter.widths(model))
    length = min(64, context_length(model.config))
    text, samples = tokens[: 20 * length], draw_windows(tokens[20 * length :], 16, length, seed=0)
    dense = perplexity(LoadedModel.of(model), text, length)
    retained = {}
    for permutation in ("identity", "cp"):
        method = PruningMethod("wanda", permutation)
        layers = list(
            prune_in_parallel(
                model_weights(model, adapter), adapter, dense_statistics(LoadedModel(model, adapter), samples.tokens, 8), pattern, method
            )
        )
        retained[permutation] = [group.retained_score for layer in layers for group in layer.values()]
    assert all(cp >= identity for identity, cp in zip(retained["identity"], retained["cp"], strict=True))
    for layer, pruned in zip(adapter.layers(model), layers, strict=True):
        apply_layer(layer, pruned)
        for group in pruned.values():
            assert all(is_nm_sparse(group.permutation.apply(layer.get_submodule(path).weight), pattern) for path in group.linears)
    assert dense < perplexity(LoadedModel.of(model), text, length) < model.config.vocab_size  # worse than dense, better than guessing


def test_a_pattern_that_does_not_fit_names_every_layer_of_that_width(third_party):
    model = load_model(ModelSource(str(third_party / "models" / "stories260K-llama"), device="cpu"))
    with pytest.raises(ValueError, match="4:8 sparsity needs channels in multiples of 8") as error:
        NMPattern(4, 8).check_widths(adapter_of(model).widths(model))
    assert [f"model.layers.{index}.mlp.down_proj has 172" in str(error.value) for index in range(5)] == [True] * 5
    assert str(error.value).count(" has ") == 5


def test_the_shipped_model_has_the_perplexity_of_its_model_card(shipped_model, repository):
    """`c_*` fiction."""
    source = ModelSource(str(shipped_model), device="cpu")
    passages = read_documents(TextSource(files=str(repository / "data" / "prose" / "c_*.txt")))
    tokens = tokenize(list(passages.values()), load_tokenizer(source))
    assert perplexity(LoadedModel.of(load_model(source)), tokens, 256) == pytest.approx(39.8, abs=0.06)


def test_the_shipped_model_is_pruned_better_with_a_permutation_than_without(shipped_model, repository):
    source, pattern = ModelSource(str(shipped_model), device="cpu"), NMPattern(2, 4)
    model, tokenizer = load_model(source), load_tokenizer(source)
    odd, even = (
        tokenize(list(read_documents(TextSource(files=str(repository / "data" / "prose" / f"a_0[{digits}].txt"))).values()), tokenizer)
        for digits in ("13579", "2468")
    )
    adapter = adapter_of(model)
    statistics = list(dense_statistics(LoadedModel(model, adapter), draw_windows(odd, 8, 128, seed=0).tokens, 8))
    found = {}
    for permutation in ("identity", "cp"):
        sparse = deepcopy(model)
        layers = prune_in_parallel(model_weights(model, adapter), adapter, statistics, pattern, PruningMethod("wanda", permutation))
        for layer, pruned in zip(adapter.layers(sparse), layers, strict=True):
            apply_layer(layer, pruned)
        found[permutation] = perplexity(LoadedModel.of(sparse), even, 256)
    assert perplexity(LoadedModel.of(model), even, 256) < found["cp"] < found["identity"]
