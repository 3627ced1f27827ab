"""Prune a loaded model, and load a packed one, in one call: in a notebook or a script, without the pipeline."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from permllm.assembly.packed_model import load
from permllm.calibration.capture import dense_statistics
from permllm.calibration.samples import draw_windows, tokenize
from permllm.lcp.recipes import LearnConfig
from permllm.lcp.trainer import EpochRecord, learn_permutations
from permllm.models.adapter import Heads, check_finite
from permllm.models.families import adapter_of
from permllm.models.loading import check_length, context_length
from permllm.models.streaming import LoadedModel
from permllm.permutation.permutation import Permutation
from permllm.pruning.layerwise import apply_layer, model_weights, prune_in_parallel
from permllm.pruning.layout import find_permutations
from permllm.pruning.methods import PruningMethod
from permllm.sparsity.pattern import NMPattern

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["PruneResult", "load", "prune"]

LONGEST_DEFAULT = 1024


@dataclass(frozen=True)
class PruneResult:
    """A pruned model and how it was pruned.

    Attributes:
        model: the model given, its target weights now with zeros; other weights untouched.
        permutations: the order of the input channels under which a linear is N:M, by the linear's path. Linears
            that read the same tensor share it.
        retained_score, output_error: by the linear's path, of the linear group that it belongs to.
        history: how the permutations learned; empty without learning.
        rows: of transposable masks, the order of the output channels, by the linear's path, where it is not their own.
    """

    model: "PreTrainedModel"
    permutations: dict[str, Permutation]
    retained_score: dict[str, float]
    output_error: dict[str, float]
    history: list[EpochRecord] = field(default_factory=list)
    rows: dict[str, Permutation] = field(default_factory=dict)


def prune(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    pattern: str = "2:4",
    score: str = "wanda",
    permutation: str = "lcp",
    update: str | None = None,
    *,
    sequences: int = 128,
    length: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    layout: str = "free",
    transposable: bool = False,
    learn: LearnConfig | None = None,
) -> PruneResult:
    """Prune a causal language model to N:M sparsity, in place.

    Args:
        model: a loaded model of a supported family; float32 or bfloat16, on any device.
        texts: documents to calibrate on; windows of `length` tokens are drawn from them.
        pattern: "N:M", N kept of every M.
        score: `magnitude`, `wanda` or `ria`.
        permutation: `identity`, `random`, `cp` (heuristic), `search` or `lcp` (learned).
        update: None, or an entry of `permllm.pruning.methods.UPDATES`, for example `alps`, to update the kept weights.
        sequences: calibration sequences; with `lcp` one eighth of them is held out to choose the best epoch.
        length: tokens per sequence; None for the model's context, at most 1024.
        layout: `free`, every linear group its own order, or `foldable`, orders that fold away into a stock checkpoint.
        transposable: whether masks are N:M along the output channels too; see `PruningMethod`.
        learn: settings of `lcp`; None for `recipe: best`.

    Raises:
        ValueError: if a name is unknown, the pattern or the block size does not fit a layer, the text is too
            short, or weights or activations are not finite. The model is then unchanged.

    Example:
        >>> result = prune(model, tokenizer, texts, pattern="2:4", permutation="cp")  # doctest: +SKIP
        >>> result.model.save_pretrained("pruned")  # doctest: +SKIP
    """
    method, parsed = PruningMethod(score, permutation, update, seed, layout, transposable), NMPattern.parse(pattern)
    adapter = adapter_of(model)
    check_finite(model)
    config = replace(learn or LearnConfig.from_recipe({"seed": seed, "batch_size": batch_size}), layout=layout)
    parsed.check_widths(adapter.widths(model))
    method.check_outputs(adapter.output_widths(model), parsed)
    if method.is_learned:
        config.check_widths(adapter.widths(model), parsed)
    length = length or min(LONGEST_DEFAULT, context_length(model.config))
    check_length(length, model.config, "length")
    samples = draw_windows(tokenize(texts, tokenizer), sequences, length, seed, math.ceil(sequences / 8) if method.is_learned else 0)
    statistics = list(dense_statistics(LoadedModel(model, adapter), samples.tokens[samples.training_rows], batch_size))
    learned = learn_permutations(LoadedModel(model, adapter), samples, statistics, parsed, score, config) if method.is_learned else None
    permutations = learned and learned.permutations
    if not method.is_learned and layout != "free":
        weights, generator = list(model_weights(model, adapter)), torch.Generator().manual_seed(seed)
        permutations = find_permutations(layout, permutation, score, weights, adapter, Heads.of(model.config), statistics, parsed, generator)
    pruned = list(prune_in_parallel(model_weights(model, adapter), adapter, statistics, parsed, method, permutations))
    of = [
        (adapter.path(index, path), group, linear)
        for index, layer in enumerate(pruned)
        for group in layer.values()
        for path, linear in group.linears.items()
    ]
    for layer, decided in zip(adapter.layers(model), pruned, strict=True):
        apply_layer(layer, decided)
    return PruneResult(
        model,
        {path: group.permutation for path, group, _ in of},
        {path: group.retained_score for path, group, _ in of},
        {path: group.output_error for path, group, _ in of},
        learned.history if learned else [],
        {path: linear.rows for path, _, linear in of if linear.rows is not None},
    )
