"""Permute activations at run time: a gather of channels, and the matrix product that it replaces."""

from torch import Tensor

from permllm.kernels.availability import triton_serves
from permllm.permutation.permutation import Permutation


def gather_channels(x: Tensor, permutation: Permutation) -> Tensor:
    """Reorder the channels of (..., channels) activations by a gather: one read and one write of each value."""
    if not triton_serves(x) or not x.numel():
        return permutation.apply(x)
    from permllm.kernels import triton_kernels

    return triton_kernels.gather(x.reshape(-1, len(permutation)), permutation.order.to(x.device)).view(x.shape)


def multiply_by_matrix(x: Tensor, matrix: Tensor) -> Tensor:
    """Reorder channels by a dense (channels, channels) permutation matrix, as the paper's release does. For comparison."""
    return x @ matrix
