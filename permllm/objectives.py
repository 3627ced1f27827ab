"""Which permutations suit which weight update: every objective of a permutation with every update, over seeds.

A seed draws the calibration sequences, and decides what is random in learning.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING

from torch import Tensor

from permllm.calibration.capture import dense_statistics
from permllm.calibration.samples import CalibrateConfig, CalibrationSet, draw_windows
from permllm.calibration.statistics import LayerStats
from permllm.evaluation.perplexity import perplexity
from permllm.lcp.recipes import LearnConfig
from permllm.lcp.trainer import find_starts, learn_permutations
from permllm.models.adapter import ModelAdapter
from permllm.models.streaming import LoadedModel
from permllm.pruning.layerwise import apply_layer, model_weights, prune_in_parallel
from permllm.pruning.methods import LEARNED_PERMUTATION, PruningMethod
from permllm.pruning.permutations import LayerPermutations
from permllm.report.summary import BASELINE, DENSE
from permllm.sparsity.pattern import NMPattern

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ObjectiveRows:
    """Permutations of some methods, each with several updates.

    Attributes:
        methods: of params.yaml, whose permutations are found as they say; their own updates do not matter.
        updates: entries of `UPDATES`, or `none`.
    """

    model: str
    patterns: tuple[str, ...]
    methods: tuple[str, ...]
    updates: tuple[str, ...]


@dataclass(frozen=True)
class ObjectivesConfig:
    """The study: which rows, and how many processes share the machine's cores."""

    seeds: tuple[int, ...] = ()
    rows: tuple[ObjectiveRows, ...] = ()
    jobs: int = 1

    def parts(self) -> Iterator["ObjectivePart"]:
        """Yield what is computed together: the rows of one permutation."""
        for rows in self.rows:
            for pattern, method, seed in product(rows.patterns, rows.methods, self.seeds):
                yield ObjectivePart(rows.model, pattern, method, seed, rows.updates)


@dataclass(frozen=True)
class ObjectivePart:
    """One permutation, and the updates that follow it."""

    model: str
    pattern: str
    method: str
    seed: int
    updates: tuple[str, ...]


@dataclass(frozen=True)
class Calibrated:
    """A dense model, calibrated with one seed, and the text that decides.

    Attributes:
        text: (tokens,) for the perplexity over windows of `length`.
    """

    model: "PreTrainedModel"
    adapter: ModelAdapter
    samples: CalibrationSet
    text: Tensor
    length: int
    statistics: Sequence[LayerStats]

    @classmethod
    def with_seed(
        cls, model: "PreTrainedModel", adapter: ModelAdapter, tokens: Tensor, config: CalibrateConfig, seed: int, text: Tensor, length: int
    ) -> "Calibrated":
        """Draw calibration sequences, and gather the statistics of the dense model."""
        samples = draw_windows(tokens, config.sequences, config.length, seed, config.held_out)
        training = samples.tokens[samples.training_rows]
        statistics = list(dense_statistics(LoadedModel(model, adapter), training, config.batch_size))
        return cls(model, adapter, samples, text, length, statistics)

    def permutations(self, pattern: NMPattern, method: PruningMethod, config: LearnConfig) -> list[LayerPermutations]:
        """Find or learn the permutations of a method; `config` is of learning, if it learns."""
        layered = LoadedModel(self.model, self.adapter)
        if method.is_learned:
            return learn_permutations(layered, self.samples, self.statistics, pattern, method.score, config).permutations
        found = replace(config, start=method.permutation, layout=method.layout)
        return find_starts(layered, self.statistics, pattern, method.score, found)

    def pruned_perplexity(self, pattern: NMPattern, method: PruningMethod, permutations: Sequence[LayerPermutations] | None = None) -> float:
        """Prune a copy of the model, and return its perplexity."""
        pruned = deepcopy(self.model)
        layers = prune_in_parallel(model_weights(self.model, self.adapter), self.adapter, self.statistics, pattern, method, permutations)
        for layer, decided in zip(self.adapter.layers(pruned), layers, strict=True):
            apply_layer(layer, decided)
        return perplexity(LoadedModel(pruned, self.adapter), self.text, self.length)

    @cached_property
    def dense_perplexity(self) -> float:
        """Perplexity of the dense model."""
        return perplexity(LoadedModel(self.model, self.adapter), self.text, self.length)

    def references(self, pattern: NMPattern) -> Mapping[str, float]:
        """Return the perplexity of the dense model and of the baseline, by the names that `gap_closed` knows."""
        return {DENSE: self.dense_perplexity, BASELINE: self.pruned_perplexity(pattern, PruningMethod(BASELINE))}


def objective_of(method: PruningMethod, config: LearnConfig) -> str:
    """Name what the permutations of a method are chosen by."""
    if method.permutation == "identity":
        return "none"
    return f"{f'lcp {config.recipe}' if method.is_learned else method.permutation}, {method.score}"


def after(method: PruningMethod, update: str) -> PruningMethod:
    """Return a method that prunes in known orders, with an update or `none`."""
    return replace(method, permutation=LEARNED_PERMUTATION, update=None if update == "none" else update)
