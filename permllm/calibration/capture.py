"""The inputs of the first decoder layer, and stepping through the rest one layer at a time.

The model's own forward runs up to its first decoder layer, once; the keyword arguments that every layer would receive are
kept and replayed verbatim. At any time one copy of the hidden states exists.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from permllm.batches import batches
from permllm.calibration.statistics import GramAccumulator, LayerStats
from permllm.models.adapter import ModelAdapter, is_finite
from permllm.models.streaming import LayeredModel

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedModel

HiddenStates = Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor]  # shape, dtype, the model's device -> where they are kept


def on_device(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Keep hidden states where the model is."""
    return torch.empty(shape, dtype=dtype, device=device)


def in_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Keep hidden states in the host's memory, pinned for a GPU."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def on_disk(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Keep hidden states in a file below the working directory that nothing is left of when the process ends, however it does.

    The system writes its pages out when memory gets short; they count as its file cache.
    """
    folder = Path(".cache/hidden")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder) as file:  # mapped, then without a name
        return torch.from_file(file.name, shared=True, size=torch.Size(shape).numel(), dtype=dtype).view(shape)


HIDDEN_STATES: dict[str, HiddenStates] = {"device": on_device, "memory": in_memory, "disk": on_disk}


@dataclass
class DecoderInputs:
    """Hidden states on their way through the decoder layers.

    Attributes:
        hidden: (sequences, length, channels), input of the next decoder layer; on any device.
        keywords: keyword arguments of every decoder layer, for one sequence, on the model's device; they broadcast over
            a batch. Layers differ where a model mixes full attention and a sliding window.
    """

    hidden: Tensor
    keywords: Mapping[nn.Module, Mapping[str, Any]]


class _Captured(Exception):
    """Ends the model's forward where all is known."""


class _Capturing(nn.Module):
    """Stands for a decoder layer: keeps what it is called with, and ends the forward or passes the hidden states on."""

    def __init__(self, layer: nn.Module, is_last: bool) -> None:
        super().__init__()
        self.name, self.is_last = type(layer).__name__, is_last
        self.hidden: Tensor | None = None
        self.keywords: dict[str, Any] = {}

    def forward(self, *arguments: Tensor, **named: Any) -> Tensor:
        if len(arguments) > 1:
            raise TypeError(f"{self.name} takes {len(arguments)} positional arguments; only hidden states can be replayed")
        self.hidden = arguments[0] if arguments else named["hidden_states"]
        self.keywords = {name: value for name, value in named.items() if name != "hidden_states"}
        if self.is_last:
            raise _Captured
        return self.hidden


@contextmanager
def _in_place_of_layers(model: "PreTrainedModel", adapter: ModelAdapter, modules: Sequence[nn.Module]) -> Iterator[None]:
    layers = adapter.layers(model)
    model.set_submodule(adapter.decoder_layers, nn.ModuleList(modules))
    try:
        yield
    finally:
        model.set_submodule(adapter.decoder_layers, layers)


@torch.no_grad()
def capture_decoder_inputs(model: "PreTrainedModel", adapter: ModelAdapter, tokens: Tensor, keep: HiddenStates = on_device) -> DecoderInputs:
    """Run the model up to its first decoder layer.

    Args:
        model: what comes before its decoder layers has to be there.
        tokens: (sequences, length) int64, on any device.
        keep: where the hidden states of all sequences are to be, an entry of `HIDDEN_STATES`.
    """
    layers, device = adapter.layers(model), model.get_input_embeddings().weight.device
    capturing = [_Capturing(layer, layer is layers[-1]) for layer in layers]
    inputs = None
    with _in_place_of_layers(model, adapter, capturing):
        for row, sequence in enumerate(tokens):
            with suppress(_Captured):
                model(sequence[None].to(device), use_cache=False)
            if inputs is None:  # the first sequence went past all layers, the others stop at the first
                keywords = {layer: stand_in.keywords for layer, stand_in in zip(layers, capturing, strict=True)}
                hidden = capturing[0].hidden
                inputs = DecoderInputs(keep((len(tokens), *hidden.shape[1:]), hidden.dtype, device), keywords)
                capturing[0].is_last = True
            inputs.hidden[row] = capturing[0].hidden[0]
    return inputs


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
    embeddings = hidden.new_zeros(()).expand(*hidden.shape[:2], model.get_input_embeddings().embedding_dim)  # only their shape matters now
    with _in_place_of_layers(model, adapter, [_Given(hidden)]):
        return model(inputs_embeds=embeddings, use_cache=False).logits


@torch.no_grad()
def advance(layer: nn.Module, inputs: DecoderInputs, batch_size: int, name: str) -> None:
    """Replace the hidden states by the layer's output, batch by batch and in place.

    Raises:
        ValueError: if the output holds NaN or infinity; `name` tells where.
    """
    device = next(layer.parameters()).device
    for batch in batches(inputs.hidden.split(batch_size), name):
        output = run_layer(layer, batch.to(device), inputs.keywords[layer])
        if not is_finite(output):
            raise ValueError(f"activations hold NaN or infinity after {name}; load the model in float32 or bfloat16, or check the checkpoint")
        batch.copy_(output)


@contextmanager
def observed_inputs(layer: nn.Module, observe: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Call `observe[path]` with the input of the linear at `path` below the layer, whenever it runs."""
    handles = [layer.get_submodule(path).register_forward_pre_hook(lambda _, arguments, add=add: add(arguments[0])) for path, add in observe.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def accumulated_grams(layer: nn.Module, adapter: ModelAdapter) -> Iterator[dict[str, GramAccumulator]]:
    """Gather the Gram matrix of every linear group, by name, from what the layer is run on meanwhile."""
    linears = adapter.linears(layer)
    first = {name: group.readers[0] for name, group in adapter.linear_groups.items()}
    accumulators = {name: GramAccumulator(linears[path].in_features, linears[path].weight.device) for name, path in first.items()}
    with observed_inputs(layer, {path: accumulators[name].add for name, path in first.items()}):
        yield accumulators


@torch.no_grad()
def layer_statistics(layer: nn.Module, adapter: ModelAdapter, inputs: DecoderInputs, batch_size: int) -> LayerStats:
    """Run a layer on the current hidden states and gather the statistics of every linear group, by name.

    The hidden states stay as they are: `advance` moves on, with whatever weights the layer has by then.
    """
    device = next(layer.parameters()).device
    with accumulated_grams(layer, adapter) as accumulators:
        for batch in inputs.hidden.split(batch_size):
            run_layer(layer, batch.to(device), inputs.keywords[layer])
    return {name: accumulator.statistics() for name, accumulator in accumulators.items()}


def dense_statistics(layered: LayeredModel, tokens: Tensor, batch_size: int, keep: HiddenStates = on_device, first: int = 0) -> Iterator[LayerStats]:
    """Yield the statistics of every decoder layer of the model as it is, in order.

    Memory: the hidden states, and one layer with its Gram matrices.

    Args:
        keep: where the hidden states of all sequences are to be, an entry of `HIDDEN_STATES`.
        first: the first layer whose statistics are wanted; those before it are only run.
    """
    with layered.stem():
        inputs = capture_decoder_inputs(layered.model, layered.adapter, tokens, keep)
    for index in range(len(layered)):
        with layered.layer(index) as layer:
            if index < first:
                advance(layer, inputs, batch_size, layered.adapter.layer_path(index))
                continue
            with accumulated_grams(layer, layered.adapter) as accumulators:
                advance(layer, inputs, batch_size, layered.adapter.layer_path(index))
        yield {name: accumulator.statistics() for name, accumulator in accumulators.items()}


def last_hidden(layered: LayeredModel, tokens: Tensor, batch_size: int, keep: HiddenStates = on_device) -> Tensor:
    """Return the hidden states after the last decoder layer, (sequences, length, channels)."""
    with layered.stem():
        inputs = capture_decoder_inputs(layered.model, layered.adapter, tokens, keep)
    for index in range(len(layered)):
        with layered.layer(index) as layer:
            advance(layer, inputs, batch_size, layered.adapter.layer_path(index))
    return inputs.hidden


@torch.no_grad()
def all_logits(layered: LayeredModel, tokens: Tensor) -> Tensor:
    """Return the logits of all sequences in one batch, (sequences, length, vocabulary)."""
    hidden = last_hidden(layered, tokens, len(tokens))
    with layered.head():
        return finish(layered.model, layered.adapter, hidden)
