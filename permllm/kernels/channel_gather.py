"""Permute activations at run time: a gather of channels, and the matrix product that it replaces."""

from torch import Tensor

from permllm.permutation.permutation import Permutation


def gather_channels(x: Tensor, permutation: Permutation) -> Tensor:
    """Reorder the channels of (tokens, channels) activations by a gather: one read and one write of each value."""
    return permutation.apply(x)


def multiply_by_matrix(x: Tensor, matrix: Tensor) -> Tensor:
    """Reorder channels by a dense (channels, channels) permutation matrix, as the paper's release does. For comparison."""
    return x @ matrix
