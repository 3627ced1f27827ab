"""Gradient-free search for a channel permutation on the true output error of the pruned linears.

Groups of M channels are paired off at random; every pair re-partitions its 2M channels in the way that lowers
||(W - M*W) X||^2 most. Only the columns of moved channels change, so a candidate costs (out, 2M) through the Gram matrix.

Legend: W (out, in) weight; E = W - M*W what the mask removes; G (in, in) Gram matrix of the input; the error is
tr(E G E^T), and changing E by D changes it by 2 <D, E G> + <D G, D>; E G is called the pull.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from permllm.permutation.permutation import Permutation
from permllm.sparsity.mask import nm_mask
from permllm.sparsity.pattern import NMPattern

MOST_PARTITIONS = 64  # re-partitions of two groups that are tried exhaustively: 35 for M = 4; larger groups swap channels
CANDIDATE_BYTES = 2**21  # of the candidates that are judged at once, unless those of one pair take more: they should fit a core's cache
SMALLEST_GAIN = 1e-7  # of the error at the start: smaller ones are rounding


@dataclass(frozen=True)
class Problem:
    """What an order of channels is judged on: linears that read them, and their statistics.

    Attributes:
        weight: (out, in), the rows of all linears stacked; judged in float32.
        score: (out, in), what the mask goes by.
        gram: (in, in) of the channels, at any scale.

    Raises:
        ValueError: if the shapes do not fit each other.
    """

    weight: Tensor
    score: Tensor
    gram: Tensor

    def __post_init__(self) -> None:
        channels = self.weight.shape[1]
        if self.score.shape != self.weight.shape or self.gram.shape != (channels, channels):
            raise ValueError(
                f"a search needs score {tuple(self.weight.shape)} and a Gram matrix ({channels}, {channels}), as the weight has, "
                f"not {tuple(self.score.shape)} and {tuple(self.gram.shape)}"
            )


def search_permutation(
    problems: Sequence[Problem], pattern: NMPattern, start: Permutation, sweeps: int, generator: torch.Generator, block: int | None = None
) -> Permutation:
    """Find an order of input channels under which the N:M mask changes the output less.

    Args:
        problems: of which the order is to lower the sum of the output errors, each relative to its output if there are
            several; all with the same channels.
        start: where the search begins, for example the heuristic permutation.
        sweeps: how often every pair of groups meets at most; the search ends early at a local optimum.
        generator: of the pairing.
        block: channels stay inside their run of so many, as those of a head have to; None for no such bound.

    Returns:
        The canonical form of the order found; its error is never above that of `start` in canonical form.

    Raises:
        ValueError: if M does not divide the channels, the shapes do not fit each other, or a Gram matrix is not finite or
            holds no signal.

    Source: neighbourhood of Pool & Yu (NeurIPS 2021), judged by the true error instead of the retained score.
    """
    channels = len(start)
    pattern.check_widths({"the weight": channels})
    if misfits := [problem.weight.shape[1] for problem in problems if problem.weight.shape[1] != channels]:
        raise ValueError(f"a search needs a start of as many channels as the weight has, not {channels} for {', '.join(map(str, misfits))}")
    for gram in (problem.gram for problem in problems):
        if not (gram.isfinite().all() and gram.diagonal().min() >= 0 and gram.diagonal().max() > 0):
            raise ValueError("a search needs a finite Gram matrix whose diagonal is not all zero; gather the statistics again with `calibrate`")
    with single_threaded():
        partitions = [_partition(problem, pattern, start, is_relative=len(problems) > 1) for problem in problems]
        start_error = sum(partition.error() for partition in partitions)
        for _ in range(sweeps):
            moved = [improve(partitions, pairs, SMALLEST_GAIN * start_error) for pairs in _pairings(channels, block, pattern, generator)]
            if not any(moved):
                break
        end_error = sum(partition.error() for partition in partitions)
        found = Permutation(partitions[0].groups.flatten()) if end_error <= start_error else start
        return found.canonical(pattern.group)


def _partition(problem: Problem, pattern: NMPattern, start: Permutation, is_relative: bool) -> "Partition":
    weight, gram = problem.weight.float(), problem.gram.float()
    if is_relative:
        weight = weight / ((weight @ gram) * weight).sum().clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    return Partition(weight, ranks(problem.score), gram, pattern, start.order.to(weight.device))


@contextmanager
def single_threaded() -> Iterator[None]:
    """Run the many small operations of a search on one CPU thread: handing them to a second costs five times as long (12.8 against 2.1 s)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def ranks(score: Tensor) -> Tensor:
    """Return the place of every channel in its row of a score, (out, in), best first, as (in, out): all that a mask goes by."""
    best_first = score.argsort(dim=1, descending=True, stable=True)  # stable: of equal scores the mask keeps the lower channel
    return best_first.argsort(dim=1).t().int().contiguous()


@dataclass(frozen=True)
class Moves:
    """For pairs of groups, the best re-partition of their channels.

    Attributes:
        pairs: (moves, 2) numbers of groups, every group at most once.
        gain: (moves,) by how much the error falls if this pair alone moves.
        candidate: (moves,) which arrangement of the 2M channels.
    """

    pairs: Tensor
    gain: Tensor
    candidate: Tensor

    def __getitem__(self, chosen: Tensor) -> "Moves":
        return Moves(self.pairs[chosen], self.gain[chosen], self.candidate[chosen])


class Partition:
    """Channels in groups of M, and what the masks remove from a weight.

    Args:
        weight: (out, in).
        rank: (in, out), see `ranks`.
        gram: (in, in).
        order: (in,), the groups are its runs of M channels.
        pull: (in, out), by channel, half the gradient of the error with respect to E; None for that of tr(E G E^T).
            Another loss gives its own.

    Attributes:
        groups: (groups, M) channels, sorted in each group.
    """

    def __init__(self, weight: Tensor, rank: Tensor, gram: Tensor, pattern: NMPattern, order: Tensor, pull: Tensor | None = None) -> None:
        self.weight, self.rank, self.gram, self.pattern = weight.t().contiguous(), rank, gram, pattern  # by channel too
        self.groups = order.view(-1, pattern.group).sort(dim=1).values
        self.removed = torch.empty_like(self.weight)
        self.removed[self.groups] = self._removed_from(self.groups)
        self.pull = gram @ self.removed if pull is None else pull  # (E G)^T
        candidates = _candidates(pattern.group)
        self.candidates = torch.tensor(candidates, device=weight.device)  # (candidates, 2M)
        self.contests = torch.tensor([_contests(candidate) for candidate in candidates], device=weight.device).permute(2, 0, 1).flatten(1)
        at_once = max(CANDIDATE_BYTES // (4 * self.candidates.numel() * len(weight)), 1)  # pairs
        # kept: allocating them anew for every part can cost more than their use
        self.buffers = torch.empty(2, at_once, *self.candidates.shape, len(weight), device=weight.device)

    def error(self) -> float:
        """Return tr(E G E^T), summed in float64."""
        return float(((self.gram @ self.removed) * self.removed).sum(dtype=torch.float64))

    def weigh(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the errors of all re-partitions of pairs of groups, (pairs, candidates), and as they are, (pairs,).

        Of both what no candidate changes is left out.
        """
        channels = self.groups[pairs.to(self.groups.device)].flatten(1)
        weight, rank, old, pull = (_rows(tensor, channels) for tensor in (self.weight, self.rank, self.removed, self.pull))  # (pairs, 2M, out)
        gram = self.gram[channels[:, :, None], channels[:, None, :]]
        inside = gram @ old
        outside = pull - inside  # of the pull, what comes from the channels of other pairs
        parts = zip(*(tensor.split(len(self.buffers[0])) for tensor in (weight, rank, gram, outside)), strict=True)
        return torch.cat([self._candidate_errors(*part) for part in parts]), ((inside + 2 * outside) * old).sum((1, 2))

    def change(self, arranged: Tensor) -> Tensor:
        """Return D, (moves, 2M, out), of moves after which the channels of their two groups are `arranged`, (moves, 2M)."""
        return self._removed_from(arranged) - _rows(self.removed, arranged)

    def meeting(self, arranged: Tensor, change: Tensor) -> Tensor:
        """Return by how much the errors of every two moves differ from their sum if both are made, (moves, moves)."""
        channels, flat = arranged.flatten(), change.flatten(0, 1)
        meeting = 2 * (flat @ flat.t()) * self.gram[channels][:, channels]
        return meeting.view(len(arranged), arranged.shape[1], len(arranged), arranged.shape[1]).sum((1, 3))

    def move(self, groups: Tensor, arranged: Tensor, change: Tensor) -> None:
        """Take the groups after some moves, which change E by `change`."""
        moved, flat = arranged.flatten(), change.flatten(0, 1)
        self.removed.index_add_(0, moved, flat)
        self.pull += self.gram.index_select(1, moved) @ flat
        self.groups = groups

    def _removed_from(self, channels: Tensor) -> Tensor:
        """Return what the mask removes, (..., out), of channels that lie in groups of M."""
        kept = nm_mask(-self.rank[channels.flatten()], self.pattern, dim=0)
        return self.weight[channels.flatten()].masked_fill_(kept, 0.0).unflatten(0, channels.shape)

    def _candidate_errors(self, weight: Tensor, rank: Tensor, gram: Tensor, outside: Tensor) -> Tensor:
        """Return the error of every candidate of every pair, (pairs, candidates), less what no candidate changes."""
        beats = (rank[:, :, None] < rank[:, None]).flatten(1, 2).view(torch.int8)  # place i beats place j at 2M i + j
        losses = beats.index_select(1, self.contests[0])
        for contest in self.contests[1:]:
            losses += beats.index_select(1, contest)
        new, pull = self.buffers[:, : len(weight)]  # (pairs, candidates, 2M, out)
        # ge_ and copy_: on a CPU, comparing into bool and multiplying by bool take several times longer
        new.copy_(losses.ge_(self.pattern.kept).view_as(new)).mul_(weight[:, None])
        torch.matmul(gram[:, None], new, out=pull)
        return pull.add_(outside[:, None], alpha=2).mul_(new).sum((2, 3))


def propose(partitions: Sequence[Partition], pairs: Tensor) -> Moves:
    """Find for every pair of groups, (pairs, 2), the re-partition that lowers the sum of the errors most.

    Args:
        partitions: of the same channels into the same groups.
    """
    weighed = zip(*(partition.weigh(pairs) for partition in partitions), strict=True)
    return best_moves(pairs, [sum(values[1:], values[0]) for values in weighed])


def best_moves(pairs: Tensor, weighed: Sequence[Tensor]) -> Moves:
    """Choose the best candidate of every pair from what `Partition.weigh` says, summed over partitions."""
    errors, old = weighed
    error, candidate = errors.min(dim=1)
    return Moves(pairs.to(error.device), old - error, candidate)


def improve(partitions: Sequence[Partition], pairs: Tensor, smallest_gain: float) -> int:
    """Re-partition the pairs of groups, (pairs, 2), for which the sum of the errors falls; return how many did.

    Args:
        partitions: of the same channels into the same groups.
    """
    moves = propose(partitions, pairs)
    moves = moves[moves.gain.argsort(descending=True)]
    moves = moves[moves.gain > smallest_gain]
    groups = partitions[0].groups
    arranged = _arranged(groups, moves)
    changes = [partition.change(arranged) for partition in partitions]
    meetings = [partition.meeting(arranged, change) for partition, change in zip(partitions, changes, strict=True)]
    chosen = _compatible(moves.gain, sum(meetings[1:], meetings[0]), smallest_gain)
    after = regrouped(groups, moves[chosen])
    for partition, change in zip(partitions, changes, strict=True):
        partition.move(after, arranged[chosen], change[chosen])
    return len(chosen)


def _compatible(gain: Tensor, meeting: Tensor, smallest_gain: float) -> Tensor:
    """Choose moves, in the order given, that together lower the error: the changes of two pairs meet in the Gram matrix."""
    meeting, together, accepted = meeting.double().cpu(), gain.double().cpu(), []
    for move in range(len(gain)):
        if together[move] > smallest_gain:
            accepted.append(move)
            together -= meeting[move]
    return torch.tensor(accepted, dtype=torch.int64, device=gain.device)


def regrouped(groups: Tensor, moves: Moves) -> Tensor:
    """Return the groups, (groups, M), after the moves."""
    after = groups.clone()
    after[moves.pairs.flatten()] = _arranged(groups, moves).view(-1, groups.shape[1]).sort(dim=1).values
    return after


def random_pairs(channels: int, block: int | None, pattern: NMPattern, generator: torch.Generator) -> Tensor:
    """Pair the groups of every block off at random, (pairs, 2); of an odd number of groups one is left out.

    Args:
        block: as for `search_permutation`.
    """
    inside = (block or channels) // pattern.group
    firsts = range(0, channels // pattern.group, inside)
    return torch.cat([torch.randperm(inside, generator=generator)[: inside // 2 * 2].view(-1, 2) + first for first in firsts])


def _arranged(groups: Tensor, moves: Moves) -> Tensor:
    """Return the channels of every pair after its move, (moves, 2M)."""
    candidates = torch.tensor(_candidates(groups.shape[1]), device=groups.device)
    return groups[moves.pairs].flatten(1).gather(1, candidates[moves.candidate])


def _rows(tensor: Tensor, channels: Tensor) -> Tensor:
    return tensor.index_select(0, channels.flatten()).unflatten(0, channels.shape)


def _candidates(group: int) -> list[list[int]]:
    """List arrangements of 2M places, the first M of which form the first group: all partitions, or all swaps."""
    if math.comb(2 * group, group) // 2 <= MOST_PARTITIONS:
        firsts = [(0, *rest) for rest in combinations(range(1, 2 * group), group - 1)]
        return [[*first, *sorted(set(range(2 * group)) - set(first))] for first in firsts]
    swaps = [list(range(2 * group)) for _ in range(group * group)]
    for number, swap in enumerate(swaps):
        left, right = number // group, group + number % group
        swap[left], swap[right] = right, left
    return swaps


def _contests(arrangement: list[int]) -> list[list[int]]:
    """List for every place the contests with the others of its group: that of rival i against place j is number 2M i + j."""
    places = len(arrangement)
    halves = arrangement[: places // 2], arrangement[places // 2 :]
    rivals = {place: [rival for rival in half if rival != place] for half in halves for place in half}
    return [[places * rival + place for rival in rivals[place]] for place in range(places)]


def _pairings(channels: int, block: int | None, pattern: NMPattern, generator: torch.Generator) -> list[Tensor]:
    """Return a round-robin tournament: in every round each group meets another of its block, in all rounds every other once."""
    inside = (block or channels) // pattern.group
    tournaments = [_tournament(inside, first, generator) for first in range(0, channels // pattern.group, inside)]
    return [torch.cat(rounds) for rounds in zip(*tournaments, strict=True)]


def _tournament(groups: int, first: int, generator: torch.Generator) -> list[Tensor]:
    names = torch.randperm(groups, generator=generator) + first
    ring = torch.arange(groups + groups % 2)
    rounds = []
    for _ in range(len(ring) - 1):
        pairs = torch.stack([ring[: len(ring) // 2], ring.flip(0)[: len(ring) // 2]], dim=1)
        rounds.append(names[pairs[(pairs < groups).all(1)]])
        ring = torch.cat([ring[:1], ring[1:].roll(1)])
    return rounds
