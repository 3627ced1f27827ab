"""Masks as bits: one byte holds eight."""

import torch
from torch import Tensor


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a bool (out, in) mask into uint8 (out, ceil(in / 8)); of a byte's channels the first is the lowest bit."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8))
    return (padded.unflatten(-1, (-1, 8)) << _places(mask.device)).sum(-1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, in_channels: int) -> Tensor:
    """Undo `pack_mask`: uint8 (out, ceil(in / 8)) to bool (out, in)."""
    return ((packed[..., None] >> _places(packed.device)) & 1).flatten(-2)[..., :in_channels].bool()


def _places(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
