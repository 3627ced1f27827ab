"""A norm whose output comes in another channel order, for the linears after it."""

from torch import Tensor, nn

from permllm.kernels.permuted_norm import permuted_layer_norm, permuted_rms_norm
from permllm.permutation.permutation import Permutation


class GatheringNorm(nn.Module):
    """Another norm and a gather of its output; on a GPU in one pass.

    Args:
        norm: over the last dimension: `nn.LayerNorm`, an RMS norm of transformers, or any other, which is never fused.
        permutation: of its output.
    """

    def __init__(self, norm: nn.Module, permutation: Permutation) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("order", permutation.order)
        self._permutation = permutation

    @property
    def permutation(self) -> Permutation:
        """The order of the output, on the device where the norm is."""
        if self._permutation.order is not self.order:  # it was moved; checking an order takes too long for every call
            self._permutation = Permutation(self.order)
        return self._permutation

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., channels), and permute the channels."""
        norm = self.norm
        if x.is_cuda and isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None:
            return permuted_layer_norm(x, self.permutation, norm.weight, norm.bias, norm.eps)
        if x.is_cuda and hasattr(norm, "variance_epsilon"):
            return permuted_rms_norm(x, self.permutation, norm.weight, norm.variance_epsilon)
        return norm(x).index_select(-1, self.order)
