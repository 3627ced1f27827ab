"""Normalise activations and permute their channels in one pass, so that a permutation in front of a linear costs no pass of its own.

The norms are elementwise apart from their statistics: permuting their result is gathering input, weight and bias in the same order.
"""

import torch
from torch import Tensor

from permllm.kernels.availability import triton_serves
from permllm.permutation.permutation import Permutation

MAX_CHANNELS = 32768  # a program of the kernel holds a whole row; wider rows are left to PyTorch


def permuted_rms_norm(x: Tensor, permutation: Permutation, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x²) + eps) * weight with its channels permuted.

    Args:
        x: (..., channels). Statistics are in float32, and the normalised value is rounded to x's type before it meets
            the weight, as in the `LlamaRMSNorm` of transformers.
        weight: (channels,), in the order before the permutation.

    Returns:
        (..., channels) in the wider of the types of x and weight.
    """
    if not _kernel_serves(x, permutation, weight):
        return permutation.apply(rms_norm(x, weight, eps))
    from permllm.kernels import triton_kernels

    return triton_kernels.rms_norm(x.reshape(-1, len(permutation)), permutation.order.to(x.device), weight, eps).view(x.shape)


def permuted_layer_norm(x: Tensor, permutation: Permutation, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return `torch.nn.functional.layer_norm` over the channels, with its channels permuted.

    Args:
        x: (..., channels), statistics in float32.
        weight: (channels,), in the order before the permutation; so is `bias`.
    """
    if not _kernel_serves(x, permutation, weight, bias):
        return permutation.apply(torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps))
    from permllm.kernels import triton_kernels

    return triton_kernels.layer_norm(x.reshape(-1, len(permutation)), permutation.order.to(x.device), weight, bias, eps).view(x.shape)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `LlamaRMSNorm` of (..., channels), unpermuted."""
    wide = x.float()
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normalised.to(x.dtype)


def _kernel_serves(x: Tensor, permutation: Permutation, *parameters: Tensor) -> bool:
    fits = all(tensor.shape == x.shape[-1:] for tensor in (permutation.order, *parameters))
    return fits and x.numel() > 0 and x.shape[-1] <= MAX_CHANNELS and triton_serves(x, *parameters)
