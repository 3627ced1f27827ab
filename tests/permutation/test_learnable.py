import pytest
import torch

from permllm.permutation.assignment import best_assignment
from permllm.permutation.learnable import LearnableBlockPermutation
from permllm.permutation.permutation import Permutation
from permllm.permutation.sinkhorn import sinkhorn


def learnable(channels=12, block_size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LearnableBlockPermutation(Permutation.random(channels, generator), block_size, generator)


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 6, 12])
def test_the_hard_value_is_exactly_a_permutation_matrix(block_size):
    matrix = learnable(block_size=block_size)(0.5, 5).matrix
    assert set(matrix.unique().tolist()) <= {0.0, 1.0}
    assert (matrix.sum(-1) == 1).all() and (matrix.sum(-2) == 1).all()


def test_matrix_and_order_are_the_same_permutation_after_the_start():
    module = learnable()
    value = module(0.5, 5)
    dense = module.start.matrix() @ torch.block_diag(*value.matrix)
    assert torch.equal(dense, value.permutation.matrix())


def test_the_hard_permutation_is_the_nearest_to_the_soft_one():
    module = learnable()
    value = module(0.5, 5)
    soft = sinkhorn(module.logits, 0.5, 5)
    for block, matrix in zip(soft, value.matrix, strict=True):
        columns = best_assignment(block[None])[0]
        assert torch.equal(matrix.argmax(-1), columns)


def test_the_gradient_is_that_of_the_soft_permutation():
    module = learnable().double()
    upstream = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(module(0.5, 5).matrix, module.logits, upstream)
    (expected,) = torch.autograd.grad(sinkhorn(module.logits, 0.5, 5), module.logits, upstream)
    torch.testing.assert_close(gradient, expected)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("iterations", [0, 5])
def test_without_a_generator_the_first_permutation_is_the_start(temperature, iterations):
    start = Permutation.random(12, torch.Generator().manual_seed(5))
    assert LearnableBlockPermutation(start, 4)(temperature, iterations).permutation == start


def test_channels_stay_in_their_block_of_the_start():
    module = learnable()
    order = module(0.5, 5).permutation.order.view(3, 4)
    assert torch.equal(order.sort(-1).values, module.start.order.view(3, 4).sort(-1).values)


def test_equal_generators_draw_equal_logits_between_minus_one_and_one():
    first, second = learnable(64, 16, seed=3), learnable(64, 16, seed=3)
    assert torch.equal(first.logits, second.logits) and not torch.equal(first.logits, learnable(64, 16, seed=4).logits)
    assert first.logits.min() < -0.9 and first.logits.max() > 0.9 and first.logits.abs().max() <= 1


def test_blocks_must_divide_the_channels():
    with pytest.raises(ValueError, match="blocks of 5 channels do not divide 12"):
        LearnableBlockPermutation(Permutation.identity(12), 5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_permutation_learns_on_a_gpu():
    value = learnable().cuda()(0.5, 5)
    assert value.matrix.is_cuda
    assert value.permutation == learnable()(0.5, 5).permutation
