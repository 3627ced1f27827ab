import pytest
import torch

from permllm.sparsity.bits import pack_mask, unpack_mask


@pytest.mark.parametrize("channels", [1, 7, 8, 12, 172])
def test_unpacking_undoes_packing_for_every_width(channels):
    mask = torch.rand(5, channels, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8 and packed.shape == (5, -(-channels // 8))
    unpacked = unpack_mask(packed, channels)
    assert unpacked.dtype == torch.bool and torch.equal(unpacked, mask)


def test_the_first_channel_is_the_lowest_bit():
    assert pack_mask(torch.tensor([[True, False, True, False, False, False, False, False, False, True]])).tolist() == [[5, 2]]
