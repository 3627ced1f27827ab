"""Stepping layer by layer is held against the model's own forward, for every family. Sequences exceed Mistral's window."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from permllm.calibration.capture import DecoderInputs, advance, capture_decoder_inputs, dense_statistics, layer_statistics, run_layer
from permllm.models.families import adapter_of
from permllm.models.streaming import LoadedModel

LENGTH = 24


@contextmanager
def recorded(modules, *, inputs):
    """Record what each module receives (or puts out), by its position or name, over all calls."""
    records = {name: [] for name in modules}
    handles = []
    for name, module in modules.items():
        record = records[name]
        if inputs:
            handles.append(module.register_forward_pre_hook(lambda _, arguments, record=record: record.append(arguments[0])))
        else:
            handles.append(module.register_forward_hook(lambda _, arguments, output, record=record: record.append(output)))
    yield records
    for handle in handles:
        handle.remove()


def own_layer_outputs(model, adapter, tokens):
    """Return what every decoder layer puts out in the model's own forward, in order."""
    with recorded(dict(enumerate(adapter.layers(model))), inputs=False) as outputs, torch.no_grad():
        model(tokens)
    return [torch.cat(outputs[index]) for index in range(len(outputs))]


def step_through(model, adapter, tokens, batch_size):
    inputs = capture_decoder_inputs(model, adapter, tokens)
    for index, layer in enumerate(adapter.layers(model)):
        advance(layer, inputs, batch_size, adapter.layer_path(index))
        yield inputs.hidden.clone()


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_stepping_through_the_layers_gives_the_models_own_hidden_states(model, adapter, draw_tokens, batch_size):
    tokens = draw_tokens(5, LENGTH)
    own = own_layer_outputs(model, adapter, tokens)
    stepped = list(step_through(model, adapter, tokens, batch_size))
    assert len(stepped) == 3
    for expected, found in zip(own, stepped, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_attention_implementation_can_be_stepped_through(model, adapter, draw_tokens, attention):
    model.set_attn_implementation(attention)
    tokens = draw_tokens(3, LENGTH)
    for expected, found in zip(own_layer_outputs(model, adapter, tokens), step_through(model, adapter, tokens, 2), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"], indirect=True)
def test_layers_with_and_without_a_sliding_window_can_be_mixed(family, tiny_model, draw_tokens):
    model = tiny_model(family, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    assert model.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    adapter, tokens = adapter_of(model), draw_tokens(3, LENGTH)
    for expected, found in zip(own_layer_outputs(model, adapter, tokens), step_through(model, adapter, tokens, 2), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_the_sliding_window_of_the_tiny_mistral_matters(tiny_model, draw_tokens):
    with_window, without = tiny_model("mistral"), tiny_model("mistral", sliding_window=None)
    tokens = draw_tokens(1, LENGTH)
    with torch.no_grad():
        difference = (with_window(tokens).logits - without(tokens).logits).abs().amax(-1)[0]
    assert difference[7] == 0 and difference[-1] > 1e-3


def test_capturing_one_by_one_and_all_together_gives_the_same_hidden_states(model, adapter, draw_tokens):
    tokens = draw_tokens(4, LENGTH)
    together = capture_decoder_inputs(model, adapter, tokens).hidden
    alone = torch.cat([capture_decoder_inputs(model, adapter, row[None]).hidden for row in tokens])
    assert torch.equal(together, alone)


def test_capturing_leaves_no_hook_behind(model, adapter, draw_tokens):
    capture_decoder_inputs(model, adapter, draw_tokens(2, 4))
    list(dense_statistics(LoadedModel(model, adapter), draw_tokens(2, 4), batch_size=2))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_the_models_own_errors_are_not_swallowed(llama, draw_tokens):
    with pytest.raises(IndexError):
        capture_decoder_inputs(llama, adapter_of(llama), draw_tokens(1, 4) + 1000)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_gram_matrix_is_that_of_what_every_linear_reads(model, adapter, draw_tokens, batch_size):
    tokens = draw_tokens(5, LENGTH)
    linears = {(index, path): linear for index, layer in enumerate(adapter.layers(model)) for path, linear in adapter.linears(layer).items()}
    with recorded(linears, inputs=True) as inputs, torch.no_grad():
        model(tokens)
    statistics = list(dense_statistics(LoadedModel(model, adapter), tokens, batch_size))
    for index, stats in enumerate(statistics):
        assert stats.keys() == adapter.linear_groups.keys()
        for name, group in adapter.linear_groups.items():
            assert stats[name].tokens == tokens.numel() and stats[name].gram.dtype == torch.float32
            for path in group.readers:
                x = torch.cat(inputs[index, path]).flatten(0, -2).double()
                expected = x.t() @ x / len(x)
                torch.testing.assert_close(stats[name].gram.double(), expected, atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(stats[name].norms.double(), x.square().mean(0).sqrt(), atol=1e-5, rtol=1e-5)


def test_gathering_statistics_does_not_move_the_hidden_states(model, adapter, draw_tokens):
    inputs = capture_decoder_inputs(model, adapter, draw_tokens(3, LENGTH))
    before = inputs.hidden.clone()
    layer_statistics(adapter.layers(model)[0], adapter, inputs, batch_size=2)
    assert torch.equal(inputs.hidden, before)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_layer(model, adapter, draw_tokens, broken):
    path = adapter.linear_groups["mlp_out"].readers[0]
    adapter.linears(adapter.layers(model)[1])[path].weight[0, 0] = broken
    with pytest.raises(ValueError, match=rf"NaN or infinity after {adapter.decoder_layers}\.1;"):
        list(dense_statistics(LoadedModel(model, adapter), draw_tokens(2, LENGTH), batch_size=2))


def test_a_layer_that_returns_a_tuple_gives_its_first_entry():
    class Layer(nn.Module):
        def forward(self, hidden, scale):
            return hidden * scale, "weights"

    inputs = DecoderInputs(torch.ones(2, 1, 1), {"scale": 3})
    assert run_layer(Layer(), inputs.hidden, inputs.keywords).flatten().tolist() == [3, 3]
