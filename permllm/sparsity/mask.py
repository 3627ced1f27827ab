"""N:M masks: keep the best weights of every group, and how a gradient passes through that choice."""

import torch
from torch import Tensor

from permllm.sparsity.pattern import NMPattern

# Up to this group size M (M - 1) / 2 whole-tensor comparisons are faster than a sort: nine times for 4, three for 8.
LARGEST_COMPARED_GROUP = 16


def nm_mask(score: Tensor, pattern: NMPattern) -> Tensor:
    """Keep the N highest scores of every M consecutive input channels.

    >>> nm_mask(torch.tensor([[3.0, 1.0, 2.0, 0.0]]), NMPattern.parse("2:4"))
    tensor([[ True, False,  True, False]])

    Args:
        score: (..., in), importance, higher is kept. Of equal scores the first is kept. Must be finite.

    Returns:
        (..., in) bool, True = kept; exactly N per group.

    Raises:
        ValueError: if M does not divide `in`.
    """
    pattern.check_widths({"the score": score.shape[-1]})
    groups = score.unflatten(-1, (-1, pattern.group))
    if pattern.group > LARGEST_COMPARED_GROUP:
        kept = groups.argsort(dim=-1, descending=True, stable=True)[..., : pattern.kept]
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, kept, True).flatten(-2)
    channels = groups.unbind(-1)
    losses = [torch.zeros_like(channel, dtype=torch.int8) for channel in channels]
    for first in range(pattern.group):
        for second in range(first + 1, pattern.group):
            first_wins = channels[first] >= channels[second]
            losses[second] += first_wins
            losses[first] += ~first_wins
    return torch.stack([count < pattern.kept for count in losses], dim=-1).flatten(-2)


def group_softmax(score: Tensor, pattern: NMPattern) -> Tensor:
    """Relax `nm_mask`: softmax over every group of M. (..., in) to (..., in)."""
    # M apart in memory: a softmax over a last dimension of 4 takes ten times as long
    channel_first = score.unflatten(-1, (-1, pattern.group)).transpose(-1, -2).contiguous()
    return channel_first.softmax(-2).transpose(-1, -2).flatten(-2)


def group_softmax_gradient(softmax: Tensor, grad: Tensor, pattern: NMPattern) -> Tensor:
    """Pull a gradient of `group_softmax`'s result back to its score. All tensors (..., in)."""
    weighted = softmax * grad
    total = weighted.unflatten(-1, (-1, pattern.group)).sum(-1, keepdim=True)
    return weighted.unflatten(-1, (-1, pattern.group)).sub(softmax.unflatten(-1, (-1, pattern.group)) * total).flatten(-2)


def straight_through_mask(score: Tensor, pattern: NMPattern) -> Tensor:
    """Return the hard N:M mask with the gradient of the softmax over every group.

    Args:
        score: (..., in), importance.

    Returns:
        (..., in) in the dtype of `score`, values exactly 0 or 1.

    Source: PermLLM (NeurIPS 2025), equations 6 and 7.
    """
    soft = group_softmax(score, pattern)
    soft_gradient = soft - soft.detach()  # exactly 0, so the value stays exactly 0 or 1
    return nm_mask(score, pattern).to(score.dtype) + soft_gradient


def is_nm_sparse(weight: Tensor, pattern: NMPattern) -> bool:
    """Whether every M consecutive input channels of (..., in) hold at most N non-zeros."""
    return bool((weight.unflatten(-1, (-1, pattern.group)) != 0).sum(-1).le(pattern.kept).all())
