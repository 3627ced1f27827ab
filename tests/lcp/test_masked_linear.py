"""The custom backward pass is held against autograd through dense matrices, in float64.

Legend: W (out, in) weight; S (out, in) score; P = P_start blockdiag(B) permutation; M mask in the original order.
"""

import pytest
import torch
from torch import nn

from permllm.lcp.masked_linear import GroupPermutation, MaskedLinear, MaskedLinearFunction
from permllm.permutation.learnable import LearnableBlockPermutation
from permllm.permutation.permutation import Permutation
from permllm.permutation.sinkhorn import sinkhorn
from permllm.sparsity.mask import nm_mask
from permllm.sparsity.pattern import NMPattern

CHANNELS, OUT_CHANNELS = 24, 5
CASES = [("2:4", 8), ("2:4", 24), ("4:8", 8), ("1:4", 12), ("3:4", 4), ("1:2", 6), ("3:6", 12)]


def normal(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def learnable(block_size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LearnableBlockPermutation(Permutation.random(CHANNELS, generator), block_size, generator).double()


def straight_through(hard, soft):
    return hard + soft - soft.detach()


def dense_forward(x, blocks, start, weight, score, pattern):
    """Write the method down as its paper does: matrices of (in, in), masks chosen from the permuted score."""
    permutation = start.matrix(torch.float64) @ torch.block_diag(*blocks)
    permuted = score @ permutation
    groups = permuted.unflatten(-1, (-1, pattern.group))
    kept = groups.topk(pattern.kept, dim=-1).indices
    hard = torch.zeros_like(groups).scatter(-1, kept, 1.0).flatten(-2)
    mask = straight_through(hard, groups.softmax(-1).flatten(-2)) @ permutation.t()
    return x @ (weight * mask).t()


@pytest.mark.parametrize(("text", "block_size"), CASES)
def test_value_and_gradients_equal_autograd_through_dense_matrices(text, block_size):
    pattern, module = NMPattern.parse(text), learnable(block_size)
    weight, score = normal(OUT_CHANNELS, CHANNELS, seed=1), normal(OUT_CHANNELS, CHANNELS, seed=2).abs()
    x, upstream = normal(2, 3, CHANNELS, seed=3).requires_grad_(), normal(2, 3, OUT_CHANNELS, seed=4)
    matrix, permutation = module(0.5, 5)
    assert not torch.equal(module.start.order, torch.arange(CHANNELS)) and permutation != module.start
    blocks = matrix.detach().requires_grad_()
    order = permutation.order
    mask = permutation.inverse().apply(nm_mask(permutation.apply(score), pattern))

    found = MaskedLinearFunction.apply(x, blocks, weight, score, mask, order, module.start.order, pattern)
    expected = dense_forward(x, blocks, module.start, weight, score, pattern)
    torch.testing.assert_close(found, expected)
    found_gradients = torch.autograd.grad((found * upstream).sum(), (x, blocks))
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), (x, blocks))
    assert expected_gradients[1].abs().min() < expected_gradients[1].abs().max()
    torch.testing.assert_close(found_gradients, expected_gradients)


@pytest.mark.parametrize(("text", "block_size"), CASES)
def test_the_logits_of_a_group_get_the_sum_of_the_gradients_of_its_linears(text, block_size):
    """Three linears that share one permutation, with biases, in a network that is not linear in them."""
    pattern, group = NMPattern.parse(text), GroupPermutation(learnable(block_size))
    linears = [nn.Linear(CHANNELS, OUT_CHANNELS, bias=index != 1).double().requires_grad_(False) for index in range(3)]
    scores = [normal(OUT_CHANNELS, CHANNELS, seed=10 + index).abs() for index in range(3)]
    x = normal(4, 7, CHANNELS, seed=3)
    module = group.learnable
    group.update(0.5, 5)
    masked = [MaskedLinear(linear, score, group, pattern) for linear, score in zip(linears, scores, strict=True)]
    query, key, value = (linear(x) for linear in masked)
    found = ((query.tanh() * key).sigmoid() * value).square().sum()

    soft = sinkhorn(module.logits, 0.5, 5)
    hard = torch.zeros_like(soft).scatter(1, module.block_orders(soft)[:, None], 1.0)
    blocks = straight_through(hard, soft)
    query, key, value = (
        dense_forward(x, blocks, module.start, linear.weight, score, pattern) + (0 if linear.bias is None else linear.bias)
        for linear, score in zip(linears, scores, strict=True)
    )
    expected = ((query.tanh() * key).sigmoid() * value).square().sum()
    torch.testing.assert_close(found, expected)
    (found_gradient,) = torch.autograd.grad(found, module.logits)
    (expected_gradient,) = torch.autograd.grad(expected, module.logits)
    assert expected_gradient.abs().max() > 1e-6
    torch.testing.assert_close(found_gradient, expected_gradient)


def test_a_bfloat16_weight_gives_the_permutation_nearly_the_exact_gradient():
    pattern, module = NMPattern(2, 4), learnable(8)
    weight, score = normal(OUT_CHANNELS, CHANNELS, seed=1), normal(OUT_CHANNELS, CHANNELS, seed=2).abs()
    x, upstream = normal(64, CHANNELS, seed=3), normal(64, OUT_CHANNELS, seed=4)
    matrix, permutation = module(0.5, 5)
    mask = permutation.inverse().apply(nm_mask(permutation.apply(score), pattern))
    gradients = []
    for dtype in (torch.float64, torch.bfloat16):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        blocks = matrix.detach().to(wide).requires_grad_()
        arguments = (weight.to(dtype), score.to(wide), mask, permutation.order, module.start.order, pattern)
        output = MaskedLinearFunction.apply(x.to(dtype), blocks, *arguments)
        assert output.dtype == dtype
        gradients += torch.autograd.grad(output, blocks, upstream.to(dtype))
    assert gradients[1].dtype == torch.float32
    error = (gradients[1].double() - gradients[0]).norm() / gradients[0].norm()
    assert error < 0.02  # bfloat16 has 8 bits: 0.4 % per operand


def test_the_mask_in_the_original_order_is_that_of_the_permuted_score():
    pattern, group = NMPattern(2, 4), GroupPermutation(learnable(8))
    score = normal(OUT_CHANNELS, CHANNELS, seed=2).abs()
    masked = MaskedLinear(nn.Linear(CHANNELS, OUT_CHANNELS), score, group, pattern)
    for seed in range(3):
        order = Permutation.random(CHANNELS, torch.Generator().manual_seed(seed)).order
        assert torch.equal(masked.mask(order)[:, order], nm_mask(score[:, order], pattern))


def test_every_update_changes_what_all_linears_of_the_group_do():
    pattern, group = NMPattern(2, 4), GroupPermutation(learnable(8))
    scores = [normal(OUT_CHANNELS, CHANNELS, seed=seed).abs() for seed in range(2)]
    linears = [MaskedLinear(nn.Linear(CHANNELS, OUT_CHANNELS).double(), score, group, pattern) for score in scores]
    x = normal(1, CHANNELS, seed=9)
    group.update(0.5, 5)
    before = [linear(x) for linear in linears]
    with torch.no_grad():
        group.learnable.logits.copy_(normal(*group.learnable.logits.shape, seed=8))
    assert all(torch.equal(linear(x), old) for linear, old in zip(linears, before, strict=True))
    group.update(0.5, 5)
    assert not any(torch.equal(linear(x), old) for linear, old in zip(linears, before, strict=True))


def test_a_fixed_permutation_gets_no_gradient():
    group = GroupPermutation(learnable(8))
    group.fix(group.learnable.start)
    frozen = nn.Linear(CHANNELS, OUT_CHANNELS).double().requires_grad_(False)
    masked = MaskedLinear(frozen, normal(OUT_CHANNELS, CHANNELS, seed=2), group, NMPattern(2, 4))
    assert not masked(normal(1, CHANNELS, seed=3)).requires_grad


def test_a_group_without_a_value_says_what_to_do():
    with pytest.raises(RuntimeError, match="call `update` before the model runs"):
        _ = GroupPermutation(learnable(8)).value
