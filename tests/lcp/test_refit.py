"""Weights that adapt while an order is learned: what refitting makes of them, what a removal costs, and learning with both.

Legend: X (in, tokens) input; W (out, in) weight; H = G + damping in scaled channels.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

from permllm.calibration.statistics import ActivationStats
from permllm.lcp.group_permutations import GroupPermutation
from permllm.lcp.masked_linear import MaskedLinear, MaskRule
from permllm.lcp.recipes import LearnConfig
from permllm.lcp.refit import refit, removal_costs
from permllm.permutation.permutation import Permutation
from permllm.pruning.metrics import obs
from permllm.pruning.updates.least_squares import DAMPING, least_squares
from permllm.pruning.updates.reconstruction import scaled_gram
from permllm.sparsity.pattern import NMPattern

PATTERN, CHANNELS, TOKENS = NMPattern(2, 4), 16, 400


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def stats():
    x = normal(TOKENS, CHANNELS, seed=1) @ (torch.eye(CHANNELS) + 0.4 * normal(CHANNELS, CHANNELS, seed=2))
    return ActivationStats(x.t() @ x / TOKENS, TOKENS)


def masked(weight, stats, group):
    linear = nn.Linear(CHANNELS, len(weight), bias=False).requires_grad_(False)
    linear.weight.copy_(weight)
    return MaskedLinear(linear, MaskRule(obs(weight, stats), PATTERN), group)


def test_linears_of_a_group_take_the_least_squares_values_under_their_masks(stats):
    group = GroupPermutation(Permutation.random(CHANNELS, torch.Generator().manual_seed(3)).canonical(PATTERN.group).order)
    linears = [masked(normal(6, CHANNELS, seed=4), stats, group), masked(normal(10, CHANNELS, seed=5), stats, group)]
    refit(linears, stats)
    for linear in linears:
        mask = linear.rule.masked(group, linear.original.weight.t(), torch.float32).t() != 0
        expected, _ = least_squares(linear.original.weight, stats, PATTERN, mask)
        torch.testing.assert_close(linear.refitted.values.t(), expected, rtol=1e-3, atol=1e-4)
        x = normal(3, CHANNELS, seed=6)
        torch.testing.assert_close(linear(x), x @ linear.refitted.values)


def test_what_goes_back_through_a_refitted_linear_are_its_own_gradients(stats):
    linear = masked(normal(6, CHANNELS, seed=4), stats, GroupPermutation(torch.arange(CHANNELS)))
    refit([linear], stats)
    linear.collect_gradient()
    x, weight = normal(5, CHANNELS, seed=6).requires_grad_(), linear.refitted.values.clone().requires_grad_()
    linear(x).square().sum().backward()
    found, x.grad = x.grad.clone(), None
    (x @ weight).square().sum().backward()
    torch.testing.assert_close(found, x.grad)
    torch.testing.assert_close(linear.gradient, weight.grad)


def test_a_removal_costs_what_the_others_of_the_row_cannot_make_up(stats):
    """Against the solution without one channel, by elimination."""
    weight, gradient = normal(3, CHANNELS, seed=7), normal(CHANNELS, 3, seed=8)
    target, cost, stiffness = removal_costs(weight, gradient, stats)
    gram, scale, _ = scaled_gram(stats, DAMPING)
    for channel in range(CHANNELS):
        rest = [other for other in range(CHANNELS) if other != channel]
        best = torch.zeros(3, CHANNELS)
        best[:, rest] = torch.linalg.solve(gram[rest][:, rest], (target @ gram)[:, rest].t()).t()
        change = best - target
        error = ((change @ gram) * change).sum(1)
        torch.testing.assert_close(error, target[:, channel].square() * stiffness[channel], rtol=1e-3, atol=1e-4)
        first_order = ((change / scale) * gradient.t()).sum(1)
        torch.testing.assert_close(first_order, cost[channel] * target[:, channel], rtol=1e-3, atol=1e-3)


def test_learning_lowers_the_loss_of_refitted_weights_and_repeats_itself(learn, samples):
    samples = replace(samples, held_out=0)  # judged on what it learns from
    settings = {"optimizer": "guided", "refit": True, "start": "cp", "moves": 0.2, "curvature": 1e-3, "objective": "relative_error", "epochs": 6}
    runs = [learn("obs", samples, **settings) for _ in range(2)]
    assert runs[0].best.held_out_loss < runs[0].start.held_out_loss
    assert runs[0].history == runs[1].history
    plain = learn("obs", samples, **{**settings, "refit": False})
    assert runs[0].start.held_out_loss < plain.start.held_out_loss  # the weights have adapted


def test_a_run_that_is_resumed_ends_as_one_that_was_not(learn, tmp_path):
    class Killed(BaseException):
        pass

    def stop(record):
        if record.epoch == 3:
            raise Killed

    settings = {"optimizer": "guided", "refit": True, "start": "cp", "moves": 0.2, "curvature": 1e-3, "objective": "relative_error", "epochs": 6}
    whole = learn("obs", **settings)
    with pytest.raises(Killed):
        learn("obs", on_epoch=stop, state_file=tmp_path / "state.pt", **settings)
    resumed = learn("obs", state_file=tmp_path / "state.pt", **settings)
    assert resumed.history == whole.history
    for one, other in zip(resumed.permutations, whole.permutations, strict=True):
        assert all(torch.equal(one[name].order, other[name].order) for name in one)


def test_refitting_needs_all_layers_and_the_guided_optimizer():
    with pytest.raises(ValueError, match="refit changes all layers together: window and last_layers must be null"):
        LearnConfig(optimizer="guided", refit=True, last_layers=1)
    with pytest.raises(ValueError, match="optimizer adamw does not use refit"):
        LearnConfig(refit=True)
