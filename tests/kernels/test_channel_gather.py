import pytest
import torch

from permllm.kernels.channel_gather import gather_channels
from permllm.permutation.permutation import Permutation

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def draw_permutation(channels):
    return Permutation.random(channels, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "channels"), [(1, 64), (1, 1), (3, 77), (17, 512), (9, 1300)])
def test_the_kernel_gathers_exactly(triton_kernels, device, dtype, tokens, channels):
    x, permutation = draw(tokens, channels, dtype=dtype).to(device), draw_permutation(channels)
    assert torch.equal(triton_kernels.gather(x, permutation.order.to(device)), permutation.apply(x))


@pytest.mark.parametrize("cut", [lambda x: x[::3], lambda x: x[:, 5:69], lambda x: x[:, ::2], lambda x: x[:1].expand(5, -1)])
def test_the_kernel_gathers_tokens_that_lie_apart(triton_kernels, device, cut):
    x = cut(draw(10, 128).to(device))
    permutation = draw_permutation(x.shape[1])
    gathered = triton_kernels.gather(x, permutation.order.to(device))
    assert gathered.is_contiguous() and torch.equal(gathered, permutation.apply(x))


def test_a_gather_keeps_leading_dimensions_and_gradients():
    x, permutation = draw(2, 3, 16).requires_grad_(), draw_permutation(16)
    gathered = gather_channels(x, permutation)
    gathered[..., 0].sum().backward()
    assert torch.equal(gathered, permutation.apply(x))
    assert (x.grad.nonzero()[:, -1] == permutation.order[0]).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(5, 96), (2, 3, 96), (0, 96)], ids=str)
def test_gathers_agree_on_a_gpu_whoever_runs_them(shape):
    x, permutation = draw(*shape).cuda(), draw_permutation(96)
    assert torch.equal(gather_channels(x, permutation), permutation.apply(x))
    assert gather_channels(x.double().requires_grad_(), permutation).requires_grad
