"""Which linear groups share an order of their channels, and find it: every group its own, or orders that fold away.

A shared order moves `width` channels. Each of its members is a linear group, or the part of one that moves alike: under
grouped-query attention the channels of all query heads that read one key-value head.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from permllm.calibration.statistics import LayerStats
from permllm.lookup import lookup
from permllm.models.adapter import Heads, ModelAdapter
from permllm.permutation.permutation import Permutation
from permllm.permutation.search import Problem
from permllm.pruning.metrics import PRUNING_METRICS
from permllm.pruning.permutations import PERMUTATIONS, LayerPermutations
from permllm.sparsity.pattern import NMPattern


@dataclass(frozen=True)
class Member:
    """A linear group of a decoder layer that takes part in a shared order.

    Attributes:
        channels: (width,) which of the group's channels move; None for all of them.
    """

    layer: int
    group: str
    channels: Tensor | None = None

    def take(self, tensor: Tensor, *dims: int) -> Tensor:
        """Return the member's channels of a tensor, along some dimensions."""
        if self.channels is None:
            return tensor
        for dim in dims:
            tensor = tensor.index_select(dim, self.channels.to(tensor.device))
        return tensor

    def own_order(self, order: Tensor) -> Tensor:
        """Return the shared order, (width,), in which the group's order moves the member's channels."""
        if self.channels is None:
            return order
        channels = self.channels.to(order.device)
        places = torch.empty_like(order).index_copy_(0, channels, torch.arange(len(channels), device=order.device))
        return places[order[channels]]

    def group_order(self, own: Tensor, order: Tensor) -> Tensor:
        """Return the group's order, of which the member's channels follow a shared order; the others are as in `order`."""
        if self.channels is None:
            return own
        channels = self.channels.to(own.device)
        return order.index_copy(0, channels, channels[own])


@dataclass(frozen=True)
class SharedOrder:
    """An order that several members take.

    Attributes:
        width: how many channels it moves.
        block: channels stay inside their run of so many; None for no such bound.
    """

    members: tuple[Member, ...]
    width: int
    block: int | None = None


def free_layout(adapter: ModelAdapter, widths: Sequence[Mapping[str, int]], heads: Heads) -> list[SharedOrder]:
    """Give every linear group an order of its own; what cannot be folded is gathered at run time."""
    return [SharedOrder((Member(index, name),), width) for index, layer in enumerate(widths) for name, width in layer.items()]


def foldable_layout(adapter: ModelAdapter, widths: Sequence[Mapping[str, int]], heads: Heads) -> list[SharedOrder]:
    """Give one order to all that read the residual stream, and orders inside heads to what reads the attention.

    Such orders fold into the neighbouring weights: the pruned model is one of the stock architecture.
    """
    readers = {name for name, group in adapter.linear_groups.items() if not group.writers}
    residual = [Member(index, name) for index, layer in enumerate(widths) for name in layer if name in readers]
    shared = [SharedOrder(tuple(residual), widths[0][residual[0].group])]
    for index, layer in enumerate(widths):
        for name, width in layer.items():
            if name == adapter.attention.group:
                size, sharing = width // heads.query, heads.query // heads.key_value
                channels = torch.arange(width).view(heads.key_value, sharing, size)
                members = tuple(Member(index, name, channels[:, query].flatten()) for query in range(sharing))
                shared.append(SharedOrder(members if sharing > 1 else (Member(index, name),), width // sharing, size))
            elif name not in readers:
                shared.append(SharedOrder((Member(index, name),), width))
    return shared


Layout = Callable[[ModelAdapter, Sequence[Mapping[str, int]], Heads], list[SharedOrder]]
LAYOUTS: dict[str, Layout] = {"free": free_layout, "foldable": foldable_layout}


def shared_orders(name: str, adapter: ModelAdapter, widths: Sequence[Mapping[str, int]], heads: Heads, pattern: NMPattern) -> list[SharedOrder]:
    """Return the shared orders of a layout.

    Args:
        widths: of the input of every linear group, by decoder layer.

    Raises:
        ValueError: if M does not divide the channels that have to stay together.
    """
    shared = lookup(LAYOUTS, name, "layout")(adapter, widths, heads)
    misfits = {order.block for order in shared if order.block is not None and order.block % pattern.group}
    if misfits:
        raise ValueError(
            f"layout {name} keeps channels inside heads of {', '.join(map(str, misfits))}, which groups of {pattern.group} do not divide; "
            f"choose layout free, or a pattern whose M divides them"
        )
    return shared


def group_widths(weights: Iterable[Mapping[str, Tensor]], adapter: ModelAdapter) -> list[dict[str, int]]:
    """Return the input channels of every linear group of every decoder layer."""
    return [{name: layer[group.readers[0]].shape[1] for name, group in adapter.linear_groups.items()} for layer in weights]


def spread(shared: Sequence[SharedOrder], orders: Sequence[Permutation], widths: Sequence[Mapping[str, int]]) -> list[LayerPermutations]:
    """Return the order of every linear group from those that they share."""
    layers = [{name: torch.arange(width) for name, width in layer.items()} for layer in widths]
    for one, order in zip(shared, orders, strict=True):
        for member in one.members:
            layers[member.layer][member.group] = member.group_order(order.order.cpu(), layers[member.layer][member.group])
    return [{name: Permutation(order.clone()) for name, order in layer.items()} for layer in layers]


@torch.no_grad()
def find_shared_order(
    permutation: str,
    score: str,
    shared: SharedOrder,
    weights: Sequence[Mapping[str, Tensor]],
    adapter: ModelAdapter,
    statistics: Callable[[int], LayerStats],
    pattern: NMPattern,
    generator: torch.Generator,
) -> Permutation:
    """Find a shared order without learning.

    Args:
        permutation: an entry of `PERMUTATIONS`.
        score: the pruning metric.
        weights: of every decoder layer, by path below it.
        statistics: of a decoder layer, by its number. What all members read is in memory at once.
    """
    metric = lookup(PRUNING_METRICS, score, "score")

    def problem(member: Member) -> Problem:
        stats = statistics(member.layer)[member.group]
        linears = [weights[member.layer][path] for path in adapter.linear_groups[member.group].readers]
        scores = torch.cat([metric(weight, stats).of(weight) for weight in linears])
        return Problem(member.take(torch.cat(linears), 1), member.take(scores, 1), member.take(stats.gram, 0, 1))

    return lookup(PERMUTATIONS, permutation, "permutation")([problem(member) for member in shared.members], pattern, shared.block, generator)


def find_permutations(
    layout: str,
    permutation: str,
    score: str,
    weights: Sequence[Mapping[str, Tensor]],
    adapter: ModelAdapter,
    heads: Heads,
    statistics: Sequence[LayerStats],
    pattern: NMPattern,
    generator: torch.Generator,
) -> list[LayerPermutations]:
    """Find the orders of a whole model without learning. Arguments as for `shared_orders` and `find_shared_order`."""
    widths, stats = group_widths(weights, adapter), lru_cache(maxsize=1)(statistics.__getitem__)
    shared = shared_orders(layout, adapter, widths, heads, pattern)
    orders = [find_shared_order(permutation, score, one, weights, adapter, stats, pattern, generator) for one in shared]
    return spread(shared, orders, widths)
