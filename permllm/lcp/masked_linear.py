"""A linear whose N:M mask follows a permutation, and the gradient that the permutation gets from it.

Legend: W (in, out) weight, S (in, out) score, both channels first; P permutation matrix, block-diagonal; M mask in the original order.
Forward: S^ = P^T S, M^ = the N:M mask of S^, M = P M^, y = x (W * M). With D = dL/dM, the straight-through
gradients are dL/dP = D M^^T + S dS^^T, where dS^ pulls P^T D back through the softmax over every group of S^.

Nothing is (in, in) and nothing of the weight's size is kept: scores and masks are computed again where they are
needed, some blocks of channels at a time. Channels come first, so that permuting copies rows and a group's
channels lie apart in memory; `channels_first` gives the frozen weight that layout.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from permllm.lcp.distributed import ALONE, Ranks, is_sharded
from permllm.lcp.group_permutations import GroupPermutation
from permllm.models.adapter import ModelAdapter
from permllm.pruning.metrics import Score
from permllm.sparsity.mask import group_softmax, group_softmax_gradient, nm_mask
from permllm.sparsity.pattern import NMPattern

ENTRIES_AT_ONCE = 2**18  # of the weight on a CPU: what stays in its cache
ENTRIES_AT_ONCE_ON_GPU = 2**24


@dataclass(frozen=True)
class MaskRule:
    """How a linear's mask follows from a permutation.

    Attributes:
        score: of the linear.
        pattern: N:M.
        scale: what scores are divided by before the softmax, a scalar: the gradient then does not depend on their
            absolute size. None for the raw scores, as in the paper.
    """

    score: Score
    pattern: NMPattern
    scale: Tensor | None = None

    def parts(self, group: GroupPermutation, weight: Tensor) -> Iterator["_Part"]:
        """Cut the channels into runs of blocks whose part of the weight, (in, out), is worked on at once."""
        size = self.pattern.group if group.relaxed is None else group.relaxed.shape[1]
        blocks, at_once = len(weight) // size, ENTRIES_AT_ONCE if weight.device.type == "cpu" else ENTRIES_AT_ONCE_ON_GPU
        step = max(at_once // (size * weight.shape[1]), 1)
        return (_Part(self, group, weight, slice(first, min(first + step, blocks)), size) for first in range(0, blocks, step))

    def masked(self, group: GroupPermutation, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return W * M, (in, out)."""
        masked = torch.empty_like(weight, dtype=dtype)
        with torch.autocast(weight.device.type, enabled=False):  # rounded scores would choose other masks
            for part in self.parts(group, weight):
                masked.index_copy_(0, part.channels, part.masked().to(dtype))
        return masked

    def pull_back(self, group: GroupPermutation, weight: Tensor, grad_masked: Tensor) -> Tensor:
        """Return the gradient of the permutation, (blocks, size, size), from that of W * M, (in, out).

        W * M itself takes the place of `grad_masked`: what needs both computes the mask once.
        """
        pulled = []
        for part in self.parts(group, weight):
            pulled.append(part.pull_back(grad_masked))
            grad_masked.index_copy_(0, part.channels, part.masked().to(grad_masked.dtype))
        return torch.cat(pulled)


@dataclass(frozen=True)
class FixedValues:
    """Stands in for a `MaskRule` where the masked weight has values of its own, (in, out), until it gets others."""

    values: Tensor

    def masked(self, group: GroupPermutation, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return them."""
        return self.values.to(dtype)


class _Part:
    """Some blocks of channels: their weights, scores and masks, rows in the order of the slots (hard) or of the start (soft)."""

    def __init__(self, rule: MaskRule, group: GroupPermutation, weight: Tensor, blocks: slice, size: int) -> None:
        self.rule, self.count = rule, blocks.stop - blocks.start
        self.relaxed = group.relaxed.detach()[blocks] if group.is_soft else None
        self.local = None if group.local is None else group.local[blocks]
        self.channels = group.start[blocks.start * size : blocks.stop * size]
        if self.local is not None:
            self.channels = self.channels.view(self.local.shape).gather(1, self.local).flatten()
        self.weight = weight.index_select(0, self.channels)
        self.score = rule.score.by_channel(self.weight, self.channels)
        self.keep = nm_mask(self._to_slots(self.score), rule.pattern, dim=0, dtype=self.score.dtype)

    def masked(self) -> Tensor:
        """Return W * M of these channels."""
        return self.weight * self._from_slots(self.keep)

    def pull_back(self, grad_masked: Tensor) -> Tensor:
        grad_mask = grad_masked.index_select(0, self.channels).to(self.score.dtype).mul_(self.weight)
        score = self.score if self.rule.scale is None else self.score / self.rule.scale
        softmax = group_softmax(self._to_slots(score), self.rule.pattern)
        grad_score = group_softmax_gradient(softmax, self._to_slots(grad_mask), self.rule.pattern)
        product = torch.bmm(self._blocks(grad_mask), self._blocks(self.keep).transpose(1, 2))
        product.baddbmm_(self._blocks(score), self._blocks(grad_score).transpose(1, 2))
        if self.relaxed is not None:
            return product
        return torch.empty_like(product).scatter_(1, self.local[..., None].expand_as(product), product)  # rows back to the block's own order

    def _blocks(self, tensor: Tensor) -> Tensor:
        return tensor.view(self.count, -1, tensor.shape[-1])

    def _to_slots(self, tensor: Tensor) -> Tensor:
        """P^T: hard rows are in their slots already."""
        return tensor if self.relaxed is None else torch.bmm(self.relaxed.transpose(1, 2), self._blocks(tensor)).flatten(0, 1)

    def _from_slots(self, tensor: Tensor) -> Tensor:
        """P: hard rows stay where their weights are."""
        return tensor if self.relaxed is None else torch.bmm(self.relaxed, self._blocks(tensor)).flatten(0, 1)


class MaskedLinearFunction(torch.autograd.Function):
    """y = x (W * M), keeping only x for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        carrier: Tensor | None,
        weight: Tensor,
        rule: "MaskRule | FixedValues",
        group: GroupPermutation,
        collect: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Multiply (..., in) by the masked `weight`, (out, in).

        `carrier` has autograd ask for a gradient: that of the permutation, if it is the group's relaxed value, which takes
        it, and otherwise that of the masked weight, (in, out), which `collect` takes.
        """
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.input_dtype = x.dtype
        x = x.to(dtype)
        ctx.save_for_backward(x, weight)
        ctx.rule, ctx.group, ctx.collect = rule, GroupPermutation(group.start, group.relaxed, group.local), collect
        return torch.matmul(x, rule.masked(group, weight.t(), dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `x` and of the carrier."""
        x, weight = ctx.saved_tensors
        rule, group = ctx.rule, ctx.group
        grad_carrier = masked = None
        if ctx.needs_input_grad[1]:
            grad_carrier = x.flatten(0, -2).t() @ grad.flatten(0, -2)
            if group.relaxed is not None:
                grad_carrier, masked = rule.pull_back(group, weight.t(), grad_carrier), grad_carrier
            else:
                grad_carrier = ctx.collect(grad_carrier)
        if not ctx.needs_input_grad[0]:
            return None, grad_carrier, None, None, None, None
        masked = rule.masked(group, weight.t(), grad.dtype) if masked is None else masked
        return torch.matmul(grad, masked.t()).to(ctx.input_dtype), grad_carrier, None, None, None, None


class MaskedLinear(nn.Module):
    """Stands in for an `nn.Linear` while its permutation learns. The weight is frozen and shared with the original.

    Args:
        original: the linear it replaces.
        rule: how the mask follows from the permutation.
        group: the permutation, shared with the other linears of the group.

    Attributes:
        gradient: of the masked weight, (in, out), at least float32, since `collect_gradient`; of this rank's rows where
            several processes learn.
        refitted: values that take the place of the masked weight; None for none. See `refit`.
    """

    def __init__(self, original: nn.Linear, rule: MaskRule, group: GroupPermutation) -> None:
        super().__init__()
        self.original, self.rule, self.group = original, rule, group
        self.gradient: Tensor | None = None
        self.refitted: FixedValues | None = None
        self._carrier: Tensor | None = None

    def collect_gradient(self, ranks: Ranks = ALONE) -> None:
        """From now on, sum the gradient of the masked weight up in `gradient`, over all ranks."""
        self._carrier, self._ranks, self.gradient = torch.zeros((), device=self.original.weight.device, requires_grad=True), ranks, None

    def _collect(self, gradient: Tensor) -> None:
        summed = self._ranks.sum_rows(gradient.to(torch.promote_types(gradient.dtype, torch.float32)))
        self.gradient = summed if self.gradient is None else self.gradient.add_(summed)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the masked weight; (..., in) to (..., out)."""
        carrier = self._carrier if self.group.relaxed is None else self.group.relaxed
        output = MaskedLinearFunction.apply(x, carrier, self.original.weight, self.refitted or self.rule, self.group, self._collect)
        return output if self.original.bias is None else output + self.original.bias.to(output.dtype)


@torch.no_grad()
def mask_rule(weight: Tensor, score: Score, pattern: NMPattern, temperature: float | None) -> MaskRule:
    """Make the rule of a linear.

    Args:
        weight: (out, in).
        temperature: of the softmax behind the mask, in units of the mean score; None for the raw scores.
    """
    if temperature is None:
        return MaskRule(score, pattern)
    return MaskRule(score, pattern, score.of(weight).mean().clamp(min=torch.finfo(torch.float32).tiny) * temperature)


@torch.no_grad()
def channels_first(linear: nn.Linear, yes: bool) -> None:
    """Lay a weight out with its channels (columns) one after another, or with its rows again; its values stay.

    A sharded weight stays as it is: it comes row by row whenever its layer runs.
    """
    weight = linear.weight
    if not is_sharded(weight):
        weight.data = weight.data.t().contiguous().t() if yes else weight.data.contiguous()


def mask_layer(
    layer: nn.Module,
    adapter: ModelAdapter,
    groups: Mapping[str, GroupPermutation],
    rule_of: Callable[[str, Tensor], MaskRule],
) -> dict[str, list[MaskedLinear]]:
    """Put a `MaskedLinear` in the place of every target linear of a decoder layer, channels first; `unmask_layer` undoes it.

    Args:
        groups: the permutation of every linear group.
        rule_of: the rule of a linear, from the name of its group and its weight, (out, in).

    Returns:
        The masked linears by the name of their group.
    """
    masked: dict[str, list[MaskedLinear]] = {name: [] for name in adapter.linear_groups}
    for name, group in adapter.linear_groups.items():
        for path in group.readers:
            linear = layer.get_submodule(path)
            rule = rule_of(name, linear.weight)
            channels_first(linear, True)
            masked[name].append(MaskedLinear(linear, rule, groups[name]))
            layer.set_submodule(path, masked[name][-1])
    return masked


def unmask_layer(layer: nn.Module) -> None:
    """Put the originals back in the place of masked linears, in the layout that they had."""
    for path, module in list(layer.named_modules()):
        if isinstance(module, MaskedLinear):
            layer.set_submodule(path, module.original)
            channels_first(module.original, False)
