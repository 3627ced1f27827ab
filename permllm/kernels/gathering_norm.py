"""A norm whose output comes in another channel order, for the linears after it."""

from torch import Tensor, nn

from permllm.permutation.permutation import Permutation


class GatheringNorm(nn.Module):
    """Another norm and a gather of its output.

    Args:
        norm: a norm over the last dimension.
        permutation: of its output.
    """

    def __init__(self, norm: nn.Module, permutation: Permutation) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("order", permutation.order)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., channels), and permute the channels."""
        return self.norm(x).index_select(-1, self.order)
