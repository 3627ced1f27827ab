"""Channel permutation without learning (CP): snake allocation, then one assignment per slot.

Legend: C channels, M the group size of the pattern, G = C / M groups.
"""

import torch
from torch import Tensor

from permllm.permutation.assignment import best_assignment
from permllm.permutation.permutation import Permutation
from permllm.sparsity.mask import nm_mask
from permllm.sparsity.pattern import NMPattern


def retained_score(score: Tensor, permutation: Permutation, pattern: NMPattern) -> float:
    """Sum the scores that the N:M mask keeps after the permutation. `score` is (out, in)."""
    permuted = permutation.apply(score)
    return float((permuted * nm_mask(permuted, pattern)).sum(dtype=torch.float64))


def snake_allocation(score: Tensor, pattern: NMPattern) -> Permutation:
    """Deal the channels into groups by their total score, so that every group gets strong and weak ones.

    Args:
        score: (out, in), importance; `in` a multiple of M.
    """
    ranked = score.sum(dim=0).argsort(descending=True, stable=True).view(pattern.group, -1)
    ranked[1::2] = ranked[1::2].flip(1)
    return Permutation(ranked.t().reshape(-1))


def heuristic_permutation(score: Tensor, pattern: NMPattern) -> Permutation:
    """Find an order of the input channels under which the N:M mask keeps more score.

    Args:
        score: (out, in), importance of every weight that reads the channels: the rows of all linears of a
            linear group stacked.

    Returns:
        The canonical form of the order found. No assignment lowers the retained score, and the result never
        retains less than the order as it is: in that case it is the identity.

    Raises:
        ValueError: if M does not divide `in`.

    Source: RIA, "Plug-and-Play" (ICLR 2024), heuristic channel allocation and linear sum assignment.
    """
    pattern.check_widths({"the score": score.shape[-1]})
    permutation = snake_allocation(score, pattern)
    for slot in range(pattern.group):
        permutation = _reassign_slot(score, permutation, pattern, slot)
    identity = Permutation.identity(score.shape[-1])
    if retained_score(score, permutation, pattern) < retained_score(score, identity, pattern):
        return identity
    return permutation.canonical(pattern.group)


def _reassign_slot(score: Tensor, permutation: Permutation, pattern: NMPattern, slot: int) -> Permutation:
    """Free one slot of every group and give the G freed channels back where they retain most."""
    groups = permutation.order.to(score.device).view(-1, pattern.group).clone()
    freed = groups[:, slot].clone()
    others = torch.cat([groups[:, :slot], groups[:, slot + 1 :]], dim=1)
    # A candidate changes a row's retained score only where it beats the N-th best of the others: it then gains the difference.
    kept_others = score[:, others].topk(pattern.kept, dim=-1).values  # (out, G, N); N <= M - 1
    threshold = kept_others[..., -1]  # (out, G)
    gain = torch.stack([(score[:, freed] - limit[:, None]).clamp_(min=0).sum(dim=0) for limit in threshold.unbind(1)])  # (G, G)
    groups[:, slot] = freed[best_assignment(gain[None])[0]]
    return Permutation(groups.flatten())
