"""One-shot pruning of a whole model, layer by layer."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from permllm.calibration.capture import DecoderInputs, advance, capture_decoder_inputs, layer_statistics
from permllm.calibration.statistics import LayerStats
from permllm.models.adapter import ModelAdapter
from permllm.pruning.methods import PrunedLayer, PruningMethod, prune_group
from permllm.sparsity.pattern import NMPattern


@dataclass(frozen=True)
class PruneConfig:
    """Settings of one-shot pruning.

    Attributes:
        sequential: whether later layers see what the pruned layers before them put out, as in the papers of the
            methods; otherwise every layer sees the dense model's activations, gathered once for all methods.
    """

    sequential: bool = False


def prune_layer(
    linears: Mapping[str, nn.Linear], adapter: ModelAdapter, stats: LayerStats, pattern: NMPattern, method: PruningMethod
) -> PrunedLayer:
    """Prune the linears of one decoder layer, given by path, from the statistics of its groups."""
    return {
        name: prune_group({path: linears[path].weight for path in group.readers}, stats[name], pattern, method)
        for name, group in adapter.linear_groups.items()
    }


def prune_in_parallel(
    model: nn.Module, adapter: ModelAdapter, statistics: Iterable[LayerStats], pattern: NMPattern, method: PruningMethod
) -> Iterator[PrunedLayer]:
    """Prune every layer from the statistics of the dense model. The model stays as it is."""
    for layer, stats in zip(adapter.layers(model), statistics, strict=True):
        yield prune_layer(adapter.linears(layer), adapter, stats, pattern, method)


def prune_in_sequence(
    model: nn.Module, adapter: ModelAdapter, tokens: Tensor, batch_size: int, pattern: NMPattern, method: PruningMethod
) -> Iterator[PrunedLayer]:
    """Prune every layer from what the pruned layers before it put out, as the papers of the methods do.

    The model is pruned in place while this runs.
    """
    inputs = capture_decoder_inputs(model, adapter, tokens)
    for index, layer in enumerate(adapter.layers(model)):
        stats = layer_statistics(layer, adapter, inputs, batch_size)
        pruned = prune_layer(adapter.linears(layer), adapter, stats, pattern, method)
        apply_layer(layer, pruned)
        advance(layer, inputs, batch_size, adapter.layer_path(index))
        yield pruned


def apply_layer(layer: nn.Module, pruned: PrunedLayer) -> None:
    """Put the pruned weights into a decoder layer, in place."""
    for group in pruned.values():
        for path, linear in group.linears.items():
            target = layer.get_submodule(path).weight
            target.data.copy_(linear.apply(target.data))
