"""The custom backward pass is held against autograd through dense matrices, in float64.

Legend: W (out, in) weight; S (out, in) score; P = P_start blockdiag(B) permutation; M mask in the original order.
"""

import pytest
import torch
from torch import nn

from permllm.lcp import masked_linear
from permllm.lcp.group_permutations import GroupPermutation
from permllm.lcp.masked_linear import MaskedLinear, MaskedLinearFunction, MaskRule, channels_first, mask_rule
from permllm.permutation.assignment import best_assignment
from permllm.permutation.learnable import LearnableBlocks
from permllm.permutation.permutation import Permutation
from permllm.permutation.sinkhorn import sinkhorn
from permllm.pruning.metrics import Score
from permllm.sparsity.mask import nm_mask
from permllm.sparsity.pattern import NMPattern

CHANNELS, OUT_CHANNELS = 24, 5
CASES = [("2:4", 8), ("2:4", 24), ("4:8", 8), ("1:4", 12), ("3:4", 4), ("1:2", 6), ("3:6", 12)]


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def learnable(block_size, channels=CHANNELS, seed=0):
    """Random logits in float64, and a random start that carries channels across blocks."""
    generator = torch.Generator().manual_seed(seed)
    start = Permutation.random(channels, generator)
    return start, LearnableBlocks(channels // block_size, block_size, generator).double()


def group_of(start, blocks, estimator):
    relaxed = blocks.relax(0.5, 5)
    return GroupPermutation(start.order, relaxed, blocks.harden() if estimator == "hard" else None)


def make_score(kind, seed, channels=CHANNELS, out_channels=OUT_CHANNELS):
    """Factors as of Wanda (`channel`) or of RIA (`row`)."""
    channel, shared, row = (normal(size, seed=seed + index).abs() for index, size in enumerate((channels, channels, out_channels)))
    return Score(channel) if kind == "channel" else Score(channel, shared, row)


def straight_through(hard, soft):
    return hard + soft - soft.detach()


def dense_forward(x, blocks, start, weight, score, pattern, scale=None):
    """Write the method down as its paper does: matrices of (in, in), masks chosen from the permuted score."""
    permutation = start.matrix(torch.float64) @ torch.block_diag(*blocks)
    groups = (score @ permutation).unflatten(-1, (-1, pattern.group))
    hard = torch.zeros_like(groups).scatter(-1, groups.topk(pattern.kept, dim=-1).indices, 1.0)
    soft = (groups / (1.0 if scale is None else scale)).softmax(-1)
    mask = straight_through(hard, soft).flatten(-2) @ permutation.t()
    return x @ (weight * mask).t()


def dense_blocks(relaxed, estimator):
    """Return the permutation of every block as the estimator sees it, as matrices that autograd can follow."""
    if estimator == "soft":
        return relaxed
    orders = best_assignment(relaxed.transpose(1, 2))
    return straight_through(torch.stack([Permutation(order).matrix(relaxed.dtype) for order in orders]), relaxed)


@pytest.mark.parametrize("entries_at_once", [1, 2 * 8 * OUT_CHANNELS, 2**18])
@pytest.mark.parametrize("temperature", [None, 0.3])
@pytest.mark.parametrize("estimator", ["hard", "soft"])
@pytest.mark.parametrize(("text", "block_size"), CASES)
def test_value_and_gradients_equal_autograd_through_dense_matrices(text, block_size, estimator, temperature, entries_at_once, monkeypatch):
    """Worked on a block at a time, some blocks at a time, and all at once."""
    monkeypatch.setattr(masked_linear, "ENTRIES_AT_ONCE", entries_at_once)
    pattern, (start, blocks) = NMPattern.parse(text), learnable(block_size)
    weight, score = normal(OUT_CHANNELS, CHANNELS, seed=1), make_score("row", seed=2)
    x, upstream = normal(2, 3, CHANNELS, seed=3).requires_grad_(), normal(2, 3, OUT_CHANNELS, seed=4)
    group, rule = group_of(start, blocks, estimator), mask_rule(weight, score, pattern, temperature)
    assert not torch.equal(start.order, torch.arange(CHANNELS))

    found = MaskedLinearFunction.apply(x, group.relaxed, weight, rule, group)
    expected = dense_forward(x, dense_blocks(group.relaxed, estimator), start, weight, score.of(weight), pattern, rule.scale)
    torch.testing.assert_close(found, expected)
    found_gradients = torch.autograd.grad((found * upstream).sum(), (x, group.relaxed))
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), (x, group.relaxed))
    assert expected_gradients[1].abs().min() < expected_gradients[1].abs().max()
    torch.testing.assert_close(found_gradients, expected_gradients)


@pytest.mark.parametrize("estimator", ["hard", "soft"])
@pytest.mark.parametrize(("channels", "block_size"), [(96, 96), (256, 128)])
def test_large_blocks_and_whole_layers_equal_autograd_too(channels, block_size, estimator, monkeypatch):
    monkeypatch.setattr(masked_linear, "ENTRIES_AT_ONCE", 1)
    pattern, (start, blocks) = NMPattern(2, 4), learnable(block_size, channels)
    weight, score = normal(OUT_CHANNELS, channels, seed=1), make_score("channel", seed=2, channels=channels)
    x = normal(4, channels, seed=3).requires_grad_()
    group, rule = group_of(start, blocks, estimator), mask_rule(weight, score, pattern, 1.0)
    found = MaskedLinearFunction.apply(x, group.relaxed, weight, rule, group)
    expected = dense_forward(x, dense_blocks(group.relaxed, estimator), start, weight, score.of(weight), pattern, rule.scale)
    torch.testing.assert_close(found, expected)
    found_gradients, expected_gradients = (torch.autograd.grad(output.square().sum(), (x, group.relaxed)) for output in (found, expected))
    torch.testing.assert_close(found_gradients, expected_gradients)


@pytest.mark.parametrize("temperature", [None, 0.3])
@pytest.mark.parametrize("estimator", ["hard", "soft"])
@pytest.mark.parametrize(("text", "block_size"), CASES)
def test_the_logits_of_a_group_get_the_sum_of_the_gradients_of_its_linears(text, block_size, estimator, temperature):
    """Three linears that share one permutation, with biases, in a network that is not linear in them."""
    pattern, (start, blocks) = NMPattern.parse(text), learnable(block_size)
    linears = [nn.Linear(CHANNELS, OUT_CHANNELS, bias=index != 1).double().requires_grad_(False) for index in range(3)]
    for index, linear in enumerate(linears):
        linear.weight.copy_(normal(OUT_CHANNELS, CHANNELS, seed=20 + index))
    scores = [make_score(kind, seed=10 + index) for index, kind in enumerate(("channel", "row", "row"))]
    rules = [mask_rule(linear.weight, score, pattern, temperature) for linear, score in zip(linears, scores, strict=True)]
    x, group = normal(4, 7, CHANNELS, seed=3), group_of(start, blocks, estimator)
    masked = [MaskedLinear(linear, rule, group) for linear, rule in zip(linears, rules, strict=True)]
    query, key, value = (linear(x) for linear in masked)
    found = ((query.tanh() * key).sigmoid() * value).square().sum()
    found.backward()
    blocks.pull_back(0.5, 5)

    (logits,) = blocks.factors
    dense = dense_blocks(sinkhorn(logits, 0.5, 5), estimator)
    query, key, value = (
        dense_forward(x, dense, start, linear.weight, score.of(linear.weight), pattern, rule.scale) + (0 if linear.bias is None else linear.bias)
        for linear, score, rule in zip(linears, scores, rules, strict=True)
    )
    expected = ((query.tanh() * key).sigmoid() * value).square().sum()
    torch.testing.assert_close(found, expected)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    assert expected_gradient.abs().max() > 1e-6
    torch.testing.assert_close(logits.grad, expected_gradient)


def scaled(score, factor):
    shared = None if score.shared is None else score.shared * factor
    return Score(score.channel * factor, shared, score.row)


@pytest.mark.parametrize("estimator", ["hard", "soft"])
@pytest.mark.parametrize("kind", ["channel", "row"])
def test_with_a_mask_temperature_the_gradient_does_not_depend_on_the_size_of_the_score(kind, estimator):
    pattern, (start, blocks) = NMPattern(2, 4), learnable(8)
    weight, score, x = normal(OUT_CHANNELS, CHANNELS, seed=1), make_score(kind, seed=2), normal(6, CHANNELS, seed=3)

    def gradient(factor, temperature):
        group, rule = group_of(start, blocks, estimator), mask_rule(weight, scaled(score, factor), pattern, temperature)
        return torch.autograd.grad(MaskedLinearFunction.apply(x, group.relaxed, weight, rule, group).square().sum(), group.relaxed)[0]

    for factor in (1e-3, 1e3):
        torch.testing.assert_close(gradient(factor, 0.7), gradient(1.0, 0.7))
        assert not torch.allclose(gradient(factor, None), gradient(1.0, None), rtol=0.01)
    assert not torch.allclose(gradient(1.0, 0.7), gradient(1.0, 1.4), rtol=0.01)


def test_the_mask_temperature_is_in_units_of_the_mean_score():
    weight, score = normal(OUT_CHANNELS, CHANNELS, seed=1), make_score("row", seed=2)
    assert mask_rule(weight, score, NMPattern(2, 4), None).scale is None
    torch.testing.assert_close(mask_rule(weight, score, NMPattern(2, 4), 0.5).scale, 0.5 * score.of(weight).mean())


@pytest.mark.parametrize("estimator", ["hard", "soft"])
def test_a_linear_of_zeros_has_a_finite_gradient(estimator):
    """Depth-extended models have output projections of zeros."""
    start, blocks = learnable(8)
    weight, group = torch.zeros(OUT_CHANNELS, CHANNELS, dtype=torch.float64), group_of(start, blocks, estimator)
    rule = mask_rule(weight, make_score("channel", seed=2), NMPattern(2, 4), 0.1)
    output = MaskedLinearFunction.apply(normal(6, CHANNELS, seed=3), group.relaxed, weight, rule, group)
    assert torch.autograd.grad(output.sum(), group.relaxed)[0].isfinite().all()


@pytest.mark.parametrize("estimator", ["hard", "soft"])
def test_a_bfloat16_weight_gives_the_permutation_nearly_the_exact_gradient(estimator):
    pattern, (start, blocks) = NMPattern(2, 4), learnable(8)
    weight = normal(OUT_CHANNELS, CHANNELS, seed=1, dtype=torch.bfloat16)  # masks differ where rounding changes an order
    x, upstream = normal(64, CHANNELS, seed=3, dtype=torch.bfloat16), normal(64, OUT_CHANNELS, seed=4, dtype=torch.bfloat16)
    gradients = []
    for dtype, wide in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        group, score = group_of(start, blocks.to(wide), estimator), make_score("channel", seed=2)
        rule = mask_rule(weight.to(dtype), Score(score.channel.to(wide)), pattern, 1.0)
        output = MaskedLinearFunction.apply(x.to(dtype), group.relaxed, weight.to(dtype), rule, group)
        assert output.dtype == dtype
        gradients += torch.autograd.grad(output, group.relaxed, upstream.to(dtype))
    assert gradients[1].dtype == torch.float32
    error = (gradients[1].double() - gradients[0]).norm() / gradients[0].norm()
    assert error < 0.02  # bfloat16 has 8 bits: 0.4 % per operand


@pytest.mark.parametrize("entries_at_once", [1, 2**18])
def test_the_mask_in_the_original_order_is_that_of_the_permuted_score(entries_at_once, monkeypatch):
    monkeypatch.setattr(masked_linear, "ENTRIES_AT_ONCE", entries_at_once)
    pattern, weight = NMPattern(2, 4), normal(OUT_CHANNELS, CHANNELS, seed=1, dtype=torch.float32)
    score = Score(normal(CHANNELS, seed=2, dtype=torch.float32).abs())
    for seed in range(3):
        start, blocks = learnable(8, seed=seed)
        group = group_of(start, blocks.float(), "hard")
        masked = MaskRule(score, pattern).masked(group, weight.t(), torch.float32).t()
        mask = nm_mask(score.of(weight)[:, group.order], pattern)
        assert torch.equal(masked[:, group.order], weight[:, group.order] * mask)


@pytest.mark.parametrize("entries_at_once", [1, 100, 2**18])
@pytest.mark.parametrize("estimator", ["hard", "soft"])
def test_how_many_channels_are_worked_on_at_once_does_not_change_a_bit(estimator, entries_at_once, monkeypatch):
    start, blocks = learnable(8)
    weight = normal(OUT_CHANNELS, CHANNELS, seed=1, dtype=torch.float32)
    group, rule = group_of(start, blocks.float(), estimator), MaskRule(Score(torch.ones(CHANNELS)), NMPattern(2, 4))
    expected = rule.masked(group, weight.t(), torch.float32)
    monkeypatch.setattr(masked_linear, "ENTRIES_AT_ONCE", entries_at_once)
    assert torch.equal(rule.masked(group, weight.t(), torch.float32), expected)


def test_a_new_value_of_the_group_changes_what_all_its_linears_do():
    start, blocks = learnable(8)
    group, x = group_of(start, blocks, "hard"), normal(1, CHANNELS, seed=9)
    linears = []
    for seed in range(2):
        linear = nn.Linear(CHANNELS, OUT_CHANNELS).double().requires_grad_(False)
        linear.weight.copy_(normal(OUT_CHANNELS, CHANNELS, seed=seed))
        linears.append(MaskedLinear(linear, MaskRule(make_score("channel", seed=seed), NMPattern(2, 4)), group))
    before = [linear(x) for linear in linears]
    assert all(torch.equal(linear(x), old) for linear, old in zip(linears, before, strict=True))
    other = group_of(*learnable(8, seed=1), "hard")
    group.relaxed, group.local = other.relaxed, other.local
    assert not any(torch.equal(linear(x), old) for linear, old in zip(linears, before, strict=True))


def test_a_backward_pass_sees_the_value_of_its_own_forward_pass():
    """Not that of a later update, as when one batch is evaluated between the two passes of another."""
    start, blocks = learnable(8)
    weight, score, x = normal(OUT_CHANNELS, CHANNELS, seed=1), make_score("channel", seed=2), normal(6, CHANNELS, seed=3)
    group, rule = group_of(start, blocks, "hard"), MaskRule(score, NMPattern(2, 4))
    relaxed = group.relaxed
    (expected,) = torch.autograd.grad(MaskedLinearFunction.apply(x, relaxed, weight, rule, group).sum(), relaxed)
    output = MaskedLinearFunction.apply(x, relaxed, weight, rule, group)
    other = group_of(*learnable(8, seed=1), "hard")
    group.relaxed, group.local = other.relaxed, other.local
    assert torch.equal(torch.autograd.grad(output.sum(), relaxed)[0], expected)


def test_the_frozen_weight_and_bias_get_no_gradient():
    group = group_of(*learnable(8), "hard")
    linear = nn.Linear(CHANNELS, OUT_CHANNELS).double().requires_grad_(False)
    MaskedLinear(linear, MaskRule(make_score("channel", seed=2), NMPattern(2, 4)), group)(normal(1, CHANNELS, seed=3)).sum().backward()
    assert linear.weight.grad is None and linear.bias.grad is None and group.relaxed.grad is not None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_masked_linear_answers_in_the_dtype_that_the_original_answers_in(autocast, dtype, bias):
    start, blocks = learnable(8)
    linear = nn.Linear(CHANNELS, OUT_CHANNELS, bias=bias).to(dtype).requires_grad_(False)
    masked = MaskedLinear(linear, MaskRule(Score(torch.ones(CHANNELS)), NMPattern(2, 4)), group_of(start, blocks.float(), "hard"))
    x = normal(2, 3, CHANNELS, seed=3, dtype=dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output, expected = masked(x), linear(x)
    assert output.dtype == expected.dtype
    assert torch.autograd.grad(output.sum(), x)[0].dtype == dtype


@pytest.mark.parametrize("estimator", ["hard", "soft"])
def test_autocast_rounds_the_products_but_not_what_the_mask_goes_by(estimator):
    """Scores are float32 always; rounded ones would give the two passes different masks."""
    start, blocks = learnable(8, channels=256)
    weight, group = normal(64, 256, seed=1, dtype=torch.float32), group_of(start, blocks.float(), estimator)
    rule = MaskRule(Score(normal(256, seed=2, dtype=torch.float32).abs()), NMPattern(2, 4))
    exact = rule.masked(group, weight.t(), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = rule.masked(group, weight.t(), torch.float32)
    assert torch.equal(found, exact)


def fixed_linear(entries_at_once, monkeypatch):
    """Return a masked linear whose order does not learn by logits, and that order's dense mask."""
    monkeypatch.setattr(masked_linear, "ENTRIES_AT_ONCE", entries_at_once)
    order, pattern = Permutation.random(CHANNELS, torch.Generator().manual_seed(0)).order, NMPattern(2, 4)
    linear, score = nn.Linear(CHANNELS, OUT_CHANNELS).double().requires_grad_(False), make_score("row", seed=2)
    mask = nm_mask(score.of(linear.weight)[:, order], pattern)[:, order.argsort()]
    return MaskedLinear(linear, MaskRule(score, pattern), GroupPermutation(order)), mask


@pytest.mark.parametrize("entries_at_once", [1, 2**18])
def test_a_fixed_order_masks_and_collects_no_gradient(entries_at_once, monkeypatch):
    masked, mask = fixed_linear(entries_at_once, monkeypatch)
    x, linear = normal(3, CHANNELS, seed=3), masked.original
    torch.testing.assert_close(masked(x), x @ (linear.weight * mask).t() + linear.bias)
    assert not masked(x).requires_grad
    torch.testing.assert_close(torch.autograd.grad(masked(x.requires_grad_()).sum(), x)[0], (linear.weight * mask).sum(0).expand(3, -1))


@pytest.mark.parametrize("entries_at_once", [1, 2**18])
def test_a_fixed_order_can_collect_the_gradient_of_the_masked_weight(entries_at_once, monkeypatch):
    """Pruned weights included, summed over the passes since it was last asked to."""
    masked, mask = fixed_linear(entries_at_once, monkeypatch)
    linear = masked.original
    for _ in range(2):
        masked.collect_gradient()
        expected = torch.zeros_like(linear.weight)
        for seed in (3, 4):
            x = normal(2, 3, CHANNELS, seed=seed)
            masked(x).square().sum().backward()
            weight = (linear.weight * mask).requires_grad_()
            expected += torch.autograd.grad((x @ weight.t() + linear.bias).square().sum(), weight)[0]
        torch.testing.assert_close(masked.gradient, expected.t())
    assert linear.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layout_of_a_weight_changes_and_comes_back_but_its_values_stay(dtype):
    linear = nn.Linear(CHANNELS, OUT_CHANNELS).to(dtype).requires_grad_(False)
    parameter, values, stride = linear.weight, linear.weight.clone(), linear.weight.stride()
    channels_first(linear, True)
    assert linear.weight is parameter and linear.weight.t().is_contiguous() and torch.equal(linear.weight, values)
    channels_first(linear, False)
    assert linear.weight is parameter and linear.weight.stride() == stride and torch.equal(linear.weight, values)


def test_a_group_without_a_hard_value_says_what_to_do():
    group = group_of(*learnable(8), "soft")
    with pytest.raises(RuntimeError, match=r"no hard value; call `LearnedGroups\.update` with hard=True before"):
        _ = group.order


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("estimator", ["hard", "soft"])
@pytest.mark.parametrize("temperature", [None, 0.3])
def test_a_gpu_gives_the_value_and_the_gradients_of_the_cpu(estimator, temperature):
    weight, score, x = normal(OUT_CHANNELS, CHANNELS, seed=1), make_score("row", seed=2), normal(6, CHANNELS, seed=3)
    results = []
    for device in ("cpu", "cuda"):
        start, blocks = learnable(8)
        blocks = blocks.to(device)
        relaxed = blocks.relax(0.5, 5)
        group = GroupPermutation(start.order.to(device), relaxed, blocks.harden() if estimator == "hard" else None)
        there = Score(*(part.to(device) for part in (score.channel, score.shared, score.row)))
        rule = mask_rule(weight.to(device), there, NMPattern(2, 4), temperature)
        inputs = x.to(device).requires_grad_()
        output = MaskedLinearFunction.apply(inputs, relaxed, weight.to(device), rule, group)
        results.append([output, *torch.autograd.grad(output.square().sum(), (inputs, relaxed))])
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_gpu.cpu(), on_cpu)
