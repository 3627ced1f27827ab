"""N:M masks: keep the best weights of every group, and how a gradient passes through that choice."""

import torch
from torch import Tensor

from permllm.sparsity.pattern import NMPattern
from permllm.sparsity.transposable import transposable_mask

# Up to this group size M (M - 1) / 2 whole-tensor comparisons are faster than a sort: nine times for 4, three for 8.
LARGEST_COMPARED_GROUP = 16


def nm_mask(score: Tensor, pattern: NMPattern, dim: int = -1, dtype: torch.dtype = torch.bool) -> Tensor:
    """Keep the N highest scores of every M consecutive input channels.

    >>> nm_mask(torch.tensor([[3.0, 1.0, 2.0, 0.0]]), NMPattern.parse("2:4"))
    tensor([[ True, False,  True, False]])

    Args:
        score: (..., in), importance, higher is kept. Of equal scores the first is kept. Must be finite.
        dim: where the input channels lie. The first dimension is faster than the last: a group's channels are then rows.
        dtype: of the mask. On a CPU a weight times a mask of its own type takes a thirtieth of the time of one times booleans.

    Returns:
        In the shape of `score`, True or 1 = kept; exactly N per group.

    Raises:
        ValueError: if M does not divide `in`.
    """
    pattern.check_widths({"the score": score.shape[dim]})
    dim = dim % score.dim()
    groups = score.unflatten(dim, (-1, pattern.group))
    if pattern.group > LARGEST_COMPARED_GROUP:
        places = groups.argsort(dim=dim + 1, descending=True, stable=True).narrow(dim + 1, 0, pattern.kept)
        return torch.zeros_like(groups, dtype=dtype).scatter_(dim + 1, places, 1).flatten(dim, dim + 1)
    channels = [channel.contiguous() for channel in groups.unbind(dim + 1)]
    counts = torch.int8 if dtype == torch.bool else dtype
    losses = [torch.full_like(channel, pattern.group - 1 - place, dtype=counts) for place, channel in enumerate(channels)]
    wins = torch.empty_like(losses[0])
    for first in range(pattern.group):
        for second in range(first + 1, pattern.group):
            torch.ge(channels[first], channels[second], out=wins)
            losses[first] -= wins
            losses[second] += wins
    kept = [count < pattern.kept if dtype == torch.bool else count.lt_(pattern.kept) for count in losses]
    return torch.stack(kept, dim=dim + 1).flatten(dim, dim + 1)


def best_mask(score: Tensor, pattern: NMPattern) -> Tensor:
    """Keep the most score that a pattern allows: `transposable_mask` if it is transposable, else `nm_mask`.

    Args:
        score: (out, in). A sum of scores decides over a transposable mask, so its scale matters there, not only its order.
    """
    return transposable_mask(score, pattern) if pattern.transposable else nm_mask(score, pattern)


def group_softmax(score: Tensor, pattern: NMPattern) -> Tensor:
    """Relax `nm_mask`: softmax over every group of M. (in, ...) to (in, ...), channels first."""
    return score.unflatten(0, (-1, pattern.group)).softmax(1).flatten(0, 1)


def group_softmax_gradient(softmax: Tensor, grad: Tensor, pattern: NMPattern) -> Tensor:
    """Pull a gradient of `group_softmax`'s result back to its score. All tensors (in, ...), channels first."""
    weighted = (softmax * grad).unflatten(0, (-1, pattern.group))
    return weighted.addcmul(softmax.unflatten(0, (-1, pattern.group)), weighted.sum(1, keepdim=True), value=-1).flatten(0, 1)


def is_nm_sparse(weight: Tensor, pattern: NMPattern) -> bool:
    """Whether every M consecutive input channels of (..., in) hold at most N non-zeros."""
    return bool((weight.unflatten(-1, (-1, pattern.group)) != 0).sum(-1).le(pattern.kept).all())
