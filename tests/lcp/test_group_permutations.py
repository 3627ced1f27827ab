"""Several linear groups, of different widths, that learn together."""

import pytest
import torch

from permllm.lcp.group_permutations import LearnedGroups
from permllm.lcp.recipes import LearnConfig
from permllm.permutation.permutation import Permutation
from permllm.permutation.sinkhorn import sinkhorn
from permllm.pruning.layout import Member, SharedOrder
from permllm.sparsity.pattern import NMPattern

PATTERN, WIDTHS = NMPattern(2, 4), {"attention_in": 32, "mlp_in": 32, "mlp_out": 48}
CONFIG = LearnConfig(block_size=16, logits="identity")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def own_orders(starts):
    return [SharedOrder((Member(index, name),), len(start)) for index, layer in enumerate(starts) for name, start in layer.items()]


def random_starts(layers=2, seed=0):
    shared = generator(seed)
    return [{name: Permutation.random(width, shared) for name, width in WIDTHS.items()} for _ in range(layers)]


def make_groups(starts=None, seed=0, **settings):
    starts = starts or random_starts()
    return LearnedGroups(starts, own_orders(starts), PATTERN, LearnConfig(**{**vars(CONFIG), **settings}), generator(seed), torch.device("cpu"))


def all_members(groups):
    return [group for layer in groups.layers for group in layer.values()]


def shuffle(groups, seed=1):
    with torch.no_grad():
        for parameter in groups.parameters():
            parameter += torch.randn(parameter.shape, generator=generator(seed))


def blocks_of(start, size):
    return [set(block) for block in start.order.view(-1, size).tolist()]


@pytest.mark.parametrize("settings", [{}, {"rank": 4}, {"block_size": None}, {"block_size": 8}, {"block_size": None, "block_count": 4}])
def test_identity_logits_begin_at_the_starts(settings):
    starts = random_starts()
    groups = make_groups(starts, **settings)
    for temperature in (1.0, 0.1):
        groups.update(temperature, hard=True)
        assert groups.permutations() == starts


def test_uniform_logits_begin_at_random_but_keep_the_blocks_of_the_start():
    starts = random_starts()
    results = []
    for seed in (3, 3, 4):
        groups = make_groups(starts, seed, logits="uniform")
        groups.update(1.0)
        results.append(groups.permutations())
    assert results[0] == results[1] != results[2]
    for layer, start in zip(results[0], starts, strict=True):
        for name in WIDTHS:
            assert layer[name] != start[name] and blocks_of(layer[name], 16) == blocks_of(start[name], 16)


def test_blocks_of_equal_size_are_one_tensor_and_every_layer_has_its_nearest_size():
    groups = make_groups(block_size=32)
    assert {size: len(blocks) for size, blocks in groups.blocks.items()} == {"32": 2 * 2, "24": 2 * 2}  # 48 is two blocks of 24
    assert sum(parameter.numel() for parameter in groups.parameters()) == 4 * 32**2 + 4 * 24**2


def test_every_group_gets_the_value_of_its_own_logits():
    """Logits of all blocks in the order of layers and groups; each one is hardened from its own part."""
    groups = make_groups()
    shuffle(groups)
    groups.update(0.5)
    (logits,) = groups.parameters()
    parts = sinkhorn(logits, 0.5, 5).split([len(group.start) // 16 for group in all_members(groups)])
    for group, soft in zip(all_members(groups), parts, strict=True):
        torch.testing.assert_close(group.relaxed, soft)
        inside = torch.block_diag(*[Permutation(order).matrix() for order in group.local])
        matrix = Permutation(group.start).matrix() @ inside
        assert torch.equal(Permutation(group.order).matrix(), matrix)
        assert (soft * torch.stack([Permutation(order).matrix() for order in group.local])).sum() >= soft.diagonal(dim1=1, dim2=2).sum()


@pytest.mark.parametrize("estimator", ["hard", "soft"])
@pytest.mark.parametrize("settings", [{}, {"rank": 4}, {"gumbel": 0.7}, {"block_size": 32}])
def test_the_gradient_that_a_group_collects_reaches_its_own_logits(estimator, settings):
    groups = make_groups(estimator=estimator, **settings).double()
    shuffle(groups)
    groups.update(0.5, noise=0.5)
    upstream = [torch.randn(group.relaxed.shape, generator=generator(index), dtype=torch.float64) for index, group in enumerate(all_members(groups))]
    sum((group.relaxed * part).sum() for group, part in zip(all_members(groups), upstream, strict=True)).backward()
    groups.pull_back()
    found = [parameter.grad.clone() for parameter in groups.parameters()]

    draws, expected = generator(), []
    for size, blocks in groups.blocks.items():
        logits = blocks.logits(*blocks.factors)
        if settings.get("gumbel"):
            uniform = torch.rand(logits.shape, generator=draws).clamp(1e-9, 1 - 1e-7)
            logits = logits - (-uniform.log()).log() * 0.7 * 0.5
        parts = [part for part in upstream if part.shape[1] == int(size)]
        expected += torch.autograd.grad((sinkhorn(logits, 0.5, 5) * torch.cat(parts)).sum(), list(blocks.factors))
    torch.testing.assert_close(found, expected)


def test_a_group_that_nothing_pulls_on_does_not_move():
    groups = make_groups()
    groups.update(0.5)
    first = all_members(groups)[0]
    (first.relaxed * torch.randn(first.relaxed.shape, generator=generator())).sum().backward()
    groups.pull_back()
    (logits,) = groups.parameters()
    assert logits.grad[:2].abs().sum() > 0 and logits.grad[2:].abs().sum() == 0


def test_the_soft_estimator_has_a_hard_value_only_for_evaluation():
    groups = make_groups(estimator="soft")
    shuffle(groups)
    groups.update(0.5)
    assert all(group.local is None for group in all_members(groups))
    with pytest.raises(RuntimeError, match="no hard value"):
        groups.permutations()
    groups.update(0.5, hard=True)
    hard = make_groups()
    shuffle(hard)
    hard.update(0.5)
    assert groups.permutations() == hard.permutations()
    groups.update(0.5)
    assert all(group.local is None for group in all_members(groups))


def test_noise_changes_the_value_of_every_step_and_an_evaluation_draws_none():
    groups = make_groups(gumbel=1.0)
    before = groups.generator.get_state()
    groups.update(0.5, hard=True)
    assert torch.equal(groups.generator.get_state(), before)
    assert groups.permutations() == random_starts()
    values = []
    for _ in range(2):
        groups.update(0.5, noise=1.0)
        values.append(all_members(groups)[0].relaxed.detach())
    assert not torch.equal(*values)


def test_the_noise_shrinks_with_its_factor():
    distances = []
    for noise in (1.0, 0.1, 0.0):
        groups = make_groups(gumbel=1.0)
        groups.update(0.5, noise=noise)
        distances.append((all_members(groups)[0].relaxed - sinkhorn(torch.eye(16), 0.5, 5)).norm().item())
    assert distances[0] > distances[1] > distances[2] == 0


@pytest.mark.parametrize("estimator", ["hard", "soft"])
def test_logits_that_are_not_finite_are_refused_when_they_are_hardened(estimator):
    groups = make_groups(estimator=estimator)
    with torch.no_grad():
        next(groups.parameters())[3, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        groups.update(0.5, hard=True)


def test_the_state_holds_the_logits_and_nothing_else():
    groups, other = make_groups(logits="uniform"), make_groups(seed=1, logits="uniform")
    assert len(groups.state_dict()) == len(list(groups.parameters())) == 1
    other.load_state_dict(groups.state_dict())
    for module in (groups, other):
        module.update(0.5)
    assert groups.permutations() == other.permutations()


def test_no_groups_are_no_problem():
    groups = LearnedGroups([], [], PATTERN, CONFIG, generator(), torch.device("cpu"))
    groups.update(1.0, hard=True)
    assert groups.permutations() == []
