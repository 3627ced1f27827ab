"""How much memory a stage will hold at a time, from the shapes of a model alone; docs/memory.md has the formulas.

What is on the device is named apart from what is in the host's memory. On a CPU both are the same memory.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch

from permllm.calibration.samples import CalibrateConfig
from permllm.evaluation.evaluate import EvaluateConfig
from permllm.memory import Need
from permllm.models.adapter import ModelAdapter
from permllm.pruning.methods import PruningMethod

FLOAT = torch.float32.itemsize
LOWER_SEQUENCES = "set hidden_states: disk, or lower calibrate.sequences or calibrate.length"
LOWER_BATCH = "lower calibrate.batch_size or calibrate.length"
Needs = tuple[list[Need], list[Need]]  # in the host's memory, on the device


@dataclass(frozen=True)
class GroupSize:
    """A linear group: its input channels and the output channels of all its linears together."""

    channels: int
    out_channels: int

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return self.channels * self.out_channels

    @property
    def gram_bytes(self) -> int:
        """Bytes of its Gram matrix."""
        return self.channels**2 * FLOAT


@dataclass(frozen=True)
class ModelSize:
    """The shapes of a model that decide how much memory it takes.

    Attributes:
        groups: the linear groups of its largest decoder layer.
        layer, total: parameters of that layer, and of the whole model.
        outside: parameters of the larger of stem and head.
        channels: of the hidden states.
        itemsize: bytes of a weight while it is in memory.
    """

    groups: Mapping[str, GroupSize]
    layer: int
    outside: int
    total: int
    channels: int
    vocabulary: int
    itemsize: int

    @classmethod
    def of(cls, shapes: Mapping[str, Sequence[int]], adapter: ModelAdapter, dtype: torch.dtype) -> Self:
        """Measure a checkpoint.

        Args:
            shapes: of its tensors, by name.
            dtype: of the weights while they are in memory.

        Raises:
            ValueError: if it lacks a target.
        """
        sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
        starts = "|".join(re.escape(start) for start in (adapter.decoder_layers, *adapter.checkpoint_prefixes))
        layer_of = {name: int(found[1]) for name in sizes if (found := re.match(rf"(?:{starts})\.(\d+)\.", name))}
        layers = Counter()
        for name, index in layer_of.items():
            layers[index] += sizes[name]
        names = adapter.tensor_names(len(layers), sizes)
        widest = {
            name: [max(shapes[names[adapter.path(index, path)]] for index in layers) for path in group.readers]
            for name, group in adapter.linear_groups.items()
        }
        groups = {name: GroupSize(found[0][1], sum(shape[0] for shape in found)) for name, found in widest.items()}
        outside = sorted((size for name, size in sizes.items() if name not in layer_of), reverse=True)
        ends = 2 if outside[0] == outside[1] else 1  # embeddings and head, or tied ones
        vocabulary = next(shapes[name][0] for name, size in sizes.items() if name not in layer_of and size == outside[0])
        channels = next(groups[name].channels for name, group in adapter.linear_groups.items() if not group.writers)
        return cls(groups, max(layers.values()), sum(outside) - (ends - 1) * outside[0], sum(sizes.values()), channels, vocabulary, dtype.itemsize)

    @property
    def gram_bytes(self) -> int:
        """Bytes of the Gram matrices of one decoder layer."""
        return sum(group.gram_bytes for group in self.groups.values())

    @property
    def present_bytes(self) -> int:
        """Bytes of the weights that are there at a time: of a decoder layer, or of stem or head."""
        return max(self.layer, self.outside) * self.itemsize

    def activation_bytes(self, tokens: int) -> int:
        """Bytes of what a layer computes for a batch, float32 copies for the Gram matrices included."""
        each = sum(group.channels + group.out_channels for group in self.groups.values())
        return tokens * (each * self.itemsize + max(group.channels for group in self.groups.values()) * FLOAT)


def calibrate_needs(size: ModelSize, config: CalibrateConfig, hidden_states: str) -> Needs:
    """Return what `calibrate` holds."""
    host, device = _run_needs(size, config, hidden_states)
    return [*host, Need("the Gram matrices of one decoder layer on their way to the disk", size.gram_bytes)], [
        *device,
        Need("the Gram matrices of one decoder layer", size.gram_bytes),
    ]


def prune_needs(size: ModelSize, method: PruningMethod, sequential: bool, config: CalibrateConfig, hidden_states: str) -> Needs:
    """Return what `prune` holds."""
    host, device = (
        _run_needs(size, config, hidden_states) if sequential else ([], [Need("the weights of one decoder layer", size.layer * size.itemsize)])
    )
    pruned = sum(group.weights for group in size.groups.values()) * (1 + (FLOAT if method.update else 0))
    device = [*device, Need("the Gram matrices of one decoder layer", size.gram_bytes), Need("one pruned decoder layer", pruned)]
    return host, [*device, Need("the arithmetic of one linear group", max(_pruning_work(group, method) for group in size.groups.values()))]


def assemble_needs(size: ModelSize, update: str | None) -> Needs:
    """Return what `assemble` holds."""
    weights = sum(group.weights for group in size.groups.values())
    largest = max(*(group.weights for group in size.groups.values()), size.outside)
    pruned = Need("one pruned decoder layer", weights * (1 + (FLOAT if update else 0)))
    return [pruned, Need("copies of the largest tensor", 4 * largest * size.itemsize)], []


def evaluate_needs(size: ModelSize, config: EvaluateConfig, tokens: int, hidden_states: str) -> Needs:
    """Return what `evaluate` holds for a text of so many tokens: the perplexity, or the whole model for zero-shot tasks."""
    batch = config.perplexity.batch_size * config.perplexity.length
    lower = "set hidden_states: disk, or lower evaluate.perplexity.length or give less text"
    host, device = _placed(Need("hidden states", tokens * size.channels * size.itemsize, lower), hidden_states)
    lower = "lower evaluate.perplexity.batch_size"
    device.append(Need("activations of one batch", size.activation_bytes(batch), lower))
    device.append(Need("logits of one batch", batch * size.vocabulary * (size.itemsize + 2 * FLOAT), lower))
    if config.zero_shot.tasks:
        device.append(Need("the whole model", size.total * size.itemsize, "leave out evaluate.zero_shot.tasks"))
    else:
        device.append(Need("the weights of one decoder layer, embeddings or head", size.present_bytes))
    return host, device


def _run_needs(size: ModelSize, config: CalibrateConfig, hidden_states: str) -> Needs:
    """Return what running the calibration's sequences through a model, layer by layer, holds."""
    tokens, batch = (config.sequences - config.held_out) * config.length, config.batch_size * config.length
    host, device = _placed(Need("hidden states", tokens * size.channels * size.itemsize, LOWER_SEQUENCES), hidden_states)
    device.append(Need("the weights of one decoder layer, embeddings or head", size.present_bytes))
    device.append(Need("activations of one batch", size.activation_bytes(batch), LOWER_BATCH))
    return host, device


def _placed(hidden: Need, hidden_states: str) -> Needs:
    return [hidden] if hidden_states == "memory" else [], [hidden] if hidden_states == "device" else []


def _pruning_work(group: GroupSize, method: PruningMethod) -> int:
    """Return the bytes of what pruning a linear group computes: scores, changes and products in float32; SparseGPT's factors."""
    work = 5 * group.weights * FLOAT
    return work + (6 * group.gram_bytes + group.weights * FLOAT if method.update else 0)
