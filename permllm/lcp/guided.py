"""Learn permutations without logits: re-partition groups of channels where the loss's own gradient says that it falls.

A re-partition changes what the mask removes, E, by D. With Q the gradient of the loss with respect to the masked weight
and f_i the curvature of the loss in output i, averaged over the tokens, the loss changes by about

    -<Q, D> + 1/2 sum_i f_i (D G D^T)_ii

which is the error of `permllm.permutation.search` for rows scaled by sqrt(f_i / 2) with another pull. The Gram matrix G
knows all calibration tokens: it holds back moves that the gradient of a few sequences only seems to want.

With `refit` the loss is that of refitted weights, and a removed weight's change spreads over those that adapt: see `permllm.lcp.refit`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from permllm.calibration.statistics import ActivationStats, LayerStats
from permllm.lcp.distributed import ALONE, Ranks, kept_rows
from permllm.lcp.group_permutations import GroupPermutation
from permllm.lcp.masked_linear import MaskedLinear
from permllm.lcp.recipes import LearnConfig
from permllm.lcp.refit import refit_layers, removal_costs
from permllm.models.adapter import is_finite
from permllm.permutation.permutation import Permutation
from permllm.permutation.search import Moves, Partition, best_moves, random_pairs, ranks, regrouped, single_threaded
from permllm.pruning.layout import Member, SharedOrder
from permllm.pruning.metrics import Score
from permllm.pruning.permutations import LayerPermutations
from permllm.sparsity.pattern import NMPattern

FLATTEST = 1e-12  # of a linear's mean curvature: rows that the loss does not see are no reason to divide by zero

MaskedGroups = Sequence[Mapping[str, Sequence[MaskedLinear]]]  # by decoder layer and name of the linear group


class GuidedGroups:
    """Permutations of the linear groups of some decoder layers that learn by re-partitions.

    Args:
        starts: of every linear group of every layer.
        shared: which of them learn one order together.
        ranks: each of which weighs moves on its rows of the weights; what they find is summed.

    Attributes:
        layers: the permutations by layer and name of the linear group.
    """

    def __init__(
        self,
        starts: Sequence[LayerPermutations],
        shared: Sequence[SharedOrder],
        pattern: NMPattern,
        config: LearnConfig,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        self.shared, self.pattern, self.config, self.ranks = shared, pattern, config, ranks
        self._score_ranks: dict[MaskedLinear, Tensor] = {}  # of a group's scores, by its first linear: they do not change
        self.layers = [{name: GroupPermutation(start.canonical(pattern.group).order.to(device)) for name, start in layer.items()} for layer in starts]

    def permutations(self) -> list[LayerPermutations]:
        """Return the permutations as they are now."""
        return [{name: Permutation(group.order) for name, group in layer.items()} for layer in self.layers]

    def set(self, permutations: Iterable[LayerPermutations]) -> None:
        """Take other permutations."""
        for layer, given in zip(self.layers, permutations, strict=True):
            for name, group in layer.items():
                group.start = given[name].order.to(group.start.device)

    @single_threaded()
    @torch.no_grad()
    def regroup(
        self,
        linears: MaskedGroups,
        statistics: Iterable[LayerStats],
        curvature: Mapping[MaskedLinear, Tensor],
        share: float,
        generator: torch.Generator,
    ) -> int:
        """Make the moves that lower the loss most, and return how many.

        Args:
            linears: with the gradients that they collected.
            statistics: of the same decoder layers.
            curvature: of the loss in the outputs of every linear, (out,).
            share: how many of the pairs tried may move, 0..1.

        Raises:
            ValueError: if a gradient is not finite.
        """
        groups = [(name, group) for layer in linears for name, group in layer.items()]
        finite = self.ranks.all([all(is_finite(linear.gradient) for linear in group) for _, group in groups])
        if not all(finite):
            raise ValueError(f"the gradients of the masked weights are no longer finite, first in a group {groups[finite.index(False)][0]}")
        pairs = [random_pairs(one.width, one.block, self.pattern, generator) for one in self.shared]
        weighed: list[list[Tensor]] = [[] for _ in self.shared]  # errors of all candidates and of the groups as they are, summed over members
        for layer, stats in enumerate(statistics):
            for number, member in ((number, member) for number, one in enumerate(self.shared) for member in one.members if member.layer == layer):
                found = self._partition(member, linears[layer][member.group], stats[member.group], curvature).weigh(pairs[number])
                weighed[number] = [sum(both) for both in zip(weighed[number], found, strict=True)] if weighed[number] else list(found)
        weighed = [[self.ranks.sum(errors) for errors in both] for both in weighed]
        moves = [best_moves(*arguments) for arguments in zip(pairs, weighed, strict=True)]
        gains = torch.cat([move.gain for move in moves])
        least = max(float(gains.topk(max(round(share * len(gains)), 1)).values[-1]), torch.finfo(gains.dtype).tiny)
        for one, move in zip(self.shared, moves, strict=True):
            self._move(one, move[move.gain >= least])
        return int((gains >= least).sum())

    def _move(self, shared: SharedOrder, moves: Moves) -> None:
        first = shared.members[0]
        groups = first.own_order(self.layers[first.layer][first.group].start).view(-1, self.pattern.group).sort(dim=1).values
        order = regrouped(groups, moves).flatten()
        for member in shared.members:
            group = self.layers[member.layer][member.group]
            group.start = member.group_order(order, group.start)

    def _partition(
        self, member: Member, linears: Sequence[MaskedLinear], stats: ActivationStats, curvature: Mapping[MaskedLinear, Tensor]
    ) -> Partition:
        """Return the groups of one member, with the loss as their error, on the rows that this rank keeps."""
        weights = [kept_rows(linear.original.weight) for linear in linears]
        rows = [self.ranks.rows(linear.original.out_features) for linear in linears]
        if linears[0] not in self._score_ranks:
            scores = [_score_of_rows(linear.rule.score, part).of(weight) for linear, part, weight in zip(linears, rows, weights, strict=True)]
            found = ranks(torch.cat(scores))
            self._score_ranks[linears[0]] = found.short() if len(found) <= torch.iinfo(torch.int16).max else found  # kept in half the memory
        bend = torch.cat([curvature[linear] for linear in linears]) * (self.config.curvature / 2)
        scale = bend.clamp(min=max(float(bend.mean()) * FLATTEST, torch.finfo(torch.float32).tiny)).sqrt()
        scale = torch.cat([own[part] for own, part in zip(scale.split([linear.original.out_features for linear in linears]), rows, strict=True)])
        weight, gradient = torch.cat(weights), torch.cat([linear.gradient for linear in linears], dim=1)  # (out, in) and (in, out)
        order, rank = member.own_order(self.layers[member.layer][member.group].start), member.take(self._score_ranks[linears[0]], 0).int()
        if not self.config.refit:
            pull = member.take(gradient, 0) / (-2 * scale)
            return Partition(member.take(weight, 1).float() * scale[:, None], rank, member.take(stats.gram, 0, 1), self.pattern, order, pull)
        target, cost, stiffness = removal_costs(weight, gradient, stats)
        stiffness = member.take(stiffness, 0)
        partition = Partition(
            member.take(target, 1) * scale[:, None], rank, stiffness.diag(), self.pattern, order, member.take(cost, 0) / (2 * scale)
        )
        partition.pull += stiffness[:, None] * partition.removed  # what is removed now is no part of the cost of removing it
        return partition


def _score_of_rows(score: Score, rows: slice) -> Score:
    return score if score.row is None else replace(score, row=score.row[rows])


class GuidedLearner:
    """Moves groups of channels once an epoch, by the gradient over all training sequences.

    Args:
        statistics: of all decoder layers, of which those of `part` learn.
        curvature: see `GuidedGroups.regroup`.
        ranks: that run parts of every batch.
    """

    def __init__(
        self,
        groups: GuidedGroups,
        linears: MaskedGroups,
        statistics: Sequence[LayerStats],
        part: range,
        curvature: Mapping[MaskedLinear, Tensor],
        config: LearnConfig,
        generator: torch.Generator,
        ranks: Ranks = ALONE,
    ) -> None:
        self.groups, self.linears, self.statistics, self.part, self.curvature = groups, linears, statistics, part, curvature
        self.config, self.generator, self.ranks = config, generator, ranks
        self.start_epoch()

    def start_epoch(self) -> None:
        """Collect a new gradient."""
        for linear in self._all():
            linear.collect_gradient(self.ranks)

    def prepare(self, temperature: float, *, hard: bool = False, noise: float = 0.0) -> None:
        """Do nothing: the permutations are hard, and change between epochs only."""

    def weigh(self, loss: Tensor, share: float) -> Tensor:
        """Return the batch's share of the loss over all sequences."""
        return loss * share

    def end_batch(self) -> None:
        """Do nothing."""

    def end_epoch(self, progress: float) -> None:
        """Move."""
        self.groups.regroup(self.linears, self._statistics(), self.curvature, self.config.moves * (1 - progress), self.generator)
        self._refit()
        self.start_epoch()

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"orders": [{name: group.start.cpu() for name, group in layer.items()} for layer in self.groups.layers]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take a saved state up."""
        self.groups.set([{name: Permutation(order) for name, order in layer.items()} for layer in state["orders"]])
        self._refit()

    def _refit(self) -> None:
        if self.config.refit:
            refit_layers(self.linears, self._statistics())

    def _statistics(self) -> Iterable[LayerStats]:
        return (self.statistics[index] for index in self.part)  # read one layer at a time

    def _all(self) -> Iterable[MaskedLinear]:
        return (linear for layer in self.linears for group in layer.values() for linear in group)
