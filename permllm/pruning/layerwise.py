"""One-shot pruning of a whole model, layer by layer."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from permllm.calibration.capture import HiddenStates, advance, capture_decoder_inputs, layer_statistics, on_device
from permllm.calibration.statistics import LayerStats
from permllm.models.adapter import ModelAdapter
from permllm.models.checkpoint_files import CheckpointFiles
from permllm.models.streaming import LayeredModel
from permllm.pruning.methods import PrunedLayer, PruningMethod, prune_group
from permllm.pruning.permutations import LayerPermutations
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
    weights: Mapping[str, Tensor],
    adapter: ModelAdapter,
    stats: LayerStats,
    pattern: NMPattern,
    method: PruningMethod,
    permutations: LayerPermutations | None = None,
    generator: torch.Generator | None = None,
) -> PrunedLayer:
    """Prune the linears of one decoder layer: weights by path below it, statistics and learned permutations by group."""
    pruned = {}
    for name, group in adapter.linear_groups.items():
        group_weights = {path: weights[path] for path in group.readers}
        pruned[name] = prune_group(group_weights, stats[name], pattern, method, permutations and permutations[name], generator)
    return pruned


def prune_in_parallel(
    weights: Iterable[Mapping[str, Tensor]],
    adapter: ModelAdapter,
    statistics: Iterable[LayerStats],
    pattern: NMPattern,
    method: PruningMethod,
    permutations: Iterable[LayerPermutations] | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[PrunedLayer]:
    """Prune every layer from the statistics of the dense model, one at a time.

    Args:
        weights: of the target linears of each decoder layer, by path below it.
        permutations: of each decoder layer, where they are known already: learned, or found for all layers together.
        generator: of random permutations and of the search; None for a new one with the method's seed.
    """
    learned = None if permutations is None else iter(permutations)
    generator = generator or torch.Generator().manual_seed(method.seed)
    for layer, stats in zip(weights, statistics, strict=True):
        yield prune_layer(layer, adapter, stats, pattern, method, learned and next(learned), generator)


def model_weights(model: nn.Module, adapter: ModelAdapter) -> Iterator[dict[str, Tensor]]:
    """Yield the target weights of every decoder layer of a loaded model."""
    for layer in adapter.layers(model):
        yield {path: linear.weight.detach() for path, linear in adapter.linears(layer).items()}


@dataclass(frozen=True)
class CheckpointWeights(Sequence[Mapping[str, Tensor]]):
    """The target weights of every decoder layer of a checkpoint; each access reads one layer.

    Attributes:
        names: what the checkpoint calls every target, by its full path.
    """

    files: CheckpointFiles
    adapter: ModelAdapter
    layers: int
    device: torch.device | str
    names: Mapping[str, str]

    def __len__(self) -> int:
        return self.layers

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.layers:
            raise IndexError(index)
        paths = [path for group in self.adapter.linear_groups.values() for path in group.readers]
        return {path: self.files.tensor(self.names[self.adapter.path(index, path)]).to(self.device) for path in paths}


def checkpoint_weights(files: CheckpointFiles, adapter: ModelAdapter, layer_count: int, device: torch.device | str) -> CheckpointWeights:
    """Return the target weights of every decoder layer of a checkpoint, which reads one layer at a time.

    Raises:
        ValueError: if the checkpoint lacks a target.
    """
    return CheckpointWeights(files, adapter, layer_count, device, adapter.tensor_names(layer_count, files.names()))


def prune_in_sequence(
    layered: LayeredModel,
    tokens: Tensor,
    batch_size: int,
    pattern: NMPattern,
    method: PruningMethod,
    permutations: Sequence[LayerPermutations] | None = None,
    keep: HiddenStates = on_device,
    generator: torch.Generator | None = None,
    pruned_before: Sequence[PrunedLayer] = (),
) -> Iterator[PrunedLayer]:
    """Prune every layer from what the pruned layers before it put out, as the papers of the methods do.

    A loaded model is pruned in place while this runs. `permutations` and `generator` as for `prune_in_parallel`.

    Args:
        keep: where the hidden states of all sequences are to be, an entry of `HIDDEN_STATES`.
        pruned_before: the first layers, where they are pruned already: they are run, and not yielded.
    """
    adapter = layered.adapter
    with layered.stem():
        inputs = capture_decoder_inputs(layered.model, adapter, tokens, keep)
    generator = generator or torch.Generator().manual_seed(method.seed)
    for index in range(len(layered)):
        with layered.layer(index) as layer:
            if index < len(pruned_before):
                apply_layer(layer, pruned_before[index])
                advance(layer, inputs, batch_size, adapter.layer_path(index))
                continue
            stats = layer_statistics(layer, adapter, inputs, batch_size)
            weights = {path: linear.weight for path, linear in adapter.linears(layer).items()}
            pruned = prune_layer(weights, adapter, stats, pattern, method, permutations and permutations[index], generator)
            apply_layer(layer, pruned)
            advance(layer, inputs, batch_size, adapter.layer_path(index))
        yield pruned


def apply_layer(layer: nn.Module, pruned: PrunedLayer) -> None:
    """Put the pruned weights into a decoder layer, in place."""
    for group in pruned.values():
        for path, linear in group.linears.items():
            target = layer.get_submodule(path).weight
            target.data.copy_(linear.apply(target.data))
