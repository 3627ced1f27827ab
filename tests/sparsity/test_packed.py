import math

import pytest
import torch

from permllm.sparsity.mask import nm_mask
from permllm.sparsity.packed import SAME_SIZE_INTEGERS, PackedWeight, pack_weight
from permllm.sparsity.pattern import NMPattern

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PATTERNS = ["2:4", "4:8", "1:4", "3:5", "8:32"]


def sparse(rows, groups, pattern, dtype=torch.float32, seed=0):
    weight = torch.randn(rows, groups * pattern.group, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return weight.masked_fill(~nm_mask(weight.float().abs(), pattern), 0.0)


def bits_of(weight):
    return weight.view(SAME_SIZE_INTEGERS[weight.element_size()])


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 3, 16])
def test_packing_gives_the_weight_back_bit_for_bit(text, dtype, groups):
    pattern = NMPattern.parse(text)
    weight = sparse(5, groups, pattern, dtype)
    weight[0] = 0.0
    weight[1, : pattern.group] = 0.0
    packed = pack_weight(weight, pattern)
    assert packed.shape == weight.shape and packed.values.dtype == dtype
    assert (packed.mask().unflatten(1, (-1, pattern.group)).sum(-1) == pattern.kept).all()
    assert torch.equal(bits_of(packed.dense()), bits_of(weight))


def test_bytes_of_2_of_4_in_bfloat16_are_those_promised():
    packed = pack_weight(sparse(64, 32, NMPattern(2, 4), torch.bfloat16), NMPattern(2, 4))
    assert packed.nbytes == 64 * 128 * 2 * 0.5625


def test_values_are_in_the_order_of_their_channels():
    weight = torch.tensor([[0.0, 5.0, 0.0, 6.0, 7.0, 8.0, 0.0, 0.0]])
    packed = pack_weight(weight, NMPattern(2, 4))
    assert packed.values.tolist() == [[5.0, 6.0, 7.0, 8.0]] and packed.bits.tolist() == [[0b00111010]]


def test_a_negative_zero_is_kept_and_counts():
    weight = torch.tensor([[-0.0, 5.0, 0.0, 0.0]])
    assert math.copysign(1, pack_weight(weight, NMPattern(2, 4)).dense()[0, 0]) == -1
    with pytest.raises(ValueError, match="row 0 group 0 holds 2 values that are not"):
        pack_weight(weight, NMPattern(1, 4))


def test_violations_are_named_with_row_and_group_and_counted():
    weight = sparse(4, 8, NMPattern(2, 4))
    weight[1, 8:12] = 1.0
    weight[3] = 1.0
    with pytest.raises(ValueError, match=r"not 2:4: row 1 group 2 holds 4, row 3 group 0 holds 4, .* and 4 more values"):
        pack_weight(weight, NMPattern(2, 4))
    with pytest.raises(ValueError, match="not 1:4"):  # pruned with another pattern than claimed
        pack_weight(sparse(4, 8, NMPattern(2, 4)), NMPattern(1, 4))


@pytest.mark.parametrize(("value", "message"), [(float("nan"), r"NaN or infinity at \(row, channel\) \(2, 3\)"), (float("inf"), "NaN or infinity")])
def test_what_is_not_finite_is_refused(value, message):
    weight = sparse(4, 2, NMPattern(2, 4))
    weight[2, 3] = value
    with pytest.raises(ValueError, match=message):
        pack_weight(weight, NMPattern(2, 4))


@pytest.mark.parametrize(
    ("weight", "message"),
    [(torch.zeros(8), "matrix of floats"), (torch.zeros(2, 8, dtype=torch.int32), "matrix of floats"), (torch.zeros(2, 10), "multiples of 4")],
)
def test_what_is_no_weight_is_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        pack_weight(weight, NMPattern(2, 4))


def test_parts_that_do_not_fit_each_other_are_refused():
    packed = pack_weight(sparse(4, 8, NMPattern(2, 4)), NMPattern(2, 4))
    with pytest.raises(ValueError, match=r"needs values \(4, 16\) and uint8 bits \(4, 4\), not \(4, 15\)"):
        PackedWeight(packed.values[:, 1:], packed.bits, packed.pattern, packed.in_channels)
