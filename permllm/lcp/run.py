"""One training run: the permutations of some decoder layers, from where they start to the best epoch.

Permutations learn by their logits or by guided moves (the learner); epochs, losses, the best state and what an
interrupted run leaves are the same for both.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from permllm.artifacts import fingerprint, replacing
from permllm.batches import batches
from permllm.calibration.capture import DecoderInputs, finish, run_layer
from permllm.calibration.statistics import LayerStats
from permllm.lcp.distributed import ALONE, Ranks
from permllm.lcp.group_permutations import LearnedGroups, LogitLearner
from permllm.lcp.guided import GuidedGroups, GuidedLearner
from permllm.lcp.masked_linear import MaskedLinear
from permllm.lcp.objective import HIDDEN_OBJECTIVES, LOGIT_OBJECTIVES, NextTokens, curvature_probe, needs_logits
from permllm.lcp.recipes import LearnConfig
from permllm.lcp.refit import refit_layers
from permllm.lcp.schedule import linear_temperature
from permllm.models.adapter import Heads, ModelAdapter, is_finite
from permllm.models.streaming import LayeredModel
from permllm.permutation.permutation import Permutation
from permllm.pruning.layerwise import model_weights
from permllm.pruning.layout import group_widths, shared_orders
from permllm.pruning.permutations import LayerPermutations
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
class Setup:
    """What is learned: the dense model, how it is pruned, and which of the processes that learn it together this is."""

    layered: LayeredModel
    statistics: Sequence[LayerStats]
    pattern: NMPattern
    score: str
    config: LearnConfig
    ranks: Ranks = ALONE

    @property
    def model(self) -> "PreTrainedModel":
        """The dense model's modules."""
        return self.layered.model

    @property
    def adapter(self) -> ModelAdapter:
        """Where the model has what."""
        return self.layered.adapter

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        return self.adapter.layers(self.model)

    def groups(self, part: range, starts: Sequence[LayerPermutations], generator: torch.Generator) -> LearnedGroups | GuidedGroups:
        """Return permutations of some layers that can learn."""
        widths = group_widths(model_weights(self.model, self.adapter), self.adapter)[part.start : part.stop]
        shared = shared_orders(self.config.layout, self.adapter, widths, Heads.of(self.model.config), self.pattern)
        if self.config.optimizer == "guided":
            return GuidedGroups(starts, shared, self.pattern, self.config, self.layered.device, self.ranks)
        return LearnedGroups(starts, shared, self.pattern, self.config, generator, self.layered.device)


class LearningError(ArithmeticError):
    """The loss is no longer a number."""


@dataclass(frozen=True)
class Target:
    """What the dense model makes of all sequences: hidden states after layers, (sequences, length, channels), and next tokens."""

    hidden: Tensor
    layers: list[Tensor] | None
    next_tokens: NextTokens | None


def orders_of(permutations: Sequence[LayerPermutations]) -> list[dict[str, Tensor]]:
    """Return permutations as plain tensors on the CPU."""
    return [{name: permutation.order.cpu() for name, permutation in layer.items()} for layer in permutations]


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the names, tensors and plain values of a nested state, in order."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield name
            yield from _leaves(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


@dataclass
class State:
    """What an interrupted run needs to go on: plain values and tensors, on disk after every epoch.

    Attributes:
        path: where it is kept; None for nowhere.
        orders: of all layers: the starts of those that have not learned yet, the results of the others.
        window: the one that learns.
        history: of all windows, records as dictionaries.
        running: of the window that learns; None before its first epoch ends.
    """

    path: Path | None
    orders: list[dict[str, Tensor]] = field(default_factory=list)
    window: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    running: dict[str, Any] | None = None

    @classmethod
    def read(cls, path: Path | None) -> Self:
        """Return the state that an interrupted run left, or a new one if there is none or it is damaged."""
        if path is None or not path.exists():
            return cls(path)
        try:
            kept = torch.load(path, weights_only=True)
            if kept.pop("checksum") != fingerprint(_leaves(kept)):
                raise ValueError("its checksum is of other contents")
            return cls(path, **kept)
        except Exception as error:  # torch raises a dozen classes for a file that is not whole
            logger.warning("%s is damaged (%s): learning begins again", path, error)
            return cls(path)

    def write(self) -> None:
        """Put it on disk.

        Raises:
            OSError: if the disk is full or cannot be written.
        """
        if self.path is not None:
            kept = {name: value for name, value in vars(self).items() if name != "path"}
            with replacing(self.path) as partial:
                try:
                    torch.save({**kept, "checksum": fingerprint(_leaves(kept))}, partial)
                except RuntimeError as error:  # what torch makes of a full disk
                    raise OSError(f"{self.path} cannot be written ({error}); is the disk full?") from error

    @property
    def epochs(self) -> int:
        """How many epochs are learned, in all windows together."""
        return sum(record["epoch"] > 0 for record in self.history)

    def finish_window(self, permutations: Sequence[LayerPermutations]) -> None:
        """Move on to the next window."""
        self.orders, self.window, self.running = orders_of(permutations), self.window + 1, None
        self.write()


class Run:
    """Learning of one window: the layers, what goes in and what should come out.

    Args:
        part: which decoder layers, masked by `groups` in `linears`.
        inputs: of the first of them; the `training` first sequences to learn on, the rest held out.
        generator: of the order of the sequences, and of all else that is drawn: one state resumes it.
    """

    def __init__(
        self,
        setup: Setup,
        part: range,
        inputs: DecoderInputs,
        target: Target,
        training: int,
        groups: LearnedGroups | GuidedGroups,
        linears: list[dict[str, list[MaskedLinear]]],
        generator: torch.Generator,
        state: State,
    ) -> None:
        self.setup, self.config, self.part, self.inputs, self.target, self.groups = setup, setup.config, part, inputs, target, groups
        self.ranks = setup.ranks
        self.layers = [setup.layers[index] for index in part]
        self.training, self.generator, self.state = training, generator, state
        rows = torch.arange(len(target.hidden))
        self.held_out = rows[training:] if training < len(rows) else rows
        self.steps_per_epoch = math.ceil(training / self.config.batch_size)
        self.total_steps = self.config.epochs * self.steps_per_epoch
        self.learner = self._learner(linears)

    def learn(self, history: list[EpochRecord], on_epoch: Callable[[EpochRecord], None]) -> tuple[list[LayerPermutations], str | None]:
        """Train, add to the history, and return the best permutations and why learning stopped early, if it did."""
        best, stopped = self._restore(), None
        done = [record for record in history if record.window == self.state.window]

        def close_epoch(epoch: int, training_loss: float | None, temperature: float) -> None:
            nonlocal best
            held_out_loss = self._held_out_loss(temperature, f"after epoch {epoch}")
            if not math.isfinite(held_out_loss):
                raise LearningError(f"the held-out loss is {held_out_loss} after epoch {epoch}{self._first_broken_layer(self.held_out)}")
            is_best = not done or held_out_loss < min(record.held_out_loss for record in done)
            if is_best:
                best = self.groups.permutations()
            orders = [order for layer in self.groups.permutations() for order in layer.values()]
            self.ranks.check_same(f"the permutations after epoch {epoch}", [permutation.order for permutation in orders])
            done.append(EpochRecord(epoch, training_loss, held_out_loss, temperature, is_best, self.state.window))
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
                for rows in batches(torch.randperm(self.training, generator=self.generator).split(self.config.batch_size), f"epoch {epoch}"):
                    losses.append(self._step(rows, (epoch - 1) * self.steps_per_epoch + len(losses), epoch))
                self._end_epoch(epoch)
                close_epoch(epoch, float(torch.stack(losses).mean()), self._temperature(epoch * self.steps_per_epoch - 1))
        except LearningError as error:
            if not done:
                raise
            last = done[-1]
            stopped = f"{error}; last good state: epoch {last.epoch}, held-out loss {last.held_out_loss:.6g}. "
            stopped += f"{'Raise curvature' if self.config.optimizer == 'guided' else 'Lower learning_rate'}, or load the model in float32"
        return best, stopped

    def _learner(self, linears: list[dict[str, list[MaskedLinear]]]) -> LogitLearner | GuidedLearner:
        if isinstance(self.groups, LearnedGroups):
            return LogitLearner(self.groups, self.config, self.config.rate(self.setup.score), self.total_steps, self.ranks)
        if self.config.refit:
            refit_layers(linears, (self.setup.statistics[index] for index in self.part))
        curvature = self._curvature(linears)
        return GuidedLearner(self.groups, linears, self.setup.statistics, self.part, curvature, self.config, self.generator, self.ranks)

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

        handles = [linear.register_forward_hook(watch) for linear in flat]
        try:
            for name, weight in self.config.objectives.items():
                for rows in torch.arange(self.training).split(self.config.batch_size):
                    share = self.ranks.share(rows)
                    with self._precision():
                        *_, output = self._hidden(share.rows.to(self.target.hidden.device), wants_gradient=True)
                        if name in LOGIT_OBJECTIVES:
                            output = finish(self.setup.model, self.setup.adapter, output)
                    if not all(self.ranks.all([is_finite(output)])):
                        return found  # the loss of the start is not finite either, and says so
                    probe = curvature_probe(name, output, generator, share.first, len(rows))
                    (probe * (weight**0.5 if share.weight else 0.0)).backward()
        finally:
            for handle in handles:
                handle.remove()
        return {linear: self.ranks.sum(curvature) for linear, curvature in found.items()}

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
        share = self.ranks.share(rows)
        own = self._distance(share.rows) * share.weight
        loss = self.ranks.sum(own.detach().clone())
        if not loss.isfinite():
            raise LearningError(f"the loss is {loss.item()} {where}{self._first_broken_layer(rows)}")
        self.learner.weigh(own, len(rows) / self.training).backward()
        self.learner.end_batch()
        return loss

    def _end_epoch(self, epoch: int) -> None:
        try:
            self.learner.end_epoch((epoch - 1) / self.config.epochs)
        except ValueError as error:  # of the gradients
            raise LearningError(f"{error} at the end of epoch {epoch}") from error

    def _prepare(self, temperature: float, where: str, **options: Any) -> None:
        try:
            self.learner.prepare(temperature, **options)
        except ValueError as error:  # of the assignment
            raise LearningError(f"the logits of the permutations are no longer finite {where} ({error})") from error

    @torch.no_grad()
    def _held_out_loss(self, temperature: float, where: str) -> float:
        self._prepare(temperature, where, hard=True)
        batches = [(self.ranks.share(rows), len(rows)) for rows in self.held_out.split(self.config.batch_size)]
        return float(self.ranks.sum(sum(self._distance(share.rows) * share.weight * count for share, count in batches)) / len(self.held_out))

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

    def _hidden(self, rows: Tensor, *, wants_gradient: bool = False) -> Iterator[Tensor]:
        """Yield the hidden states after every layer; on request all that is computed has a gradient, as if the inputs learned."""
        hidden = self.inputs.hidden[rows].requires_grad_(wants_gradient)
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
            for batch in rows.to(self.target.hidden.device).split(self.config.batch_size):
                for index, hidden in zip(self.part, self._hidden(batch), strict=True):
                    if not is_finite(hidden):
                        return f", first in {self.setup.adapter.layer_path(index)}"
        return ", though all hidden states are finite"

    def _save(self, history: list[EpochRecord], best: list[LayerPermutations]) -> None:
        self.state.history = [asdict(record) for record in history]
        self.state.running = {"learner": self.learner.state(), "generator": self.generator.get_state(), "best": orders_of(best)}
        self.state.write()

    def _restore(self) -> list[LayerPermutations]:
        """Take the saved state of this window up, if there is one, and return its best permutations."""
        running = self.state.running
        if running is None:
            return []
        self.learner.restore(running["learner"])
        self.generator.set_state(running["generator"])
        return [{name: Permutation(order) for name, order in layer.items()} for layer in running["best"]]
