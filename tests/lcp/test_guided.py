"""Guided re-partitions: the curvature that they go by, what a move changes of the loss, and which moves are made.

Legend: X (in, tokens) input; Q (in, out) gradient of the loss with respect to the masked weight; G Gram matrix.
"""

import pytest
import torch
from torch import nn

from permllm.calibration.statistics import ActivationStats
from permllm.lcp import guided
from permllm.lcp.guided import GuidedGroups
from permllm.lcp.masked_linear import MaskedLinear, MaskRule
from permllm.lcp.objective import HIDDEN_OBJECTIVES, NextTokens, curvature_probe, kl_divergence
from permllm.lcp.recipes import LearnConfig
from permllm.permutation.permutation import Permutation
from permllm.pruning.layout import Member, SharedOrder
from permllm.pruning.metrics import Score
from permllm.sparsity.pattern import NMPattern

PATTERN = NMPattern(2, 4)
CHANNELS, OUT_CHANNELS, TOKENS = 32, 6, 256


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def per_token_square(probe, output):
    """Return the square of the gradient of a probe, summed over what one token puts out."""
    (gradient,) = torch.autograd.grad(probe, output)
    return gradient.square()


@pytest.mark.parametrize("name", sorted(HIDDEN_OBJECTIVES))
def test_the_probe_of_hidden_states_has_the_curvature_of_their_objective(name):
    """Second differences of one token's objective in random directions."""
    dense = normal(1, 1, 16, seed=0).double().requires_grad_()
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.autograd.grad(curvature_probe(name, dense, generator), dense)[0].flatten() for _ in range(4000)]
    expected = torch.stack(drawn).square().mean(0)
    step = 0.1
    found = []
    for channel in range(16):
        moved = dense.detach().clone()
        moved[0, 0, channel] += step
        found.append(2 * HIDDEN_OBJECTIVES[name](moved.double(), dense.detach()).item() / step**2)
    tangent = torch.tensor(found)  # the cosine does not see a change of length, which the probe ignores
    if name == "cosine":
        unit = dense.detach().flatten() / dense.detach().norm()
        tangent = tangent / (1 - unit.square()).float()
    torch.testing.assert_close(expected.float(), tangent, rtol=0.06, atol=1e-6)


def test_the_probe_of_next_tokens_has_the_curvature_of_the_divergence():
    logits = normal(1, 1, 8, seed=0).requires_grad_()
    generator = torch.Generator().manual_seed(1)
    fisher = torch.stack([torch.autograd.grad(curvature_probe("kl", logits, generator), logits)[0].flatten() for _ in range(8000)]).square().mean(0)
    every = torch.arange(8).expand(1, 1, 8)
    dense = NextTokens(torch.zeros(1, 1, dtype=torch.int64), every, logits.detach().log_softmax(-1))
    hessian = torch.autograd.functional.hessian(lambda x: kl_divergence(x.view(1, 1, 8), dense), logits.detach().flatten())
    torch.testing.assert_close(fisher, hessian.diagonal(), rtol=0.1, atol=2e-3)


@pytest.fixture
def problem():
    """A linear whose outputs are to stay as they are: the loss is exactly quadratic, with curvature 2 in every output."""
    linear = nn.Linear(CHANNELS, OUT_CHANNELS, bias=False).requires_grad_(False)
    linear.weight.copy_(normal(OUT_CHANNELS, CHANNELS, seed=1))
    x = normal(TOKENS, CHANNELS, seed=2) @ (torch.eye(CHANNELS) + 0.3 * normal(CHANNELS, CHANNELS, seed=3))
    stats = {"group": ActivationStats(x.t() @ x / TOKENS, TOKENS)}
    groups = GuidedGroups(
        [{"group": Permutation.random(CHANNELS, torch.Generator().manual_seed(4))}],
        [SharedOrder((Member(0, "group"),), CHANNELS)],
        PATTERN,
        LearnConfig(optimizer="guided", curvature=1.0),
        linear.weight.device,
    )
    masked = MaskedLinear(linear, MaskRule(Score(stats["group"].norms), PATTERN), groups.layers[0]["group"])

    def loss():
        return (masked(x) - linear(x)).square().sum() / TOKENS

    return groups, masked, stats, loss


def regroup(problem, share, seed=0):
    groups, masked, stats, loss = problem
    masked.collect_gradient()
    loss().backward()
    curvature = {masked: torch.full((OUT_CHANNELS,), 2.0)}
    return groups.regroup([{"group": [masked]}], [stats], curvature, share, torch.Generator().manual_seed(seed))


def test_a_single_move_changes_a_quadratic_loss_by_what_is_predicted(problem, monkeypatch):
    loss, gains = problem[3], []
    original = guided.best_moves

    def record(*arguments):
        moves = original(*arguments)
        gains.append(moves.gain)
        return moves

    monkeypatch.setattr(guided, "best_moves", record)
    before = loss().item()
    assert regroup(problem, share=1e-6) == 1
    assert before - loss().item() == pytest.approx(gains[0].max().item(), rel=1e-4)


def test_single_moves_lower_a_quadratic_loss_until_none_is_left(problem):
    losses = [problem[3]().item()]
    for seed in range(40):
        regroup(problem, share=1e-6, seed=seed)
        losses.append(problem[3]().item())
    assert all(after <= before * (1 + 1e-5) for before, after in zip(losses, losses[1:], strict=False))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(("share", "most"), [(1e-6, 1), (0.5, 2), (1.0, 4)])
def test_no_more_than_the_share_of_the_pairs_moves(problem, share, most):
    """32 channels are 8 groups, 4 pairs."""
    assert 1 <= regroup(problem, share) <= most


def test_groups_hold_every_channel_once_and_are_sorted(problem):
    for seed in range(5):
        regroup(problem, 1.0, seed)
    (layer,) = problem[0].permutations()
    assert (layer["group"].order.view(-1, 4).diff(dim=1) > 0).all()  # Permutation refuses a channel that is missing
