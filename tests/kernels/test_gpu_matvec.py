import pytest
import torch

from permllm.kernels.gpu_matvec import matvec, multiply_dense, why_unavailable
from permllm.sparsity.mask import nm_mask
from permllm.sparsity.packed import PackedWeight, pack_weight
from permllm.sparsity.pattern import NMPattern

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PATTERNS = ["2:4", "4:8", "1:4", "3:5", "8:32", "5:31", "31:32", "1:2", "7:12"]  # 5:31 has groups that touch five bytes


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def draw_packed(rows, groups, pattern, dtype=torch.float32, device="cpu"):
    pattern = NMPattern.parse(pattern)
    weight = draw(rows, groups * pattern.group, dtype=dtype, seed=1)
    return pack_weight(weight.masked_fill(~nm_mask(weight.abs(), pattern), 0.0), pattern).to(device)


def assert_product(found, x, packed, bias=None):
    """Compare with float64: the float32 sums differ by their order, far below the steps of the 16-bit types."""
    exact = torch.nn.functional.linear(x.double(), packed.dense().double(), None if bias is None else bias.double())
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[x.dtype]
    assert found.dtype == x.dtype
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance * exact.abs().mean().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("tokens", "rows", "groups"), [(1, 6, 7), (3, 5, 64), (8, 3, 1)])
def test_the_kernel_multiplies_any_pattern(triton_kernels, device, pattern, dtype, tokens, rows, groups):
    packed = draw_packed(rows, groups, pattern, dtype, device)
    x, bias = draw(tokens, packed.in_channels, dtype=dtype).to(device), draw(rows, dtype=dtype, seed=2).to(device)
    assert_product(triton_kernels.matvec(x, packed, None), x, packed)
    assert_product(triton_kernels.matvec(x, packed, bias), x, packed, bias)


@pytest.mark.parametrize("tokens", range(1, 9))
def test_the_kernel_multiplies_one_to_eight_tokens(triton_kernels, device, tokens):
    packed = draw_packed(10, 33, "2:4", torch.bfloat16, device)
    x = draw(tokens, packed.in_channels, dtype=torch.bfloat16).to(device)
    assert_product(triton_kernels.matvec(x, packed, None), x, packed)


@pytest.mark.parametrize(("rows", "groups", "tokens"), [(1, 1030, 1), (2, 1100, 4), (2051, 3, 1), (4097, 2, 8)])
def test_the_kernel_walks_over_many_groups_and_rows(triton_kernels, device, rows, groups, tokens):
    packed = draw_packed(rows, groups, "2:4", torch.float32, device)
    x = draw(tokens, packed.in_channels).to(device)
    assert_product(triton_kernels.matvec(x, packed, None), x, packed)


def test_every_place_of_the_kept_weights_in_a_group_is_found(triton_kernels, device):
    pattern = NMPattern(4, 8)
    masks = torch.tensor([[number >> bit & 1 for bit in range(8)] for number in range(256) if number.bit_count() == 4])
    packed = pack_weight(masks * torch.arange(1.0, 9.0), pattern).to(device)
    found = triton_kernels.matvec(torch.eye(8, device=device), packed, None)
    assert torch.equal(found.cpu().T, masks * torch.arange(1.0, 9.0))


def test_the_kernel_takes_tokens_that_lie_apart_and_misaligned_values(triton_kernels, device):
    packed = draw_packed(6, 8, "2:4", torch.bfloat16, device)
    values = torch.cat([packed.values.new_zeros(1), packed.values.flatten()])[1:].view_as(packed.values)
    x = draw(9, packed.in_channels, dtype=torch.bfloat16).to(device)[::3]
    misaligned = PackedWeight(values, packed.bits, packed.pattern, packed.in_channels)
    assert values.data_ptr() % 4 and torch.equal(triton_kernels.matvec(x, misaligned, None), triton_kernels.matvec(x.contiguous(), packed, None))


def test_a_channel_that_a_row_does_not_keep_is_not_read(triton_kernels, device):
    packed = pack_weight(torch.tensor([[1.0, 2.0, 0.0, 0.0]]), NMPattern(2, 4)).to(device)
    x = torch.tensor([[1.0, 1.0, float("nan"), float("inf")]], device=device)
    assert triton_kernels.matvec(x, packed, None).tolist() == [[3.0]]


def test_matvec_without_a_gpu_multiplies_with_the_dense_weight():
    packed, x, bias = draw_packed(6, 8, "2:4"), draw(2, 1, 32), draw(6, seed=2)
    assert torch.equal(matvec(x, packed, bias), torch.nn.functional.linear(x, packed.dense(), bias))
    assert torch.equal(multiply_dense(x, packed, bias), matvec(x, packed, bias))


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(1, 28), None, "takes 32 channels in torch.float32 on cpu, not 28"),
        (torch.zeros(1, 32, dtype=torch.float16), None, "not 32 in torch.float16"),
        (torch.zeros(9, 32), None, "1 to 8 tokens are needed, not 9"),
        (torch.zeros(0, 32), None, "not 0"),
        (torch.zeros(1, 32), torch.zeros(5), r"the bias must have shape \(6,\), not \(5,\)"),
    ],
)
def test_operands_that_do_not_fit_are_refused(x, bias, message):
    with pytest.raises(ValueError, match=message):
        matvec(x, draw_packed(6, 8, "2:4"), bias)


@pytest.mark.parametrize(
    ("pattern", "dtype", "device", "reason"),
    [
        ("2:4", torch.float32, "cpu", "need a CUDA device, not cpu"),
        ("2:4", torch.float64, "cuda", "not torch.float64"),
        ("4:64", torch.float32, "cuda", "M up to 32, not 4:64"),
    ],
)
def test_the_reason_why_the_kernel_is_unavailable_is_given(pattern, dtype, device, reason):
    assert reason in why_unavailable(draw_packed(2, 1, pattern, dtype), torch.device(device))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_matvec_on_a_gpu_runs_the_kernel():
    packed = draw_packed(4096, 1024, "2:4", torch.bfloat16, "cuda")
    x, bias = draw(2, 1, 4096, dtype=torch.bfloat16).cuda(), draw(4096, dtype=torch.bfloat16, seed=2).cuda()
    assert why_unavailable(packed, x.device) is None
    found = matvec(x, packed, bias)
    assert found.shape == (2, 1, 4096)
    assert_product(found, x, packed, bias)
