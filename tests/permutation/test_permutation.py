from itertools import permutations

import pytest
import torch

from permllm.permutation.permutation import Permutation
from permllm.sparsity.mask import nm_mask
from permllm.sparsity.pattern import NMPattern


def random_permutation(channels, seed=0):
    return Permutation.random(channels, torch.Generator().manual_seed(seed))


def test_result_channel_j_is_input_channel_order_j():
    permutation = Permutation(torch.tensor([2, 0, 1]))
    assert permutation.apply(torch.tensor([10, 11, 12])).tolist() == [12, 10, 11]
    assert permutation.apply(torch.tensor([[1, 1], [2, 2], [3, 3]]), dim=0).tolist() == [[3, 3], [1, 1], [2, 2]]


@pytest.mark.parametrize("seed", range(5))
def test_permuting_weight_and_input_alike_leaves_the_output_unchanged(seed):
    generator = torch.Generator().manual_seed(seed)
    weight, x = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in [(5, 12), (3, 12)])
    order = random_permutation(12, seed)
    torch.testing.assert_close(order.apply(x) @ order.apply(weight).t(), x @ weight.t())


@pytest.mark.parametrize("seed", range(5))
def test_the_inverse_undoes_the_permutation_on_either_side(seed):
    permutation = random_permutation(9, seed)
    x = torch.arange(9)
    assert torch.equal(permutation.inverse().apply(permutation.apply(x)), x)
    assert permutation.then(permutation.inverse()) == Permutation.identity(9) == permutation.inverse().then(permutation)


def test_then_applies_this_permutation_first():
    first, second = random_permutation(7, 1), random_permutation(7, 2)
    x = torch.arange(7) * 10
    assert torch.equal(first.then(second).apply(x), second.apply(first.apply(x)))
    assert first.then(second) != second.then(first)


def test_multiplying_with_the_matrix_is_applying():
    permutation = random_permutation(6)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(x @ permutation.matrix(), permutation.apply(x))
    assert torch.equal(permutation.matrix().t(), permutation.inverse().matrix())


def test_the_matrix_of_a_composition_is_the_product_of_the_matrices():
    first, second = random_permutation(6, 1), random_permutation(6, 2)
    assert torch.equal(first.then(second).matrix(), first.matrix() @ second.matrix())


def test_permutations_within_blocks_stay_in_their_blocks():
    permutation = Permutation.within_blocks(torch.tensor([[1, 0, 2], [2, 1, 0]]))
    assert permutation.order.tolist() == [1, 0, 2, 5, 4, 3]


def test_every_order_of_a_class_has_the_same_canonical_form_and_the_same_mask():
    pattern = NMPattern(2, 3)
    start = random_permutation(6, 3)
    score = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    canonical = start.canonical(3)
    members = 0
    for groups in permutations(start.order.view(2, 3).tolist()):
        for left in permutations(groups[0]):
            for right in permutations(groups[1]):
                member = Permutation(torch.tensor([*left, *right]))
                assert member.canonical(3) == canonical
                assert torch.equal(original_mask(score, member, pattern), original_mask(score, canonical, pattern))
                members += 1
    assert members == 72


def test_orders_that_split_the_channels_differently_have_different_canonical_forms():
    splits = {tuple(Permutation(torch.tensor(order)).canonical(2).order.tolist()) for order in permutations(range(6))}
    assert len(splits) == 15  # 6! / (2!^3 3!) ways to split six channels into pairs


@pytest.mark.parametrize("seed", range(5))
def test_the_canonical_form_is_its_own_canonical_form(seed):
    canonical = random_permutation(12, seed).canonical(4)
    assert canonical.canonical(4) == canonical


def test_the_canonical_form_of_the_identity_is_the_identity():
    assert Permutation.identity(12).canonical(4) == Permutation.identity(12)


@pytest.mark.parametrize("order", [[0, 0, 1], [1, 2, 3], [-1, 0, 1], [[0, 1], [2, 3]]])
def test_an_order_needs_every_channel_exactly_once(order):
    with pytest.raises(ValueError, match="every channel 0..n-1 is needed exactly once"):
        Permutation(torch.tensor(order))


def test_the_canonical_form_needs_groups_that_divide_the_channels():
    with pytest.raises(ValueError, match="groups of 4 do not divide 6 channels"):
        Permutation.identity(6).canonical(4)


def original_mask(score, permutation, pattern):
    return permutation.inverse().apply(nm_mask(permutation.apply(score), pattern))
