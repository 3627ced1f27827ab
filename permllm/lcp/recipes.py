"""How permutations are learned: every switch of the training loop, and the named settings of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from permllm.lcp.objective import HIDDEN_OBJECTIVES, LOGIT_OBJECTIVES, check_objective, needs_logits
from permllm.lcp.optimizers import LINEAR_MINIMIZERS
from permllm.lookup import lookup
from permllm.pruning.layout import LAYOUTS
from permllm.pruning.permutations import PERMUTATIONS
from permllm.sparsity.pattern import NMPattern

ESTIMATORS = ("hard", "soft")
LOGITS = ("identity", "uniform")
PRECISIONS = ("model", "bfloat16")
LOGIT_SETTINGS = ("logits", "block_size", "block_count", "rank", "estimator", "gumbel", "learning_rate")  # of no use without logits
OPTIMIZER_SETTINGS = {"adamw": ("weight_decay",), "scion": ("norm", "radius", "momentum"), "guided": ("moves", "curvature", "refit")}
FARTHEST_BLOCK = 4  # a layer's block size may differ by this factor from the one asked for


@dataclass(frozen=True)
class LearnConfig:
    """Settings of learned channel permutations.

    Attributes:
        recipe: the entry of `RECIPES` that the other settings default to.
        start: the order that learning begins from: `identity`, `random`, `cp` or `search`, see `PERMUTATIONS`.
        logits: their first values: `identity`, a soft identity around the start, or `uniform` in (-1, 1), which makes
            the first permutations random inside blocks.
        layout: `free`, every linear group its own order, or `foldable`, orders that fold away; see `LAYOUTS`.
        block_size: channels permuted among themselves; every layer takes the fitting size nearest to it. None for the whole layer.
        block_count: instead of `block_size`, blocks per layer.
        rank: of the logits; None for free ones.
        objective: terms and their weights, for the output of the last decoder layer: `cosine`, `relative_error` and
            `smooth_l1` of hidden states, `kl` and `cross_entropy` of the next token. A name alone has weight 1.
        layer_objective: terms for the hidden states after every decoder layer that learns.
        teacher_tokens: for `kl`, how many of the dense model's likeliest tokens are told apart.
        estimator: `hard`, the nearest permutation with the gradient of the soft one, or `soft`, the relaxed matrix itself.
        gumbel: scale of the Gumbel noise on the logits, falling to 0 with the temperature; 0 for none.
        mask_temperature: of the softmax behind the mask, in units of a linear's mean score; None for the raw scores.
        epochs: passes over the training sequences.
        sequences: how many of the calibration sequences to learn on; None for all that are not held out.
        batch_size: sequences per step.
        optimizer: `adamw` or `scion` of the logits, after every batch; or `guided`, which has no logits: once an epoch it
            re-partitions those groups of channels for which the loss's gradient and curvature say that the loss falls most.
        moves: of `guided`, the share of the pairs of groups tried that may move in the first epoch; it falls to 0 linearly.
        refit: of `guided`, whether the loss is taken after a cheap update of the kept weights, for methods that update them.
        curvature: of `guided`, a factor on the curvature; more is more cautious.
        learning_rate: None for the one published for the score.
        weight_decay: of AdamW.
        norm, radius, momentum: of Scion.
        temperature_start, temperature_end: of Sinkhorn, linear over the run.
        sinkhorn_iterations: row-and-column sweeps.
        last_layers: learn only so many of the last decoder layers, heuristic permutations elsewhere; None for all.
        window: learn so many decoder layers at a time, the first ones first, each window towards the dense model's
            hidden states after it; None for all together.
        patience: stop after so many epochs without a better held-out loss; None to go on.
        precision: of the products: `model`, or `bfloat16` by autocast. Scores, Sinkhorn and objectives are float32 always.
        recompute_layers: keep only the input of every decoder layer for the backward pass, and run it again.
        seed: of the order of the sequences, random starts, the search and noise.

    Raises:
        ValueError: naming the settings that make no sense.
    """

    recipe: str = "paper"
    start: str = "identity"
    logits: str = "uniform"
    layout: str = "free"
    block_size: int | None = 64
    block_count: int | None = None
    rank: int | None = None
    objective: str | Mapping[str, float] = "cosine"
    layer_objective: Mapping[str, float] = field(default_factory=dict)
    teacher_tokens: int = 64
    estimator: str = "hard"
    gumbel: float = 0.0
    mask_temperature: float | None = None
    epochs: int = 50
    sequences: int | None = None
    batch_size: int = 16
    optimizer: str = "adamw"
    moves: float = 0.02
    curvature: float = 6.0
    refit: bool = False
    learning_rate: float | None = None
    weight_decay: float = 0.1
    norm: str = "spectral"
    radius: float = 4.0
    momentum: float = 0.1
    temperature_start: float = 1.0
    temperature_end: float = 0.1
    sinkhorn_iterations: int = 5
    last_layers: int | None = None
    window: int | None = None
    patience: int | None = None
    precision: str = "model"
    recompute_layers: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        tables = {"start": PERMUTATIONS, "recipe": RECIPES, "norm": LINEAR_MINIMIZERS, "optimizer": OPTIMIZER_SETTINGS, "layout": LAYOUTS}
        tables |= {name: dict.fromkeys(names) for name, names in {"logits": LOGITS, "estimator": ESTIMATORS, "precision": PRECISIONS}.items()}
        for name, table in tables.items():
            lookup(table, getattr(self, name), name)
        check_objective(self.objectives, {**HIDDEN_OBJECTIVES, **LOGIT_OBJECTIVES}, "objective")
        check_objective(self.layer_objective, HIDDEN_OBJECTIVES, "layer_objective")
        positive = ("epochs", "batch_size", "temperature_start", "temperature_end", "radius", "momentum", "teacher_tokens", "moves", "curvature")
        optional = ("sequences", "learning_rate", "last_layers", "block_size", "block_count", "rank", "mask_temperature", "window", "patience")
        given = [*positive, *(name for name in optional if getattr(self, name) is not None)]
        wrong = [f"{name} is {getattr(self, name)}" for name in given if not getattr(self, name) > 0]
        if wrong:
            raise ValueError(f"learning settings must be above 0, but {', '.join(wrong)}")
        negative = [f"{name} is {getattr(self, name)}" for name in ("weight_decay", "sinkhorn_iterations", "gumbel") if not getattr(self, name) >= 0]
        if negative:
            raise ValueError(f"learning settings must be at least 0, but {', '.join(negative)}")
        clashes = [
            ("objective holds no term", not self.objectives),
            ("window trains towards hidden states, but objective compares next tokens", self.window is not None and needs_logits(self.objectives)),
            (
                "layout foldable shares an order between all layers, so they learn together: window and last_layers must be null",
                self.layout == "foldable" and (self.window, self.last_layers) != (None, None),
            ),
            (
                "refit changes all layers together: window and last_layers must be null",
                self.refit and (self.window, self.last_layers) != (None, None),
            ),
            ("block_size and block_count exclude each other; set one of them to null", None not in (self.block_size, self.block_count)),
            (f"Scion needs a learning_rate up to 1, not {self.learning_rate}", self.optimizer == "scion" and (self.learning_rate or 0) > 1),
            (f"momentum is the share of the new gradient, at most 1, not {self.momentum}", self.momentum > 1),
            ("rank keeps the logits around a soft identity, but logits is uniform", self.rank is not None and self.logits == "uniform"),
        ]
        if unused := self._unused():
            clashes.append((f"optimizer {self.optimizer} does not use {', '.join(unused)}; leave them out, or choose another optimizer", True))
        if any(clash for _, clash in clashes):
            raise ValueError("; ".join(text for text, clash in clashes if clash))

    def _unused(self) -> list[str]:
        """Return the settings that were changed from their defaults though the optimiser has no use for them."""
        of_others = [name for optimizer, names in OPTIMIZER_SETTINGS.items() if optimizer != self.optimizer for name in names]
        idle = {*of_others, *(LOGIT_SETTINGS if self.optimizer == "guided" else ())}
        return [setting.name for setting in fields(self) if setting.name in idle and getattr(self, setting.name) != setting.default]

    @classmethod
    def from_recipe(cls, settings: Mapping[str, Any]) -> Self:
        """Fill what `settings` leaves open from its recipe.

        Raises:
            ValueError: if the recipe or a setting is unknown.
        """
        return cls(**with_recipe(settings))

    @property
    def objectives(self) -> Mapping[str, float]:
        """The terms of the objective and their weights."""
        return {self.objective: 1.0} if isinstance(self.objective, str) else self.objective

    def rate(self, score: str) -> float:
        """Return the learning rate for a score: the one set, or the published one."""
        return self.learning_rate if self.learning_rate is not None else PUBLISHED_LEARNING_RATES[score]

    def windows(self, layers: int) -> int:
        """Return in how many windows, one after another, the decoder layers of a model learn."""
        return math.ceil(min(self.last_layers or layers, layers) / (self.window or layers))

    def fitting_block_size(self, channels: int, pattern: NMPattern) -> int:
        """Return the block size for a layer: of the multiples of M that divide its channels, the one nearest to that asked for.

        >>> config = LearnConfig(block_size=64)
        >>> [config.fitting_block_size(channels, NMPattern(2, 4)) for channels in (172, 352, 11008)]
        [172, 88, 64]

        Raises:
            ValueError: if none is within a factor of 4.
        """
        pattern.check_widths({"the layer": channels})
        wanted = channels / self.block_count if self.block_count is not None else self.block_size or channels
        fitting = [size for size in range(pattern.group, channels + 1, pattern.group) if channels % size == 0]
        nearest = min(fitting, key=lambda size: abs(math.log(size / wanted)))
        if not wanted / FARTHEST_BLOCK <= nearest <= wanted * FARTHEST_BLOCK:
            raise ValueError(f"no block size near {wanted:g} divides {channels} channels; those that do: {', '.join(map(str, fitting))}")
        return nearest

    def check_widths(self, in_channels: Mapping[str, int], pattern: NMPattern) -> None:
        """Refuse layers that no block size near the one asked for fits, all of them at once.

        Raises:
            ValueError: naming every layer and the sizes that would do.
        """
        pattern.check_widths(in_channels)
        if self.optimizer == "guided":  # moves channels between any two groups
            return
        if self.block_size is not None and self.block_size % pattern.group:
            raise ValueError(f"block_size {self.block_size} is not a multiple of the group size of {pattern}")
        misfits = []
        for name, width in in_channels.items():
            try:
                size = self.fitting_block_size(width, pattern)
                if self.rank is not None and self.rank >= size:
                    misfits.append(f"{name}: rank {self.rank} is no less than the {size} channels of a block; rank: null learns free logits")
            except ValueError as error:
                misfits.append(f"{name}: {error}")
        if misfits:
            raise ValueError("; ".join(misfits))


# PermLLM (NeurIPS 2025), section 5; the release draws its first permutations at random. OBS, not in the paper, is of Wanda's scale.
PUBLISHED_LEARNING_RATES = {"magnitude": 1e-3, "wanda": 1e-3, "ria": 5e-3, "obs": 1e-3}
RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},
    # The text's own next tokens lower the perplexity, the dense model's keep the answers close to it.
    "best": {"start": "search", "objective": {"kl": 1.0, "cross_entropy": 1.0}, "optimizer": "guided"},
    # For methods that update the weights: the loss after a cheap update, from the permutation of their score. Such weights
    # adapt to what is removed, so the curvature of a mask alone would hold back moves that are good.
    "refit": {
        "start": "cp", "objective": {"kl": 1.0, "cross_entropy": 1.0}, "optimizer": "guided", "refit": True, "curvature": 1e-3, "moves": 0.2,
    },
    # arXiv:2601.22980: free cost matrices in 4 groups, soft permutations, cross-entropy and a little layer distillation.
    "amd": {
        "logits": "identity", "block_size": None, "block_count": 4, "estimator": "soft", "mask_temperature": 1.0,
        "objective": {"cross_entropy": 1.0}, "layer_objective": {"smooth_l1": 1e-5}, "learning_rate": 1e-2, "weight_decay": 0.01,
    },
}  # fmt: skip


def with_recipe(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fill what `settings` leaves open from the recipe that they name.

    Raises:
        ValueError: if the recipe or a setting is unknown.
    """
    known = {field.name: None for field in fields(LearnConfig)}
    for name in settings:
        lookup(known, name, "learn setting")
    recipe = settings.get("recipe", "best")
    return {**lookup(RECIPES, recipe, "recipe"), **settings, "recipe": recipe}
