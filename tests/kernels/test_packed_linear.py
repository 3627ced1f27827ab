import copy
import time

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from permllm.kernels import cpu_matvec, packed_linear, prefill
from permllm.kernels.gathering_norm import GatheringNorm
from permllm.kernels.packed_linear import PackedLinear
from permllm.kernels.prefill import choose_prefill
from permllm.permutation.permutation import Permutation
from permllm.sparsity.mask import nm_mask
from permllm.sparsity.packed import pack_weight
from permllm.sparsity.pattern import NMPattern

TOKENS = [1, 2, 8, 9, 64, 65]


def pair(pattern="2:4", dtype=torch.float32, bias=True, permutation=None, shape=(24, 40), seed=0):
    """Return a dense linear that is N:M in an order, and the packed one."""
    generator, parsed = torch.Generator().manual_seed(seed), NMPattern.parse(pattern)
    dense = nn.Linear(shape[1], shape[0], bias, dtype=dtype).requires_grad_(False)
    weight = torch.randn(shape, generator=generator)
    weight = weight.masked_fill(~nm_mask(weight.abs(), parsed), 0.0).to(dtype)
    dense.weight.copy_(weight if permutation is None else permutation.inverse().apply(weight))
    return dense, PackedLinear(pack_weight(weight, parsed), dense.bias, permutation)


def activations(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:8"])
def test_a_packed_linear_computes_what_the_dense_one_does(tokens, dtype, pattern):
    dense, packed = pair(pattern, dtype)
    x = activations(tokens, 40, dtype=dtype)
    error = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]  # of sums of 10 to 20 products, rounded
    torch.testing.assert_close(packed(x), dense(x), atol=error, rtol=error)
    assert packed(x).dtype == dtype


@pytest.mark.parametrize("shape", [(40,), (1, 1, 40), (2, 3, 40), (2, 200, 40), (0, 40)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_any_number_of_dimensions_passes(shape, bias):
    dense, packed = pair(bias=bias)
    torch.testing.assert_close(packed(activations(*shape)), dense(activations(*shape)))


@pytest.mark.parametrize("tokens", [1, 300])
def test_an_order_is_gathered(tokens):
    dense, packed = pair(permutation=Permutation.random(40, torch.Generator().manual_seed(3)))
    torch.testing.assert_close(packed(activations(tokens, 40)), dense(activations(tokens, 40)))


def test_few_tokens_run_the_kernel_and_many_the_dense_product(monkeypatch):
    _, packed = pair()
    monkeypatch.setattr(cpu_matvec, "why_unavailable", lambda device, dtype: None)
    assert [packed.kernel(tokens) for tokens in (0, 1, 64, 65)] == ["dense", "cpu_matvec", "cpu_matvec", "dense"]
    monkeypatch.setattr(cpu_matvec, "why_unavailable", lambda device, dtype: "no compiler")
    assert packed.kernel(1) == "dense"


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("most_bytes", [1, 700, 10**6])
def test_rows_made_dense_a_few_at_a_time_give_the_same_product(most_bytes, bias, monkeypatch):
    dense, packed = pair(bias=bias)
    expand, heights = cpu_matvec.expand, []
    monkeypatch.setattr(packed_linear, "EXPANDED_BYTES", most_bytes)
    monkeypatch.setattr(cpu_matvec, "expand", lambda weight: heights.append(len(weight.values)) or expand(weight))
    torch.testing.assert_close(packed(activations(3, 100, 40)), dense(activations(3, 100, 40)))
    assert heights == {1: [1] * 24, 700: [4] * 6, 10**6: [24]}[most_bytes]


def test_the_weight_is_the_dense_one_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        dense, packed = pair(dtype=dtype)
        assert torch.equal(packed.weight, dense.weight) and packed.weight.dtype == dtype


def test_without_a_kernel_the_product_is_the_same(monkeypatch):
    dense, packed = pair()
    monkeypatch.setattr(cpu_matvec, "why_unavailable", lambda device, dtype: "no compiler")
    torch.testing.assert_close(packed(activations(1, 40)), dense(activations(1, 40)))


def test_gradients_of_the_input_are_those_of_the_dense_layer(monkeypatch):
    monkeypatch.setattr(packed_linear, "EXPANDED_BYTES", 700)
    dense, packed = pair(permutation=Permutation.random(40, torch.Generator().manual_seed(3)))
    gradients = []
    for layer in (dense, packed):
        x = activations(2, 40).requires_grad_()
        layer(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


def test_autocast_reaches_the_dense_product(monkeypatch):
    monkeypatch.setattr(packed_linear, "EXPANDED_BYTES", 700)
    dense, packed = pair()
    x = activations(2, 40, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(x).dtype == dense(x).dtype == torch.bfloat16


def test_another_type_casts_the_values_and_not_the_bits():
    _, packed = pair(permutation=Permutation.random(40, torch.Generator().manual_seed(3)))
    cast = copy.deepcopy(packed).to(torch.bfloat16)
    assert (cast.values.dtype, cast.bits.dtype, cast.order.dtype) == (torch.bfloat16, torch.uint8, torch.int64)
    torch.testing.assert_close(cast.weight, packed.weight.to(torch.bfloat16))


def test_the_zeros_take_no_memory():
    dense, packed = pair(bias=False, shape=(64, 64))
    assert sum(tensor.nbytes for tensor in packed.state_dict().values()) == dense.weight.nbytes * (0.5 + 1 / 32)


def test_tensor_cores_are_taken_where_they_are_faster(monkeypatch):
    layers = [pair(seed=seed)[1] for seed in (0, 1)]
    monkeypatch.setattr(prefill, "why_unavailable", lambda *arguments: None)
    monkeypatch.setattr(prefill, "pack_semi_structured", lambda weight: weight)
    monkeypatch.setattr(cpu_matvec, "expand", lambda weight: time.sleep(1e-3) or weight.dense())
    assert choose_prefill(layers, 300) == {(24, 40): "semi_structured"}
    assert [layers[1].kernel(tokens) for tokens in (299, 300)] == ["dense", "semi_structured"]
    torch.testing.assert_close(layers[1](activations(300, 40)), torch.nn.functional.linear(activations(300, 40), layers[1].weight, layers[1].bias))


def test_prefill_stays_dense_where_there_are_no_tensor_cores():
    _, packed = pair()
    assert choose_prefill([packed], 300) == {(24, 40): "dense"} and packed.kernel(300) == "dense"


@pytest.mark.parametrize("kind", ["layer norm", "rms norm", "another"])
def test_a_gathering_norm_permutes_the_output(kind):
    norm = {"layer norm": nn.LayerNorm(40), "rms norm": LlamaRMSNorm(40), "another": nn.Identity()}[kind]
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    permutation = Permutation.random(40, torch.Generator().manual_seed(3))
    x = activations(2, 3, 40)
    assert torch.equal(GatheringNorm(norm, permutation)(x), permutation.apply(norm(x)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("pattern", ["2:4", "3:8"])
def test_a_gpu_computes_the_same(tokens, pattern):
    dense, packed = (layer.cuda() for layer in pair(pattern, shape=(64, 128)))
    x = activations(tokens, 128).cuda()
    assert packed.kernel(tokens) == (packed_linear.GPU_MATVEC if tokens <= 8 else packed_linear.DENSE)
    torch.testing.assert_close(packed(x), dense(x), atol=1e-3, rtol=1e-3)  # TF32 may be on


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("norm", [nn.LayerNorm(64), LlamaRMSNorm(64)], ids=["layer norm", "rms norm"])
def test_a_gathering_norm_on_a_gpu_permutes_the_output(norm):
    permutation = Permutation.random(64, torch.Generator().manual_seed(3))
    wrapped, x = GatheringNorm(norm, permutation).cuda(), activations(5, 64).cuda()
    torch.testing.assert_close(wrapped(x), permutation.apply(norm.cuda()(x)))
