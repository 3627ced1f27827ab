"""How permutations are learned: every switch of the training loop, and the named settings of them."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from permllm.lcp.objective import OBJECTIVES
from permllm.lookup import lookup
from permllm.sparsity.pattern import NMPattern

STARTS = ("identity", "random", "cp")


@dataclass(frozen=True)
class LearnConfig:
    """Settings of learned channel permutations.

    Attributes:
        recipe: the entry of `RECIPES` that the other settings default to.
        block_size: channels permuted among themselves.
        start: the order that learning begins from: `identity`, `cp` (heuristic, crosses blocks) or `random` (inside blocks).
        objective: distance of the hidden states after the last decoder layer.
        epochs: passes over the training sequences.
        sequences: how many of the calibration sequences to learn on; None for all that are not held out.
        batch_size: sequences per step.
        learning_rate: of AdamW; None for the one published for the score.
        weight_decay: of AdamW.
        temperature_start, temperature_end: of Sinkhorn, linear over the run.
        sinkhorn_iterations: row-and-column sweeps.
        last_layers: learn only so many of the last decoder layers, heuristic permutations elsewhere; None for all.
        seed: of the order of the sequences and of a random start.

    Raises:
        ValueError: naming the setting that makes no sense.
    """

    recipe: str = "paper"
    block_size: int = 64
    start: str = "random"
    objective: str = "cosine"
    epochs: int = 50
    sequences: int | None = None
    batch_size: int = 16
    learning_rate: float | None = None
    weight_decay: float = 0.1
    temperature_start: float = 1.0
    temperature_end: float = 0.1
    sinkhorn_iterations: int = 5
    last_layers: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        lookup(RECIPES, self.recipe, "recipe")
        lookup(dict.fromkeys(STARTS), self.start, "start")
        lookup(OBJECTIVES, self.objective, "objective")
        positive = ("block_size", "epochs", "batch_size", "temperature_start", "temperature_end")
        wrong = [f"{name} is {getattr(self, name)}" for name in positive if not getattr(self, name) > 0]
        optional = ("sequences", "learning_rate", "last_layers")
        wrong += [f"{name} is {getattr(self, name)}" for name in optional if getattr(self, name) is not None and not getattr(self, name) > 0]
        if wrong:
            raise ValueError(f"learning settings must be above 0, but {', '.join(wrong)}")
        negative = [f"{name} is {getattr(self, name)}" for name in ("weight_decay", "sinkhorn_iterations") if not getattr(self, name) >= 0]
        if negative:
            raise ValueError(f"learning settings must be at least 0, but {', '.join(negative)}")

    @classmethod
    def from_recipe(cls, settings: Mapping[str, Any]) -> Self:
        """Fill what `settings` leaves open from its recipe.

        Raises:
            ValueError: if the recipe or a setting is unknown.
        """
        return cls(**with_recipe(settings))

    def rate(self, score: str) -> float:
        """Return the learning rate for a score: the one set, or the published one."""
        return self.learning_rate if self.learning_rate is not None else PUBLISHED_LEARNING_RATES[score]

    def check_widths(self, in_channels: Mapping[str, int], pattern: NMPattern) -> None:
        """Refuse a block size that does not fit, naming every layer and the sizes that would do.

        Raises:
            ValueError: if the block size is no multiple of M or does not divide a layer's input channels.
        """
        fitting = [size for size in range(pattern.group, 257, pattern.group) if not any(width % size for width in in_channels.values())]
        advice = f"block sizes that fit all layers: {', '.join(map(str, fitting)) or 'none up to 256'}"
        if self.block_size % pattern.group:
            raise ValueError(f"block_size {self.block_size} is not a multiple of the group size of {pattern}; {advice}")
        misfits = [f"{name} has {width}" for name, width in in_channels.items() if width % self.block_size]
        if misfits:
            raise ValueError(f"block_size {self.block_size} does not divide the input channels: {', '.join(misfits)}; {advice}")


# PermLLM (NeurIPS 2025), section 5; the release draws its first permutations at random.
PUBLISHED_LEARNING_RATES = {"magnitude": 1e-3, "wanda": 1e-3, "ria": 5e-3}
RECIPES: dict[str, dict[str, Any]] = {"paper": {}}


def with_recipe(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fill what `settings` leaves open from the recipe that they name.

    Raises:
        ValueError: if the recipe or a setting is unknown.
    """
    known = {field.name: None for field in fields(LearnConfig)}
    for name in settings:
        lookup(known, name, "learn setting")
    recipe = settings.get("recipe", "paper")
    return {**lookup(RECIPES, recipe, "recipe"), **settings, "recipe": recipe}
