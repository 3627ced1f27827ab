import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from permllm.kernels.permuted_norm import permuted_layer_norm, permuted_rms_norm, rms_norm
from permllm.permutation.permutation import Permutation

# Triton's interpreter cuts bfloat16 off where the compiled kernel rounds: off by up to a step at each of two roundings.
CUT_OFF = {"rtol": 2 * 2**-7, "atol": 2**-7}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 64), (3, 77), (5, 1000)]
EPS = 1e-5


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(tokens, channels, dtype, device="cpu"):
    x, weight, bias = (draw(*shape, dtype=dtype, seed=seed).to(device) for seed, shape in enumerate([(tokens, channels), (channels,), (channels,)]))
    return 3 * x + 1, weight, bias, Permutation.random(channels, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rms_norm_is_that_of_transformers_bit_for_bit(dtype):
    x, weight, _, permutation = operands(7, 96, dtype)
    norm = LlamaRMSNorm(96, EPS)
    norm.weight.data = weight
    assert torch.equal(rms_norm(x, weight, EPS), norm(x))
    assert torch.equal(permuted_rms_norm(x, permutation, weight, EPS), permutation.apply(norm(x)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "channels"), SHAPES)
def test_the_rms_norm_kernel_agrees_with_the_definition(triton_kernels, device, dtype, tokens, channels):
    x, weight, _, permutation = operands(tokens, channels, dtype, device)
    found = triton_kernels.rms_norm(x, permutation.order.to(device), weight, EPS)
    expected = permutation.apply(rms_norm(x, weight, EPS))
    is_cut_off = dtype == torch.bfloat16 and device.type == "cpu"
    torch.testing.assert_close(found, expected, **(CUT_OFF if is_cut_off else {}))
    # Sums in another order move float32 statistics by an ulp; rounded to 16 bits hardly a value changes.
    assert dtype == torch.float32 or is_cut_off or (found != expected).float().mean() < 0.01


def test_the_rms_norm_kernel_rounds_before_it_multiplies_by_the_weight(triton_kernels, device):
    x, weight, _, permutation = operands(4, 256, torch.bfloat16, device)
    weight = weight.float()
    found = triton_kernels.rms_norm(x, permutation.order.to(device), weight, EPS)
    assert found.dtype == torch.float32
    normalised = found / weight[permutation.order]
    torch.testing.assert_close(normalised, normalised.bfloat16().float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found, permutation.apply(rms_norm(x, weight, EPS)), rtol=2**-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "channels"), SHAPES)
def test_the_layer_norm_kernel_agrees_with_that_of_torch(triton_kernels, device, dtype, tokens, channels):
    x, weight, bias, permutation = operands(tokens, channels, dtype, device)
    found = triton_kernels.layer_norm(x, permutation.order.to(device), weight, bias, EPS)
    is_cut_off = dtype == torch.bfloat16 and device.type == "cpu"
    expected = permutation.apply(torch.nn.functional.layer_norm(x, (channels,), weight, bias, EPS))
    torch.testing.assert_close(found, expected, **(CUT_OFF if is_cut_off else {}))


def test_norm_kernels_take_tokens_that_lie_apart(triton_kernels, device):
    x, weight, bias, permutation = operands(9, 80, torch.float32, device)
    order = permutation.order.to(device)
    assert torch.equal(triton_kernels.rms_norm(x[::4], order, weight, EPS), triton_kernels.rms_norm(x, order, weight, EPS)[::4])
    assert torch.equal(triton_kernels.layer_norm(x[::4], order, weight, bias, EPS), triton_kernels.layer_norm(x, order, weight, bias, EPS)[::4])


def test_a_permuted_layer_norm_is_a_layer_norm_and_then_a_gather():
    x, weight, bias, permutation = operands(6, 48, torch.float32)
    found = permuted_layer_norm(x.view(2, 3, 48), permutation, weight, bias, EPS)
    assert torch.equal(found, torch.nn.functional.layer_norm(x.view(2, 3, 48), (48,), weight, bias, EPS)[..., permutation.order])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_permuted_norms_on_a_gpu_keep_leading_dimensions():
    x, weight, bias, permutation = operands(6, 48, torch.float32, "cuda")
    for norm, parameters in ((permuted_rms_norm, (weight,)), (permuted_layer_norm, (weight, bias))):
        found = norm(x.view(2, 3, 48), permutation, *parameters, EPS)
        on_cpu = norm(x.cpu().view(2, 3, 48), permutation, *(parameter.cpu() for parameter in parameters), EPS)
        torch.testing.assert_close(found.cpu(), on_cpu)
