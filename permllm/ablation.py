"""What each choice of the recipe is worth: named recipes side by side, and single switches changed around them.

A row is one pruned model: a recipe, a seed, its perplexity and how far it is from the dense model. Of its settings of
learning, the row's change wins over the study's `learn`, that over the model's own budget, and that over the recipe.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from permllm.calibration.samples import CalibrationSet
from permllm.calibration.statistics import LayerStats
from permllm.evaluation.perplexity import perplexity
from permllm.lcp.objective import NextTokens, kl_divergence
from permllm.lcp.recipes import RECIPES, LearnConfig
from permllm.lcp.trainer import find_starts, learn_permutations
from permllm.lookup import lookup
from permllm.models.adapter import ModelAdapter
from permllm.models.streaming import LoadedModel
from permllm.pruning.layerwise import apply_layer, model_weights, prune_in_parallel
from permllm.pruning.methods import LEARNED_PERMUTATION, PruningMethod
from permllm.pruning.permutations import PERMUTATIONS, LayerPermutations
from permllm.report.summary import BASELINE, DENSE
from permllm.sparsity.pattern import NMPattern

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedModel

SWITCHES = (
    "start", "layout", "logits", "block_size", "block_count", "rank", "objective", "layer_objective", "estimator", "gumbel", "mask_temperature",
    "optimizer", "norm", "moves", "curvature", "refit", "learning_rate", "epochs", "sequences", "batch_size", "precision",
)  # fmt: skip


@dataclass(frozen=True)
class NamedRows:
    """Recipes that are compared in full: every combination, with every seed.

    Attributes:
        recipes: entries of `RECIPES`, or permutations without learning (`search`, `cp`, `random`).
    """

    model: str
    patterns: tuple[str, ...]
    scores: tuple[str, ...]
    recipes: tuple[str, ...]
    layouts: tuple[str, ...] = ("free",)


@dataclass(frozen=True)
class SwitchRows:
    """Recipes of which one switch at a time is changed.

    Attributes:
        learn: settings of all these rows, such as fewer epochs.
        around: by recipe, the changes: each a row per seed. An empty one is the recipe itself.
    """

    model: str
    pattern: str
    score: str
    around: Mapping[str, tuple[Mapping[str, Any], ...]]
    learn: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AblationConfig:
    """The study: which rows, and how many run at once.

    Attributes:
        learn: settings of all rows that learn, such as fewer epochs than a model's own budget.
        jobs: processes, which share the machine's cores.
    """

    seeds: tuple[int, ...]
    learn: Mapping[str, Any] = field(default_factory=dict)
    named: tuple[NamedRows, ...] = ()
    switches: tuple[SwitchRows, ...] = ()
    jobs: int = 1

    def rows(self) -> Iterator["AblationRow"]:
        """Yield all rows of the study, the named recipes first."""
        for named in self.named:
            for pattern in named.patterns:
                for score, layout, recipe in product(named.scores, named.layouts, named.recipes):
                    for seed in self.seeds:
                        learn = dict(self.learn) if recipe in RECIPES else {}
                        yield AblationRow(named.model, pattern, score, recipe, seed, learn, layout=layout)
        for group in self.switches:
            for recipe, changes in group.around.items():
                for change in changes:
                    for seed in self.seeds:
                        learn = {**self.learn, **group.learn}
                        yield AblationRow(group.model, group.pattern, group.score, recipe, seed, learn, dict(change), is_switch=True)


@dataclass(frozen=True)
class AblationRow:
    """One pruned model of the study.

    Attributes:
        learn: settings that it shares with the rows it is compared with.
        change: what is different from its recipe.
        is_switch: whether it belongs to the switches changed one at a time.
        layout: see `LAYOUTS`.

    Raises:
        ValueError: if the recipe is unknown, or a permutation without learning is given settings.
    """

    model: str
    pattern: str
    score: str
    recipe: str
    seed: int
    learn: Mapping[str, Any] = field(default_factory=dict)
    change: Mapping[str, Any] = field(default_factory=dict)
    is_switch: bool = False
    layout: str = "free"

    def __post_init__(self) -> None:
        lookup({**RECIPES, **PERMUTATIONS}, self.recipe, "recipe")
        if not self.is_learned and (self.learn or self.change):
            raise ValueError(f"recipe {self.recipe} learns nothing, but is given {', '.join({**self.learn, **self.change})}")

    @property
    def is_learned(self) -> bool:
        """Whether permutations are learned."""
        return self.recipe in RECIPES

    def config(self, budget: Mapping[str, Any]) -> LearnConfig:
        """Return the settings of learning, on a model's budget."""
        return LearnConfig.from_recipe({**budget, **self.learn, **self.change, "recipe": self.recipe, "seed": self.seed, "layout": self.layout})


@dataclass(frozen=True)
class Subject:
    """A dense model with all that a row needs to prune and to judge it.

    Attributes:
        text: (tokens,), the evaluation text; perplexity is over windows of `length`.
        budget: the model's own settings of learning.
    """

    model: "PreTrainedModel"
    adapter: ModelAdapter
    samples: CalibrationSet
    statistics: Sequence[LayerStats]
    text: Tensor
    length: int
    budget: Mapping[str, Any]

    def references(self, pattern: NMPattern) -> dict[str, float]:
        """Return the perplexity of the dense model and of the baseline, by the names that `gap_closed` knows."""
        models = {DENSE: self.model, BASELINE: self._pruned(pattern, BASELINE, "identity")}
        return {name: perplexity(LoadedModel(model, self.adapter), self.text, self.length) for name, model in models.items()}

    @property
    def layered(self) -> LoadedModel:
        """The model as what runs it layer by layer takes it."""
        return LoadedModel(self.model, self.adapter)

    def starts(self, pattern: NMPattern, score: str, permutation: str, seed: int, layout: str) -> list[LayerPermutations]:
        """Return the permutations that a method without learning finds."""
        config = LearnConfig(start=permutation, seed=seed, layout=layout)
        return find_starts(self.layered, self.statistics, pattern, score, config)

    def run(self, row: AblationRow, starts: Sequence[LayerPermutations]) -> dict[str, Any]:
        """Prune as a row says, and judge the result.

        Args:
            starts: of the row's recipe, or what its learning begins from.

        Returns:
            `perplexity`, `heldout_loss`, every switch, and how learning went.
        """
        pattern = NMPattern.parse(row.pattern)
        record: dict[str, Any] = dict.fromkeys(SWITCHES)
        record |= {"start": row.recipe, "layout": row.layout}
        permutations = list(starts)
        if row.is_learned:
            config = row.config(self.budget)
            result = learn_permutations(self.layered, self.samples, self.statistics, pattern, row.score, config, starts=starts)
            permutations = result.permutations
            record |= {name: getattr(config, name) for name in SWITCHES} | {"best_epoch": result.best.epoch, "stopped": result.stopped}
            record["learning_rate"] = config.rate(row.score)
        pruned = self._pruned(pattern, row.score, LEARNED_PERMUTATION, permutations)
        return {
            "perplexity": round(perplexity(LoadedModel(pruned, self.adapter), self.text, self.length), 4),
            "heldout_loss": round(self._divergence(pruned), 6),
            **record,
        }

    def _pruned(self, pattern: NMPattern, score: str, permutation: str, permutations: Sequence[LayerPermutations] | None = None) -> "PreTrainedModel":
        pruned, method = deepcopy(self.model), PruningMethod(score, permutation)
        layers = prune_in_parallel(model_weights(self.model, self.adapter), self.adapter, self.statistics, pattern, method, permutations)
        for layer, decided in zip(self.adapter.layers(pruned), layers, strict=True):
            apply_layer(layer, decided)
        return pruned

    @torch.no_grad()
    def _divergence(self, pruned: "PreTrainedModel") -> float:
        """Return KL(dense || pruned) of the next token on the held-out sequences: one measure for all recipes."""
        total = 0.0
        for batch in self.samples.tokens[self.samples.held_out_rows].split(4):
            batch = batch.to(self.model.device)
            dense = self.model(batch, use_cache=False).logits.float().log_softmax(-1)
            every = torch.arange(dense.shape[-1], device=dense.device).expand_as(dense)
            total += float(kl_divergence(pruned(batch, use_cache=False).logits, NextTokens(batch, every, dense))) * len(batch)
        return total / self.samples.held_out
