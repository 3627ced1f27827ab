"""Learn the channel permutations of the decoder layers, and return the best ones.

Only the logits of the permutations learn. What the dense model makes of the calibration sequences is computed once;
every step runs the decoder layers with masked weights and pulls towards it. The layers learn all together, or in
windows, the first ones first, each on what the pruned layers before it put out.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from permllm.artifacts import replacing
from permllm.calibration.capture import DecoderInputs, advance, capture_decoder_inputs, finish, run_layer
from permllm.calibration.samples import CalibrationSet
from permllm.calibration.statistics import LayerStats
from permllm.lcp.group_permutations import GroupPermutation, LearnedGroups, LogitLearner
from permllm.lcp.guided import GuidedGroups, GuidedLearner
from permllm.lcp.masked_linear import MaskedLinear, channels_first, mask_rule
from permllm.lcp.objective import HIDDEN_OBJECTIVES, LOGIT_OBJECTIVES, NextTokens, curvature_probe, needs_logits
from permllm.lcp.recipes import LearnConfig
from permllm.lcp.schedule import linear_temperature
from permllm.lookup import lookup
from permllm.models.adapter import ModelAdapter, is_finite
from permllm.permutation.permutation import Permutation
from permllm.pruning.methods import LayerPermutations, find_permutation
from permllm.pruning.metrics import PRUNING_METRICS
from permllm.sparsity.pattern import NMPattern

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EpochRecord:
    """How learning stands after an epoch; epoch 0 is the start.

    Attributes:
        training_loss: mean over the epoch's steps; None for epoch 0.
        held_out_loss: of the hard permutations on the held-out sequences (the training ones if none are held out).
        temperature: of Sinkhorn at the end of the epoch.
        is_best: whether these permutations are the best so far.
        window: which of the windows that learn one after another; their losses are not comparable.
    """

    epoch: int
    training_loss: float | None
    held_out_loss: float
    temperature: float
    is_best: bool
    window: int = 0


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


@dataclass(frozen=True)
class _Setup:
    """What is learned: the dense model, and how it is pruned."""

    model: "PreTrainedModel"
    adapter: ModelAdapter
    statistics: Sequence[LayerStats]
    pattern: NMPattern
    score: str
    config: LearnConfig

    @property
    def layers(self) -> nn.ModuleList:
        return self.adapter.layers(self.model)

    def groups(self, starts: Sequence[LayerPermutations], generator: torch.Generator) -> LearnedGroups | GuidedGroups:
        """Return permutations of some layers that can learn."""
        if self.config.optimizer == "guided":
            return GuidedGroups(starts, self.pattern, self.config, self.model.device)
        return LearnedGroups(starts, self.pattern, self.config, generator, self.model.device)


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
    state_file: Path | None = None,
    starts: Sequence[LayerPermutations] | None = None,
) -> LearnResult:
    """Learn the permutations under which the pruned model stays closest to the dense one.

    Args:
        model: dense; the same when this returns.
        statistics: of every decoder layer of the dense model, for the scores.
        score: the pruning metric.
        on_epoch: called after the start and after every epoch, and on resuming once more for the epochs before.
        state_file: where the state is kept after every epoch; a file of an interrupted run with the same arguments is
            resumed, with equal bytes on the same machine. The caller names it after what it belongs to and removes it.
        starts: the permutations to begin from, where they are known already; None to find those of `config.start`.

    Returns:
        The permutations with the lowest held-out loss among the start and the ends of all epochs. If a loss is no
        longer a number, the best ones so far, and why.

    Raises:
        ValueError: if the block size or the pattern does not fit a layer, or there are too few sequences.
        LearningError: if the loss of the start is not a number.

    Source: PermLLM (NeurIPS 2025), section 3.
    """
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)  # only permutations learn
    try:
        return _learn(_Setup(model, adapter, statistics, pattern, score, config), samples, on_epoch, state_file, starts)
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


def _learn(
    setup: _Setup,
    samples: CalibrationSet,
    on_epoch: Callable[[EpochRecord], None],
    state_file: Path | None,
    starts: Sequence[LayerPermutations] | None,
) -> LearnResult:
    model, adapter, statistics, pattern, config = setup.model, setup.adapter, setup.statistics, setup.pattern, setup.config
    widths = adapter.widths(model)
    pattern.check_widths(widths)
    config.check_widths(widths, pattern)
    training = samples.tokens[samples.training_rows][: config.sequences]
    if config.sequences is not None and config.sequences > len(training):
        raise ValueError(f"sequences is {config.sequences}, but the calibration has {len(training)} that are not held out")
    layers = adapter.layers(model)
    if len(statistics) != len(layers):
        raise ValueError(f"there are statistics of {len(statistics)} decoder layers, but the model has {len(layers)}")
    if config.optimizer != "guided":
        _log_block_sizes(widths, pattern, config)
    saved = _State.read(state_file) if state_file is not None and state_file.exists() else _State()
    fixed = max(len(layers) - (config.last_layers or len(layers)), 0)
    if not saved.orders:
        saved.orders = _orders(starts or find_starts(model, adapter, statistics, pattern, setup.score, config, fixed))
    permutations = [{name: Permutation(order) for name, order in layer.items()} for layer in saved.orders]
    tokens = torch.cat([training, samples.tokens[samples.held_out_rows]])
    sparse = capture_decoder_inputs(model, adapter, tokens)
    dense = DecoderInputs(sparse.hidden.clone(), sparse.keywords)

    def step_over(part: range) -> None:
        """Move both sets of hidden states behind some layers, the sparse ones through their masks."""
        _pass_through(setup, dense, part)
        fixed_groups = [{name: GroupPermutation(order.order.to(model.device)) for name, order in permutations[index].items()} for index in part]
        with _masked_layers(setup, part, fixed_groups):
            _pass_through(setup, sparse, part)

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
            groups = setup.groups(permutations[part.start : part.stop], generator)
            target = _target(setup, dense, part, tokens)
            with _masked_layers(setup, part, groups.layers) as linears:
                run = _Run(setup, part, sparse, target, len(training), groups, linears, generator, window, saved, state_file)
                permutations[part.start : part.stop], stopped = run.learn(history, on_epoch)
            if stopped is not None:
                logger.warning("learning stopped: %s", stopped)
                break
            saved.finish_window(_orders(permutations), state_file)
        if part.stop < len(layers):
            step_over(part)
    return LearnResult(permutations, history, stopped)


@torch.no_grad()
def find_starts(
    model: "PreTrainedModel",
    adapter: ModelAdapter,
    statistics: Sequence[LayerStats],
    pattern: NMPattern,
    score: str,
    config: LearnConfig,
    fixed: int = 0,
) -> list[LayerPermutations]:
    """Find the permutations that learning begins from; the first `fixed` layers get the heuristic one."""
    metric, generator = lookup(PRUNING_METRICS, score, "score"), torch.Generator().manual_seed(config.seed)
    starts: list[LayerPermutations] = []
    for index, (layer, stats) in enumerate(zip(adapter.layers(model), statistics, strict=True)):
        name_of_start = config.start if index >= fixed else "cp"
        starts.append({})
        for name, group in adapter.linear_groups.items():
            weights = {path: layer.get_submodule(path).weight for path in group.readers}
            scores = {path: metric(weight, stats[name]).of(weight) for path, weight in weights.items()}
            starts[-1][name] = find_permutation(name_of_start, weights, scores, stats[name], pattern, generator)
    return starts


@contextmanager
def _masked_layers(setup: _Setup, part: range, groups: Sequence[Mapping[str, GroupPermutation]]) -> Iterator[list[dict[str, list[MaskedLinear]]]]:
    """Put a `MaskedLinear` in the place of every target linear of some layers; the originals return at the end.

    Yields:
        The masked linears by layer and name of their group.
    """
    metric, adapter = lookup(PRUNING_METRICS, setup.score, "score"), setup.adapter
    originals: list[tuple[nn.Module, str, nn.Linear]] = []
    masked: list[dict[str, list[MaskedLinear]]] = []
    try:
        for index, permutations in zip(part, groups, strict=True):
            layer, stats = setup.layers[index], setup.statistics[index]
            linears = adapter.linears(layer)
            masked.append({name: [] for name in adapter.linear_groups})
            for name, group in adapter.linear_groups.items():
                for path in group.readers:
                    linear = linears[path]
                    rule = mask_rule(linear.weight, metric(linear.weight, stats[name]), setup.pattern, setup.config.mask_temperature)
                    originals.append((layer, path, linear))
                    channels_first(linear, True)
                    masked[-1][name].append(MaskedLinear(linear, rule, permutations[name]))
                    layer.set_submodule(path, masked[-1][name][-1])
        yield masked
    finally:
        for layer, path, linear in originals:
            layer.set_submodule(path, linear)
            channels_first(linear, False)


@dataclass(frozen=True)
class _Target:
    """What the dense model makes of all sequences: hidden states after layers, (sequences, length, channels), and next tokens."""

    hidden: Tensor
    layers: list[Tensor] | None
    next_tokens: NextTokens | None


@torch.no_grad()
def _target(setup: _Setup, dense: DecoderInputs, part: range, tokens: Tensor) -> _Target:
    """Run the dense model through some layers, on copies of the hidden states."""
    config, after = setup.config, DecoderInputs(dense.hidden.clone(), dense.keywords)
    kept: list[Tensor] = []
    for index in part:
        _pass_through(setup, after, range(index, index + 1))
        if config.layer_objective:
            kept.append(after.hidden.clone())
    if not needs_logits(config.objectives):
        return _Target(after.hidden, kept or None, None)
    likeliest = []
    for batch in after.hidden.split(config.batch_size):
        logits = finish(setup.model, setup.adapter, batch).float()
        values, indices = logits.topk(min(config.teacher_tokens, logits.shape[-1]), dim=-1)
        likeliest.append((indices, values - logits.logsumexp(-1, keepdim=True)))
    indices, log_probabilities = (torch.cat(parts) for parts in zip(*likeliest, strict=True))
    return _Target(after.hidden, kept or None, NextTokens(tokens.to(indices.device), indices, log_probabilities))


def _pass_through(setup: _Setup, inputs: DecoderInputs, part: range) -> None:
    for index in part:
        advance(setup.layers[index], inputs, setup.config.batch_size, setup.adapter.layer_path(index))


def _log_block_sizes(widths: dict[str, int], pattern: NMPattern, config: LearnConfig) -> None:
    for width in sorted(set(widths.values())):
        size = config.fitting_block_size(width, pattern)
        if config.block_size not in (None, size):
            logger.info("layers of %d channels are permuted in blocks of %d: %d does not divide them", width, size, config.block_size)


def _orders(permutations: Sequence[LayerPermutations]) -> list[dict[str, Tensor]]:
    return [{name: permutation.order.cpu() for name, permutation in layer.items()} for layer in permutations]


@dataclass
class _State:
    """What an interrupted run needs to go on: plain values and tensors.

    Attributes:
        orders: of all layers: the starts of those that have not learned yet, the results of the others.
        window: the one that learns.
        history: of all windows, records as dictionaries.
        running: of the window that learns; None before its first epoch ends.
    """

    orders: list[dict[str, Tensor]] = field(default_factory=list)
    window: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    running: dict[str, Any] | None = None

    @classmethod
    def read(cls, path: Path) -> "_State":
        return cls(**torch.load(path, weights_only=True))

    def write(self, path: Path | None) -> None:
        if path is not None:
            with replacing(path) as partial:
                torch.save(vars(self), partial)

    def finish_window(self, orders: list[dict[str, Tensor]], path: Path | None) -> None:
        """Move on to the next window."""
        self.orders, self.window, self.running = orders, self.window + 1, None
        self.write(path)


class _Run:
    """Learning of one window: the layers, what goes in and what should come out.

    Args:
        part: which decoder layers, masked by `groups` in `linears`.
        inputs: of the first of them; the `training` first sequences to learn on, the rest held out.
        generator: of the order of the sequences, and of all else that is drawn: one state resumes it.
    """

    def __init__(
        self,
        setup: _Setup,
        part: range,
        inputs: DecoderInputs,
        target: _Target,
        training: int,
        groups: LearnedGroups | GuidedGroups,
        linears: list[dict[str, list[MaskedLinear]]],
        generator: torch.Generator,
        window: int,
        state: _State,
        state_file: Path | None,
    ) -> None:
        self.setup, self.config, self.part, self.inputs, self.target, self.groups = setup, setup.config, part, inputs, target, groups
        self.layers = [setup.layers[index] for index in part]
        self.training, self.generator, self.window, self.state, self.state_file = training, generator, window, state, state_file
        rows = torch.arange(len(target.hidden))
        self.held_out = rows[training:] if training < len(rows) else rows
        self.steps_per_epoch = math.ceil(training / self.config.batch_size)
        self.total_steps = self.config.epochs * self.steps_per_epoch
        self.learner = self._learner(linears)

    def learn(self, history: list[EpochRecord], on_epoch: Callable[[EpochRecord], None]) -> tuple[list[LayerPermutations], str | None]:
        """Train, add to the history, and return the best permutations and why learning stopped early, if it did."""
        best, stopped = self._restore(), None
        done = [record for record in history if record.window == self.window]

        def close_epoch(epoch: int, training_loss: float | None, temperature: float) -> None:
            nonlocal best
            held_out_loss = self._held_out_loss(temperature, f"after epoch {epoch}")
            if not math.isfinite(held_out_loss):
                raise LearningError(f"the held-out loss is {held_out_loss} after epoch {epoch}{self._first_broken_layer(self.held_out)}")
            is_best = not done or held_out_loss < min(record.held_out_loss for record in done)
            if is_best:
                best = self.groups.permutations()
            done.append(EpochRecord(epoch, training_loss, held_out_loss, temperature, is_best, self.window))
            history.append(done[-1])
            self._save(history, best)
            on_epoch(done[-1])

        if not done:
            close_epoch(0, None, self.config.temperature_start)
        try:
            for epoch in range(len(done), self.config.epochs + 1):
                if self._is_out_of_patience(done):
                    break
                losses = []
                for rows in torch.randperm(self.training, generator=self.generator).split(self.config.batch_size):
                    losses.append(self._step(rows, (epoch - 1) * self.steps_per_epoch + len(losses), epoch))
                self.learner.end_epoch((epoch - 1) / self.config.epochs)
                close_epoch(epoch, float(torch.stack(losses).mean()), self._temperature(epoch * self.steps_per_epoch - 1))
        except LearningError as error:
            if not done:
                raise
            last = done[-1]
            stopped = f"{error}; last good state: epoch {last.epoch}, held-out loss {last.held_out_loss:.6g}. "
            stopped += "Lower learning_rate, or load the model in float32"
        return best, stopped

    def _learner(self, linears: list[dict[str, list[MaskedLinear]]]) -> LogitLearner | GuidedLearner:
        if isinstance(self.groups, LearnedGroups):
            return LogitLearner(self.groups, self.config, self.config.rate(self.setup.score), self.total_steps)
        statistics = _Part(self.setup.statistics, self.part)
        return GuidedLearner(self.groups, linears, statistics, self._curvature(linears), self.config, self.generator)

    def _curvature(self, linears: list[dict[str, list[MaskedLinear]]]) -> dict[MaskedLinear, Tensor]:
        """Return the curvature of the objective in every output of every linear, (out,), averaged over the training tokens."""
        generator = torch.Generator().manual_seed(self.config.seed)
        flat = [linear for layer in linears for group in layer.values() for linear in group]
        found = {linear: torch.zeros(linear.original.out_features, device=self.target.hidden.device) for linear in flat}
        tokens = self.training * self.target.hidden.shape[1]

        def watch(linear: MaskedLinear, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            def add(gradient: Tensor) -> None:
                found[linear] += gradient.flatten(0, -2).float().square().sum(0) / tokens

            output.register_hook(add)

        for linear in flat:
            linear.collect_gradient()  # for the outputs to have a gradient
        handles = [linear.register_forward_hook(watch) for linear in flat]
        try:
            for name, weight in self.config.objectives.items():
                for rows in torch.arange(self.training).split(self.config.batch_size):
                    with self._precision():
                        *_, output = self._hidden(rows.to(self.target.hidden.device))
                        if name in LOGIT_OBJECTIVES:
                            output = finish(self.setup.model, self.setup.adapter, output)
                    if not is_finite(output):
                        return found  # the loss of the start is not finite either, and says so
                    (curvature_probe(name, output, generator) * weight**0.5).backward()
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _temperature(self, step: int) -> float:
        return linear_temperature(self._progress(step), self.config.temperature_start, self.config.temperature_end)

    def _progress(self, step: int) -> float:
        return step / max(self.total_steps - 1, 1)

    def _is_out_of_patience(self, done: list[EpochRecord]) -> bool:
        best = [record.epoch for record in done if record.is_best][-1]
        return self.config.patience is not None and done[-1].epoch - best >= self.config.patience

    def _step(self, rows: Tensor, step: int, epoch: int) -> Tensor:
        """Learn from some sequences, and return the loss."""
        where = f"at step {step} (epoch {epoch})"
        self._prepare(self._temperature(step), where, noise=1 - self._progress(step))
        loss = self._distance(rows)
        if not loss.isfinite():
            raise LearningError(f"the loss is {loss.item()} {where}{self._first_broken_layer(rows)}")
        self.learner.weigh(loss, len(rows) / self.training).backward()
        self.learner.end_batch()
        return loss.detach()

    def _prepare(self, temperature: float, where: str, **options: Any) -> None:
        try:
            self.learner.prepare(temperature, **options)
        except ValueError as error:  # of the assignment
            raise LearningError(f"the logits of the permutations are no longer finite {where} ({error})") from error

    @torch.no_grad()
    def _held_out_loss(self, temperature: float, where: str) -> float:
        self._prepare(temperature, where, hard=True)
        batches = self.held_out.split(self.config.batch_size)
        return float(sum(self._distance(rows) * len(rows) for rows in batches) / len(self.held_out))

    def _distance(self, rows: Tensor) -> Tensor:
        config, target = self.config, self.target
        rows = rows.to(target.hidden.device)
        loss = torch.zeros((), device=target.hidden.device)
        with self._precision():
            for hidden, dense in zip(self._hidden(rows), target.layers or repeat(None)):  # noqa: B905 (repeat has no end)
                loss += sum((weight * HIDDEN_OBJECTIVES[name](hidden, dense[rows]) for name, weight in config.layer_objective.items()), 0.0)
            logits = finish(self.setup.model, self.setup.adapter, hidden) if needs_logits(config.objectives) else None
        for name, weight in config.objectives.items():
            if name in HIDDEN_OBJECTIVES:
                loss = loss + weight * HIDDEN_OBJECTIVES[name](hidden, target.hidden[rows])
            else:
                loss = loss + weight * LOGIT_OBJECTIVES[name](logits, target.next_tokens[rows])
        return loss

    def _hidden(self, rows: Tensor) -> Iterator[Tensor]:
        """Yield the hidden states after every layer."""
        hidden = self.inputs.hidden[rows]
        for layer in self.layers:
            if self.config.recompute_layers and torch.is_grad_enabled():
                hidden = checkpoint(run_layer, layer, hidden, self.inputs.keywords[layer], use_reentrant=False)
            else:
                hidden = run_layer(layer, hidden, self.inputs.keywords[layer])
            yield hidden

    def _precision(self) -> Any:
        if self.config.precision == "model":
            return nullcontext()
        return torch.autocast(self.target.hidden.device.type, torch.bfloat16)

    @torch.no_grad()
    def _first_broken_layer(self, rows: Tensor) -> str:
        with self._precision():
            for index, hidden in zip(self.part, self._hidden(rows.to(self.target.hidden.device)), strict=True):
                if not is_finite(hidden):
                    return f", first in {self.setup.adapter.layer_path(index)}"
        return ", though all hidden states are finite"

    def _save(self, history: list[EpochRecord], best: list[LayerPermutations]) -> None:
        self.state.history = [asdict(record) for record in history]
        self.state.running = {"learner": self.learner.state(), "generator": self.generator.get_state(), "best": _orders(best)}
        self.state.write(self.state_file)

    def _restore(self) -> list[LayerPermutations]:
        """Take the saved state of this window up, if there is one, and return its best permutations."""
        running = self.state.running
        if running is None:
            return []
        self.learner.restore(running["learner"])
        self.generator.set_state(running["generator"])
        return [{name: Permutation(order) for name, order in layer.items()} for layer in running["best"]]


@dataclass(frozen=True)
class _Part(Sequence[LayerStats]):
    """Statistics of some decoder layers, each read when it is asked for."""

    statistics: Sequence[LayerStats]
    part: range

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> LayerStats:
        return self.statistics[self.part[index]]
