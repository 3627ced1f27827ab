"""The dense model of a study: calibrated, pruned in many ways, and judged on one text."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from permllm.calibration.capture import dense_statistics
from permllm.calibration.samples import CalibrateConfig, CalibrationSet, draw_windows
from permllm.calibration.statistics import LayerStats
from permllm.evaluation.perplexity import perplexity
from permllm.lcp.objective import NextTokens, kl_divergence
from permllm.lcp.recipes import LearnConfig
from permllm.lcp.trainer import find_starts
from permllm.models.adapter import ModelAdapter
from permllm.models.families import adapter_of
from permllm.models.streaming import LoadedModel
from permllm.pruning.layerwise import apply_layer, model_weights, prune_in_parallel
from permllm.pruning.methods import PruningMethod
from permllm.pruning.permutations import LayerPermutations
from permllm.report.summary import BASELINE, DENSE
from permllm.sparsity.pattern import NMPattern

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Subject:
    """A dense model with all that a row of a study needs to prune and to judge it.

    Attributes:
        text: (tokens,), the evaluation text; perplexity is over windows of `length`.
    """

    model: "PreTrainedModel"
    adapter: ModelAdapter
    samples: CalibrationSet
    statistics: Sequence[LayerStats]
    text: Tensor
    length: int

    @classmethod
    def calibrated(cls, model: "PreTrainedModel", tokens: Tensor, config: CalibrateConfig, seed: int, text: Tensor, length: int) -> Self:
        """Draw calibration sequences from (tokens,), and gather the statistics of the dense model."""
        samples, layered = draw_windows(tokens, config.sequences, config.length, seed, config.held_out), LoadedModel.of(model)
        statistics = list(dense_statistics(layered, samples.tokens[samples.training_rows], config.batch_size))
        return cls(model, adapter_of(model), samples, statistics, text, length)

    @property
    def layered(self) -> LoadedModel:
        """The model as what runs it layer by layer takes it."""
        return LoadedModel(self.model, self.adapter)

    def references(self, pattern: NMPattern) -> dict[str, float]:
        """Return the perplexity of the dense model and of the baseline, by the names that `gap_closed` knows."""
        models = {DENSE: self.model, BASELINE: self.pruned(pattern, PruningMethod(BASELINE))}
        return {name: self.perplexity(model) for name, model in models.items()}

    def starts(self, pattern: NMPattern, score: str, permutation: str, seed: int, layout: str) -> list[LayerPermutations]:
        """Return the permutations that a method without learning finds."""
        config = LearnConfig(start=permutation, seed=seed, layout=layout)
        return find_starts(self.layered, self.statistics, pattern, score, config)

    def pruned(self, pattern: NMPattern, method: PruningMethod, permutations: Sequence[LayerPermutations] | None = None) -> "PreTrainedModel":
        """Return a pruned copy of the model; `permutations` where they are known already."""
        pruned = deepcopy(self.model)
        layers = prune_in_parallel(model_weights(self.model, self.adapter), self.adapter, self.statistics, pattern, method, permutations)
        for layer, decided in zip(self.adapter.layers(pruned), layers, strict=True):
            apply_layer(layer, decided)
        return pruned

    def perplexity(self, model: "PreTrainedModel") -> float:
        """Return the perplexity of the model or a pruned copy."""
        return perplexity(LoadedModel(model, self.adapter), self.text, self.length)

    @torch.no_grad()
    def divergence(self, pruned: "PreTrainedModel") -> float:
        """Return KL(dense || pruned) of the next token on the held-out sequences: one measure for all recipes."""
        total = 0.0
        for batch in self.samples.tokens[self.samples.held_out_rows].split(4):
            batch = batch.to(self.model.device)
            dense = self.model(batch, use_cache=False).logits.float().log_softmax(-1)
            every = torch.arange(dense.shape[-1], device=dense.device).expand_as(dense)
            total += float(kl_divergence(pruned(batch, use_cache=False).logits, NextTokens(batch, every, dense))) * len(batch)
        return total / self.samples.held_out
