"""Pruning one linear group: choose an order of its input channels, then masks, then perhaps new weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from permllm.calibration.statistics import ActivationStats
from permllm.lookup import lookup
from permllm.models.adapter import is_finite
from permllm.permutation.heuristic import heuristic_permutation
from permllm.permutation.permutation import Permutation
from permllm.permutation.search import Problem
from permllm.pruning.layout import LAYOUTS
from permllm.pruning.metrics import PRUNING_METRICS
from permllm.pruning.permutations import PERMUTATIONS
from permllm.pruning.updates.admm import adaptive_admm, admm
from permllm.pruning.updates.alps import alps
from permllm.pruning.updates.least_squares import least_squares
from permllm.pruning.updates.reconstruction import larger_dampings
from permllm.pruning.updates.sparsegpt import sparsegpt
from permllm.pruning.updates.swaps import fitted_swaps, swaps
from permllm.sparsity.mask import best_mask
from permllm.sparsity.pattern import NMPattern

Update = Callable[[Tensor, ActivationStats, NMPattern, Tensor], tuple[Tensor, Tensor]]
UPDATES: dict[str, Update] = {
    "sparsegpt": sparsegpt, "least_squares": least_squares, "admm": admm, "adaptive_admm": adaptive_admm, "alps": alps,
    "swaps": swaps, "fitted_swaps": fitted_swaps,
}  # fmt: skip
ROW_UPDATES = ("swaps", "fitted_swaps")  # these choose masks row by row
LEARNED_PERMUTATION = "lcp"


@dataclass(frozen=True)
class PruningMethod:
    """How a model is pruned: three choices that combine freely.

    Attributes:
        score: the pruning metric that masks and permutations go by.
        permutation: an entry of `PERMUTATIONS` (`identity`, `random`, `cp`, `search`), or `lcp` (learned).
        seed: of a random permutation and of the search.
        layout: `free`, every linear group its own order, or `foldable`, orders that fold away; see `LAYOUTS`.
        update: what new values the kept weights get: None, or an entry of `UPDATES`, of which some choose the masks too.
        transposable: whether masks are N:M along the output channels too, so that the backward pass is sparse as well.
            Unless the permutation is `identity`, the output channels then have an order of their own, by the heuristic; the
            permutation itself is found, or learned, for masks that are N:M along the input channels alone.

    Raises:
        ValueError: if one of the names is unknown, or the update chooses masks that are not transposable.
    """

    score: str = "wanda"
    permutation: str = "identity"
    update: str | None = None
    seed: int = 0
    layout: str = "free"
    transposable: bool = False

    def __post_init__(self) -> None:
        lookup(PRUNING_METRICS, self.score, "score")
        lookup({**PERMUTATIONS, LEARNED_PERMUTATION: None}, self.permutation, "permutation")
        lookup(LAYOUTS, self.layout, "layout")
        if self.update is not None:
            lookup(UPDATES, self.update, "weight update")
        if self.transposable and self.update in ROW_UPDATES:
            others = [name for name in UPDATES if name not in ROW_UPDATES]
            raise ValueError(f"update {self.update} chooses masks row by row, which are not transposable; choose one of {', '.join(others)}, or none")

    @property
    def is_learned(self) -> bool:
        """Whether the permutations come from training."""
        return self.permutation == LEARNED_PERMUTATION

    @property
    def orders_rows(self) -> bool:
        """Whether output channels are reordered too."""
        return self.transposable and self.permutation != "identity"

    def check_outputs(self, out_channels: Mapping[str, int], pattern: NMPattern) -> None:
        """Refuse linears whose output channels a transposable pattern does not divide, all of them at once.

        Raises:
            ValueError: naming every linear whose output is not a multiple of M.
        """
        if self.transposable:
            pattern.check_widths({f"the output of {name}": width for name, width in out_channels.items()})


@dataclass(frozen=True)
class PrunedLinear:
    """What pruning decided for one linear.

    Attributes:
        mask: (out, in) bool, True = kept, in the original channel order.
        weight: (out, in) float32 new weight, exactly 0 where pruned; None if the kept weights stay as they are.
        rows: the order of the output channels under which a transposable mask is N:M along them; None for their own.
    """

    mask: Tensor
    weight: Tensor | None = None
    rows: Permutation | None = None

    def apply(self, weight: Tensor) -> Tensor:
        """Return the pruned weight in the dtype of the original one, zeros as +0.0."""
        values = weight if self.weight is None else self.weight.to(weight.device, weight.dtype)
        return values.masked_fill(~self.mask.to(weight.device), 0.0)


@dataclass(frozen=True)
class PrunedGroup:
    """What pruning decided for one linear group.

    Attributes:
        permutation: the order of the input channels under which every mask is N:M, in canonical form.
        linears: by path below the decoder layer.
        retained_score: share of the total score that the masks keep, 0..1.
        output_error: ||(W - pruned) X||^2 / ||W X||^2 over the calibration tokens, all linears together.
        damping: of the Gram matrix, relative to its mean diagonal, where it took more than the update or the score asks for.
    """

    permutation: Permutation
    linears: dict[str, PrunedLinear]
    retained_score: float
    output_error: float
    damping: float | None = None


PrunedLayer = dict[str, PrunedGroup]  # by the name of the linear group


def prune_group(
    weights: Mapping[str, Tensor],
    stats: ActivationStats,
    pattern: NMPattern,
    method: PruningMethod,
    permutation: Permutation | None = None,
    generator: torch.Generator | None = None,
) -> PrunedGroup:
    """Prune the linears of one group.

    Args:
        weights: (out, in) each, by path, all with the same input.
        stats: of that input.
        permutation: the learned order for a method with learned permutations; otherwise the method finds its own.
        generator: of a random permutation and of the search; None for a new one with the method's seed.

    Returns:
        Masks in the original channel order; equal solutions have equal permutations.

    Raises:
        ValueError: if a score is not finite, or a method with learned permutations is given none.
    """
    with larger_dampings() as dampings:
        pruned = _prune_group(weights, stats, pattern, method, permutation, generator)
    return replace(pruned, damping=max(dampings, default=None))


def _prune_group(
    weights: Mapping[str, Tensor],
    stats: ActivationStats,
    pattern: NMPattern,
    method: PruningMethod,
    permutation: Permutation | None,
    generator: torch.Generator | None,
) -> PrunedGroup:
    scores = {path: lookup(PRUNING_METRICS, method.score, "score")(weight, stats).of(weight) for path, weight in weights.items()}
    broken = [path for path, score in scores.items() if not is_finite(score)]
    if broken:
        raise ValueError(f"the scores of {', '.join(broken)} must be finite; the weights or the statistics hold NaN or infinity")
    if permutation is None:
        generator = generator or torch.Generator().manual_seed(method.seed)
        permutation = find_permutation(method.permutation, weights, scores, stats, pattern, generator)
    permutation = permutation.canonical(pattern.group)
    pattern = replace(pattern, transposable=method.transposable)
    rows = {
        path: heuristic_permutation(score.t(), pattern).canonical(pattern.group) if method.orders_rows else None for path, score in scores.items()
    }
    masks = {path: best_mask(_arranged(score, permutation, rows[path]), pattern) for path, score in scores.items()}
    values: dict[str, Tensor] = {}
    if method.update is not None:
        arranged = {path: _arranged(weight.float(), permutation, rows[path]) for path, weight in weights.items()}
        values, masks = _updated(arranged, masks, stats, permutation, pattern, lookup(UPDATES, method.update, "weight update"))
    linears = {}
    for path, order in rows.items():
        value = values.get(path)
        value = None if value is None else _put_back(value, permutation, order)
        linears[path] = PrunedLinear(_put_back(masks[path], permutation, order), value, order)
    kept = sum(float((scores[path] * linear.mask).sum(dtype=torch.float64)) for path, linear in linears.items())
    total = sum(float(score.sum(dtype=torch.float64)) for score in scores.values())
    return PrunedGroup(permutation, linears, kept / total if total else 1.0, _output_error(weights, linears, stats))


def find_permutation(
    name: str, weights: Mapping[str, Tensor], scores: Mapping[str, Tensor], stats: ActivationStats, pattern: NMPattern, generator: torch.Generator
) -> Permutation:
    """Find the order of a linear group's input channels without learning.

    Args:
        name: an entry of `PERMUTATIONS`.
        weights, scores: (out, in) of the group's linears, by path.

    Raises:
        ValueError: if the permutation has to be learned.
    """
    if name == LEARNED_PERMUTATION:
        raise ValueError(f"permutation {name!r} has to be learned first; pass the permutation")
    weight, score = (torch.cat(list(tensors.values())) for tensors in (weights, scores))
    return lookup(PERMUTATIONS, name, "permutation")([Problem(weight, score, stats.gram)], pattern, None, generator)


def _arranged(tensor: Tensor, columns: Permutation, rows: Permutation | None) -> Tensor:
    """Return an (out, in) tensor in the order in which it is pruned."""
    return columns.apply(tensor if rows is None else rows.apply(tensor, 0))


def _put_back(tensor: Tensor, columns: Permutation, rows: Permutation | None) -> Tensor:
    """Undo `_arranged`."""
    return _arranged(tensor, columns.inverse(), rows and rows.inverse())


def _updated(
    weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], stats: ActivationStats, permutation: Permutation, pattern: NMPattern, update: Update
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return new weights and masks of all linears, which share their factorisations; all in the order in which they are pruned."""
    gram = permutation.apply(permutation.apply(stats.gram, 0), 1)
    found = update(torch.cat(list(weights.values())), ActivationStats(gram, stats.tokens), pattern, torch.cat(list(masks.values())))
    counts = [len(weight) for weight in weights.values()]
    values, chosen = (dict(zip(weights, tensor.split(counts), strict=True)) for tensor in found)
    return values, chosen


def _output_error(weights: Mapping[str, Tensor], linears: Mapping[str, PrunedLinear], stats: ActivationStats) -> float:
    """Return the squared error of the outputs, relative to the squared outputs, through the Gram matrix."""
    error = total = 0.0
    for path, weight in weights.items():
        dense = weight.float()
        change = dense - linears[path].apply(dense)
        error += float(((change @ stats.gram) * change).sum(dtype=torch.float64))
        total += float(((dense @ stats.gram) * dense).sum(dtype=torch.float64))
    return error / total if total else 0.0
