"""Learn the channel permutations of all decoder layers together, and return the best ones.

Only the logits of the permutations learn. The dense model's hidden states after its last decoder layer are
computed once; every step runs the decoder layers with masked weights and pulls towards them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from permllm.calibration.capture import DecoderInputs, advance, capture_decoder_inputs, run_layer
from permllm.calibration.samples import CalibrationSet
from permllm.calibration.statistics import LayerStats
from permllm.lcp.masked_linear import GroupPermutation, MaskedLinear
from permllm.lcp.objective import OBJECTIVES
from permllm.lcp.recipes import LearnConfig
from permllm.lcp.schedule import cosine_decay, linear_temperature
from permllm.lookup import lookup
from permllm.models.adapter import ModelAdapter
from permllm.permutation.heuristic import heuristic_permutation
from permllm.permutation.learnable import LearnableBlockPermutation
from permllm.permutation.permutation import Permutation
from permllm.pruning.methods import LayerPermutations
from permllm.pruning.metrics import PRUNING_METRICS
from permllm.sparsity.pattern import NMPattern

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class EpochRecord:
    """How learning stands after an epoch; epoch 0 is the start.

    Attributes:
        training_loss: mean over the epoch's steps; None for epoch 0.
        held_out_loss: of the hard permutations on the held-out sequences (the training ones if none are held out).
        temperature: of Sinkhorn at the end of the epoch.
        is_best: whether these permutations are the best so far.
    """

    epoch: int
    training_loss: float | None
    held_out_loss: float
    temperature: float
    is_best: bool


@dataclass(frozen=True)
class LearnResult:
    """The best permutations, per decoder layer and linear group, and how they came about."""

    permutations: list[LayerPermutations]
    history: list[EpochRecord]


class LearningError(ArithmeticError):
    """The loss is no longer a number."""


def learn_permutations(
    model: "PreTrainedModel",
    adapter: ModelAdapter,
    samples: CalibrationSet,
    statistics: Sequence[LayerStats],
    pattern: NMPattern,
    score: str,
    config: LearnConfig,
    on_epoch: Callable[[EpochRecord], None] = lambda record: None,
) -> LearnResult:
    """Learn the permutations under which the pruned model stays closest to the dense one.

    Args:
        model: dense; the same when this returns.
        statistics: of every decoder layer of the dense model, for the scores.
        score: the pruning metric.
        on_epoch: called after the start and after every epoch.

    Returns:
        The permutations with the lowest held-out loss among the start and the ends of all epochs.

    Raises:
        ValueError: if the block size or the pattern does not fit a layer, or there are too few sequences.
        LearningError: if the loss becomes NaN.

    Source: PermLLM (NeurIPS 2025), section 3.
    """
    widths = adapter.widths(model)
    pattern.check_widths(widths)
    config.check_widths(widths, pattern)
    generator = torch.Generator().manual_seed(config.seed)
    training = samples.tokens[samples.training_rows][: config.sequences]
    if config.sequences is not None and config.sequences > len(training):
        raise ValueError(f"sequences is {config.sequences}, but the calibration has {len(training)} that are not held out")
    held_out = samples.tokens[samples.held_out_rows]
    inputs = capture_decoder_inputs(model, adapter, torch.cat([training, held_out]))
    target = DecoderInputs(inputs.hidden.clone(), inputs.keywords)
    layers = adapter.layers(model)
    pass_through(layers, target, config.batch_size, adapter)
    fixed = max(len(layers) - (config.last_layers or len(layers)), 0)
    with masked_layers(model, adapter, statistics, pattern, score, config, fixed, generator) as groups:
        for group in [group for layer in groups[:fixed] for group in layer.values()]:
            group.fix(group.learnable.start)
        pass_through(layers[:fixed], inputs, config.batch_size, adapter)
        run = _Run(layers[fixed:], inputs, target.hidden, len(training), groups, fixed, config, generator)
        return run.learn(config.rate(score), on_epoch)


def pass_through(layers: nn.ModuleList, inputs: DecoderInputs, batch_size: int, adapter: ModelAdapter) -> None:
    """Replace the hidden states by what the first decoder layers make of them."""
    for index, layer in enumerate(layers):
        advance(layer, inputs, batch_size, adapter.layer_path(index))


@contextmanager
def masked_layers(
    model: "PreTrainedModel",
    adapter: ModelAdapter,
    statistics: Sequence[LayerStats],
    pattern: NMPattern,
    score: str,
    config: LearnConfig,
    fixed: int,
    generator: torch.Generator,
) -> Iterator[list[dict[str, GroupPermutation]]]:
    """Put a `MaskedLinear` in the place of every target linear; the originals return at the end.

    The first `fixed` layers start from the heuristic permutation whatever the configuration says.
    """
    originals: list[tuple[nn.Module, str, nn.Linear]] = []
    groups: list[dict[str, GroupPermutation]] = []
    try:
        for index, (layer, stats) in enumerate(zip(adapter.layers(model), statistics, strict=True)):
            linears = adapter.linears(layer)
            start = config.start if index >= fixed else "cp"
            groups.append({})
            for name, group in adapter.linear_groups.items():
                metric = lookup(PRUNING_METRICS, score, "score")
                scores = {path: metric(linears[path].weight, stats[name]) for path in group.readers}
                learnable = _start(torch.cat(list(scores.values())), start, pattern, config.block_size, generator)
                permutation = GroupPermutation(learnable).to(model.device)
                groups[-1][name] = permutation
                for path in group.readers:
                    originals.append((layer, path, linears[path]))
                    layer.set_submodule(path, MaskedLinear(linears[path], scores[path], permutation, pattern))
        yield groups
    finally:
        for layer, path, linear in originals:
            layer.set_submodule(path, linear)


def _start(score: Tensor, start: str, pattern: NMPattern, block_size: int, generator: torch.Generator) -> LearnableBlockPermutation:
    order = heuristic_permutation(score, pattern) if start == "cp" else Permutation.identity(score.shape[1])
    return LearnableBlockPermutation(order, block_size, generator if start == "random" else None)


class _Run:
    """One training run: the layers that learn, what goes in and what should come out.

    Args:
        inputs: of the first learned layer; the `training` first sequences to learn on, the rest held out.
        target: (sequences, length, channels), the dense model's output.
        groups: permutations of all layers, of which the first `fixed` do not learn.
    """

    def __init__(
        self,
        layers: nn.ModuleList,
        inputs: DecoderInputs,
        target: Tensor,
        training: int,
        groups: list[dict[str, GroupPermutation]],
        fixed: int,
        config: LearnConfig,
        generator: torch.Generator,
    ) -> None:
        self.layers, self.inputs, self.target, self.groups = layers, inputs, target, groups
        self.learned = [group for layer in groups[fixed:] for group in layer.values()]
        self.training = training
        rows = torch.arange(len(target))
        self.held_out = rows[training:] if training < len(target) else rows
        self.config, self.generator = config, generator

    def learn(self, learning_rate: float, on_epoch: Callable[[EpochRecord], None]) -> LearnResult:
        """Train for all epochs and return the best permutations seen."""
        config = self.config
        steps_per_epoch = -(-self.training // config.batch_size)
        total_steps = config.epochs * steps_per_epoch
        optimizer = torch.optim.AdamW([group.learnable.logits for group in self.learned], learning_rate, weight_decay=config.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_decay(step / total_steps))
        history: list[EpochRecord] = []
        best: list[LayerPermutations] = []

        def close_epoch(epoch: int, training_loss: float | None, temperature: float) -> None:
            nonlocal best
            held_out_loss = self._held_out_loss(temperature)
            if not math.isfinite(held_out_loss):
                raise LearningError(f"the held-out loss is {held_out_loss} after epoch {epoch}; lower learning_rate, or load the model in float32")
            is_best = not history or held_out_loss < min(record.held_out_loss for record in history)
            if is_best:
                best = [{name: group.value.permutation for name, group in layer.items()} for layer in self.groups]
            history.append(EpochRecord(epoch, training_loss, held_out_loss, temperature, is_best))
            on_epoch(history[-1])

        close_epoch(0, None, config.temperature_start)
        for epoch in range(1, config.epochs + 1):
            losses = []
            for rows in torch.randperm(self.training, generator=self.generator).split(config.batch_size):
                step = (epoch - 1) * steps_per_epoch + len(losses)
                temperature = linear_temperature(step / max(total_steps - 1, 1), config.temperature_start, config.temperature_end)
                self._harden(temperature)
                loss = self._distance(rows)
                if not loss.isfinite():
                    raise LearningError(
                        f"the loss is {loss.item()} at step {step} (epoch {epoch}); lower learning_rate, or load the model in float32"
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.detach())
            close_epoch(epoch, float(torch.stack(losses).mean()), temperature)
        return LearnResult(best, history)

    def _harden(self, temperature: float) -> None:
        try:
            for group in self.learned:
                group.update(temperature, self.config.sinkhorn_iterations)
        except ValueError as error:  # of the assignment
            raise LearningError(f"the logits of the permutations are no longer finite ({error}); lower learning_rate") from error

    @torch.no_grad()
    def _held_out_loss(self, temperature: float) -> float:
        self._harden(temperature)
        batches = self.held_out.split(self.config.batch_size)
        return float(sum(self._distance(rows) * len(rows) for rows in batches) / len(self.held_out))

    def _distance(self, rows: Tensor) -> Tensor:
        rows = rows.to(self.target.device)
        hidden = self.inputs.hidden[rows]
        for layer in self.layers:
            hidden = run_layer(layer, hidden, self.inputs.keywords[layer])
        return OBJECTIVES[self.config.objective](hidden, self.target[rows])
