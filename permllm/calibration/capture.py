"""The inputs of the first decoder layer, and stepping through the rest one layer at a time.

The model's own forward runs up to its first decoder layer, once; the keyword arguments that the layer then
receives are kept and replayed verbatim. At any time one copy of the hidden states exists.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from permllm.calibration.statistics import GramAccumulator, LayerStats
from permllm.models.adapter import ModelAdapter, is_finite

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedModel


@dataclass
class DecoderInputs:
    """Hidden states on their way through the decoder layers.

    Attributes:
        hidden: (sequences, length, channels), input of the next decoder layer.
        keywords: keyword arguments of every decoder layer, for one sequence; they broadcast over a batch. Layers
            differ where a model mixes full attention and a sliding window.
    """

    hidden: Tensor
    keywords: Mapping[nn.Module, Mapping[str, Any]]


class _FirstLayerReached(Exception):
    """Ends the model's forward where the decoder layers begin."""


@torch.no_grad()
def capture_decoder_inputs(model: "PreTrainedModel", adapter: ModelAdapter, tokens: Tensor) -> DecoderInputs:
    """Run the model up to its first decoder layer.

    Args:
        tokens: (sequences, length) int64, on any device.

    Returns:
        The hidden states of all sequences on the model's device, and the layers' keyword arguments.
    """
    hidden: list[Tensor] = []
    layers = adapter.layers(model)
    keywords: dict[nn.Module, dict[str, Any]] = {}

    def keep(layer: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        keywords[layer] = {name: value for name, value in named.items() if name != "hidden_states"}

    def stop(layer: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        if len(arguments) > 1:
            raise TypeError(f"{type(layer).__name__} takes {len(arguments)} positional arguments; only hidden states can be replayed")
        hidden.append(arguments[0] if arguments else named["hidden_states"])
        raise _FirstLayerReached

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    try:
        model(tokens[:1].to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    handle = layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for sequence in tokens:
            try:
                model(sequence[None].to(model.device), use_cache=False)
            except _FirstLayerReached:
                pass
    finally:
        handle.remove()
    return DecoderInputs(torch.cat(hidden), keywords)


def run_layer(layer: nn.Module, hidden: Tensor, keywords: Mapping[str, Any]) -> Tensor:
    """Run one decoder layer on (sequences, length, channels) hidden states."""
    output = layer(hidden, **keywords)
    return output if isinstance(output, Tensor) else output[0]  # transformers before version 5 returned a tuple


class _Given(nn.Module):
    """Stands for all decoder layers: whatever comes in, the given hidden states come out."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.hidden


def finish(model: "PreTrainedModel", adapter: ModelAdapter, hidden: Tensor) -> Tensor:
    """Run what follows the decoder layers in the model's own forward: its final norm and its head.

    Args:
        hidden: (sequences, length, channels) after the last decoder layer; gradients flow to it.

    Returns:
        (sequences, length, vocabulary) logits.
    """
    layers = adapter.layers(model)
    model.set_submodule(adapter.decoder_layers, nn.ModuleList([_Given(hidden)]))
    try:
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)  # only their shape matters now
        return model(tokens, use_cache=False).logits
    finally:
        model.set_submodule(adapter.decoder_layers, layers)


@torch.no_grad()
def advance(layer: nn.Module, inputs: DecoderInputs, batch_size: int, name: str) -> None:
    """Replace the hidden states by the layer's output, batch by batch and in place.

    Raises:
        ValueError: if the output holds NaN or infinity; `name` tells where.
    """
    for batch in inputs.hidden.split(batch_size):
        batch.copy_(run_layer(layer, batch, inputs.keywords[layer]))
    if not is_finite(inputs.hidden):
        raise ValueError(f"activations hold NaN or infinity after {name}; load the model in float32 or bfloat16, or check the checkpoint")


@contextmanager
def observed_inputs(layer: nn.Module, observe: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Call `observe[path]` with the input of the linear at `path` below the layer, whenever it runs."""
    handles = [layer.get_submodule(path).register_forward_pre_hook(lambda _, arguments, add=add: add(arguments[0])) for path, add in observe.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def layer_statistics(layer: nn.Module, adapter: ModelAdapter, inputs: DecoderInputs, batch_size: int) -> LayerStats:
    """Run a layer on the current hidden states and gather the statistics of every linear group, by name.

    The hidden states stay as they are: `advance` moves on, with whatever weights the layer has by then.
    """
    linears = adapter.linears(layer)
    accumulators = {
        name: GramAccumulator(linears[group.readers[0]].in_features, inputs.hidden.device) for name, group in adapter.linear_groups.items()
    }
    observe = {group.readers[0]: accumulators[name].add for name, group in adapter.linear_groups.items()}
    with observed_inputs(layer, observe):
        for batch in inputs.hidden.split(batch_size):
            run_layer(layer, batch, inputs.keywords[layer])
    return {name: accumulator.statistics() for name, accumulator in accumulators.items()}


def dense_statistics(model: "PreTrainedModel", adapter: ModelAdapter, tokens: Tensor, batch_size: int) -> Iterator[LayerStats]:
    """Yield the statistics of every decoder layer of the model as it is, in order.

    Memory: one copy of the hidden states and the Gram matrices of one layer.
    """
    inputs = capture_decoder_inputs(model, adapter, tokens)
    for index, layer in enumerate(adapter.layers(model)):
        yield layer_statistics(layer, adapter, inputs, batch_size)
        advance(layer, inputs, batch_size, adapter.layer_path(index))
