"""What each choice of the recipe is worth: named recipes side by side, and single switches changed around them.

A row is one pruned model: a recipe, a seed, its perplexity and how far it is from the dense model. Of its settings of
learning, the row's change wins over the study's `learn`, that over the model's own budget, and that over the recipe.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from permllm.lcp.recipes import RECIPES, LearnConfig
from permllm.lcp.trainer import learn_permutations
from permllm.lookup import lookup
from permllm.pruning.methods import LEARNED_PERMUTATION, PruningMethod
from permllm.pruning.permutations import PERMUTATIONS, LayerPermutations
from permllm.sparsity.pattern import NMPattern
from permllm.subject import Subject

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


def run_row(subject: Subject, row: AblationRow, budget: Mapping[str, Any], starts: Sequence[LayerPermutations]) -> dict[str, Any]:
    """Prune as a row says, and judge the result.

    Args:
        budget: the model's own settings of learning.
        starts: of the row's recipe, or what its learning begins from.

    Returns:
        `perplexity`, `heldout_loss`, every switch, and how learning went.
    """
    pattern = NMPattern.parse(row.pattern)
    record: dict[str, Any] = dict.fromkeys(SWITCHES)
    record |= {"start": row.recipe, "layout": row.layout}
    permutations = list(starts)
    if row.is_learned:
        config = row.config(budget)
        result = learn_permutations(subject.layered, subject.samples, subject.statistics, pattern, row.score, config, starts=starts)
        permutations = result.permutations
        record |= {name: getattr(config, name) for name in SWITCHES} | {"best_epoch": result.best.epoch, "stopped": result.stopped}
        record["learning_rate"] = config.rate(row.score)
    pruned = subject.pruned(pattern, PruningMethod(row.score, LEARNED_PERMUTATION), permutations)
    return {"perplexity": round(subject.perplexity(pruned), 4), "heldout_loss": round(subject.divergence(pruned), 6), **record}
