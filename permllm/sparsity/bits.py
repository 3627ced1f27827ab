"""Masks as bits: one byte holds eight."""

import numpy as np
import torch
from torch import Tensor


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a bool (out, in) mask into uint8 (out, ceil(in / 8)), first channel in the highest bit."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=-1))


def unpack_mask(packed: Tensor, in_channels: int) -> Tensor:
    """Undo `pack_mask`: uint8 (out, ceil(in / 8)) to bool (out, in)."""
    return torch.from_numpy(np.unpackbits(packed.cpu().numpy(), axis=-1, count=in_channels)).bool()
