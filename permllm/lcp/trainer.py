"""Learn the channel permutations of the decoder layers, and return the best ones.

Only permutations learn. What the dense model makes of the calibration sequences is computed once;
every step runs the decoder layers with masked weights and pulls towards it. The layers learn all together, or in
windows, the first ones first, each on what the pruned layers before it put out.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from permllm.calibration.capture import DecoderInputs, advance, capture_decoder_inputs, finish
from permllm.calibration.samples import CalibrationSet
from permllm.calibration.statistics import LayerStats
from permllm.lcp.distributed import ALONE, Ranks, WholeWeights, whole
from permllm.lcp.group_permutations import GroupPermutation
from permllm.lcp.masked_linear import MaskedLinear, MaskRule, mask_layer, mask_rule, unmask_layer
from permllm.lcp.objective import NextTokens, needs_logits
from permllm.lcp.recipes import LearnConfig
from permllm.lcp.run import EpochRecord, LearningError, Run, Setup, State, Target, orders_of
from permllm.lookup import lookup
from permllm.models.adapter import Heads
from permllm.models.streaming import LayeredModel
from permllm.permutation.permutation import Permutation
from permllm.pruning.layerwise import model_weights
from permllm.pruning.layout import find_shared_order, group_widths, shared_orders, spread
from permllm.pruning.metrics import PRUNING_METRICS
from permllm.pruning.permutations import LayerPermutations
from permllm.sparsity.pattern import NMPattern

__all__ = ["EpochRecord", "LearnResult", "LearningError", "find_starts", "learn_permutations"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LearnResult:
    """The best permutations, per decoder layer and linear group, and how they came about.

    Attributes:
        stopped: why learning ended before its last epoch because a loss was no longer a number; None if it did not.
    """

    permutations: list[LayerPermutations]
    history: list[EpochRecord]
    stopped: str | None = None

    @property
    def start(self) -> EpochRecord:
        """Where the last window began."""
        return next(record for record in self.history if record.window == self.history[-1].window)

    @property
    def best(self) -> EpochRecord:
        """The epoch whose permutations the last window kept."""
        return [record for record in self.history if record.is_best and record.window == self.history[-1].window][-1]


def learn_permutations(
    layered: LayeredModel,
    samples: CalibrationSet,
    statistics: Sequence[LayerStats],
    pattern: NMPattern,
    score: str,
    config: LearnConfig,
    on_epoch: Callable[[EpochRecord], None] = lambda record: None,
    state_file: Path | None = None,
    starts: Sequence[LayerPermutations] | None = None,
    ranks: Ranks = ALONE,
) -> LearnResult:
    """Learn the permutations under which the pruned model stays closest to the dense one.

    Args:
        layered: the dense model; the same when this returns. Of a streamed one only the layers of a window are there at a time.
        statistics: of every decoder layer of the dense model, for the scores.
        score: the pruning metric.
        on_epoch: called after the start and after every epoch, and on resuming once more for the epochs before.
        state_file: where the state is kept after every epoch; a file of an interrupted run with the same arguments is
            resumed, with equal bytes on the same machine. The caller names it after what it belongs to and removes it.
        starts: the permutations to begin from, where they are known already; None to find those of `config.start`.
        ranks: which of the processes this is that learn together, all with the same arguments and a model of `open_sharded`.
            They return the same; the first one alone keeps the state.

    Returns:
        The permutations with the lowest held-out loss among the start and the ends of all epochs. If a loss is no
        longer a number, the best ones so far, and why.

    Raises:
        ValueError: if the block size or the pattern does not fit a layer, or there are too few sequences or too many processes.
        LearningError: if the loss of the start is not a number.

    Source: PermLLM (NeurIPS 2025), section 3.
    """
    wanting = [parameter for parameter in layered.model.parameters() if parameter.requires_grad]
    layered.model.requires_grad_(False)  # only permutations learn
    try:
        with layered.head() if needs_logits(config.objectives) else nullcontext():
            return _learn(Setup(layered, statistics, pattern, score, config, ranks), samples, on_epoch, state_file, starts)
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


def _learn(
    setup: Setup,
    samples: CalibrationSet,
    on_epoch: Callable[[EpochRecord], None],
    state_file: Path | None,
    starts: Sequence[LayerPermutations] | None,
) -> LearnResult:
    model, adapter, device, statistics = setup.model, setup.adapter, setup.layered.device, setup.statistics
    pattern, config, ranks = setup.pattern, setup.config, setup.ranks
    widths = adapter.widths(model)
    pattern.check_widths(widths)
    config.check_widths(widths, pattern)
    ranks.check(config.batch_size, model, adapter)
    if config.refit and ranks.count > 1:
        raise ValueError(f"refit needs all rows of a linear, but {ranks.count} processes divide them; set processes to 1")
    training = samples.tokens[samples.training_rows][: config.sequences]
    if config.sequences is not None and config.sequences > len(training):
        raise ValueError(f"sequences is {config.sequences}, but the calibration has {len(training)} that are not held out")
    layers = adapter.layers(model)
    if len(statistics) != len(layers):
        raise ValueError(f"there are statistics of {len(statistics)} decoder layers, but the model has {len(layers)}")
    if config.optimizer != "guided":
        _log_block_sizes(widths, pattern, config)
    saved = ranks.of_first(lambda: State.read(state_file))
    saved.path = state_file if ranks.is_first else None
    fixed = max(len(layers) - (config.last_layers or len(layers)), 0)
    if not saved.orders:
        saved.orders = orders_of(starts or find_starts(setup.layered, statistics, pattern, setup.score, config, fixed))
    permutations = [{name: Permutation(order) for name, order in layer.items()} for layer in saved.orders]
    tokens = torch.cat([training, samples.tokens[samples.held_out_rows]])
    with setup.layered.stem():
        sparse = capture_decoder_inputs(model, adapter, tokens)
    dense = DecoderInputs(sparse.hidden.clone(), sparse.keywords)

    def step_over(part: range) -> None:
        """Move both sets of hidden states behind some layers, the sparse ones through their masks."""
        for index in part:
            with setup.layered.layer(index):
                _advance(setup, dense, index)
            fixed_groups = {name: GroupPermutation(order.order.to(device)) for name, order in permutations[index].items()}
            with _masked_layers(setup, range(index, index + 1), [fixed_groups]):
                _advance(setup, sparse, index)

    history = [EpochRecord(**record) for record in saved.history]
    for record in history:
        on_epoch(record)
    width = config.window or len(layers)
    stopped = None
    step_over(range(fixed))
    for window, first in enumerate(range(fixed, len(layers), width)):
        part = range(first, min(first + width, len(layers)))
        if window >= saved.window:
            generator = torch.Generator().manual_seed(config.seed)
            groups = setup.groups(part, permutations[part.start : part.stop], generator)
            target = _target(setup, dense, part, tokens)
            with _masked_layers(setup, part, groups.layers) as linears:
                run = Run(setup, part, sparse, target, len(training), groups, linears, generator, saved)
                permutations[part.start : part.stop], stopped = run.learn(history, on_epoch)
            if stopped is not None:
                logger.warning("learning stopped: %s", stopped)
                break
            saved.finish_window(permutations)
        if part.stop < len(layers):
            step_over(part)
    return LearnResult(permutations, history, stopped)


@torch.no_grad()
def find_starts(
    layered: LayeredModel,
    statistics: Sequence[LayerStats],
    pattern: NMPattern,
    score: str,
    config: LearnConfig,
    fixed: int = 0,
) -> list[LayerPermutations]:
    """Find the permutations that learning begins from; the first `fixed` layers get the heuristic one."""
    adapter, weights, generator = layered.adapter, WholeWeights(layered), torch.Generator().manual_seed(config.seed)
    widths = group_widths(model_weights(layered.model, adapter), adapter)
    shared = shared_orders(config.layout, adapter, widths, Heads.of(layered.model.config), pattern)
    stats = lru_cache(maxsize=1)(statistics.__getitem__)
    orders = [
        find_shared_order("cp" if one.members[0].layer < fixed else config.start, score, one, weights, adapter, stats, pattern, generator)
        for one in shared
    ]
    return spread(shared, orders, widths)


@contextmanager
def _masked_layers(setup: Setup, part: range, groups: Sequence[Mapping[str, GroupPermutation]]) -> Iterator[list[dict[str, list[MaskedLinear]]]]:
    """Have some layers, with a `MaskedLinear` in the place of every target linear; the originals return at the end.

    Yields:
        The masked linears by layer and name of their group.
    """
    metric = lookup(PRUNING_METRICS, setup.score, "score")
    masked: list[dict[str, list[MaskedLinear]]] = []
    with ExitStack() as stack:
        for index, permutations in zip(part, groups, strict=True):
            stats, layer = setup.statistics[index], stack.enter_context(setup.layered.layer(index))
            stack.callback(unmask_layer, layer)

            def rule_of(name: str, weight: Tensor, stats: LayerStats = stats) -> MaskRule:
                weight = whole(weight)
                return mask_rule(weight, metric(weight, stats[name]), setup.pattern, setup.config.mask_temperature)

            masked.append(mask_layer(layer, setup.adapter, permutations, rule_of))
        yield masked


@torch.no_grad()
def _target(setup: Setup, dense: DecoderInputs, part: range, tokens: Tensor) -> Target:
    """Run the dense model through some layers, on copies of the hidden states."""
    config, after = setup.config, DecoderInputs(dense.hidden.clone(), dense.keywords)
    kept: list[Tensor] = []
    for index in part:
        with setup.layered.layer(index):
            _advance(setup, after, index)
        if config.layer_objective:
            kept.append(after.hidden.clone())
    if not needs_logits(config.objectives):
        return Target(after.hidden, kept or None, None)
    if "kl" not in config.objectives:  # the text is all that is compared with
        nothing = torch.empty(*tokens.shape, 0, device=after.hidden.device)
        return Target(after.hidden, kept or None, NextTokens(tokens.to(nothing.device), nothing.long(), nothing))
    likeliest = []
    for batch in after.hidden.split(config.batch_size):
        logits = finish(setup.model, setup.adapter, batch).float()
        values, indices = logits.topk(min(config.teacher_tokens, logits.shape[-1]), dim=-1)
        likeliest.append((indices, values - logits.logsumexp(-1, keepdim=True)))
    indices, log_probabilities = (torch.cat(parts) for parts in zip(*likeliest, strict=True))
    return Target(after.hidden, kept or None, NextTokens(tokens.to(indices.device), indices, log_probabilities))


def _advance(setup: Setup, inputs: DecoderInputs, index: int) -> None:
    advance(setup.layers[index], inputs, setup.config.batch_size, setup.adapter.layer_path(index))


def _log_block_sizes(widths: dict[str, int], pattern: NMPattern, config: LearnConfig) -> None:
    for width in sorted(set(widths.values())):
        size = config.fitting_block_size(width, pattern)
        if config.block_size not in (None, size):
            logger.info("layers of %d channels are permuted in blocks of %d: %d does not divide them", width, size, config.block_size)
