"""A linear layer on a packed N:M weight: few tokens read the kept values alone, many multiply with the weight made dense for the call."""

from torch import Tensor, nn

from permllm.permutation.permutation import Permutation
from permllm.sparsity.packed import PackedWeight

MOST_DECODED_TOKENS = 8  # more of them make the product wait for arithmetic, and the weight's bytes matter no longer


class PackedLinear(nn.Module):
    """What `nn.Linear` computes, for inference, on a weight without its zeros.

    Args:
        weight: (out, in), its input channels in the order in which it is N:M.
        bias: (out,).
        permutation: the order of the input channels, where nothing before the layer gathers them.
    """

    def __init__(self, weight: PackedWeight, bias: Tensor | None = None, permutation: Permutation | None = None) -> None:
        super().__init__()
        self.pattern = weight.pattern
        self.out_features, self.in_features = weight.shape
        self.register_buffer("values", weight.values)
        self.register_buffer("bits", weight.bits)
        self.register_buffer("order", None if permutation is None else permutation.order)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def packed(self) -> PackedWeight:
        """The weight, on the device where the layer is."""
        return PackedWeight(self.values, self.bits, self.pattern, self.in_features)

    @property
    def weight(self) -> Tensor:
        """The weight with its zeros, (out, in), made anew at every access."""
        return self.packed.dense()

    def kernel(self, tokens: int) -> str:
        """Return which way so many tokens are multiplied."""
        return "dense"

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        if self.order is not None:
            x = x.index_select(-1, self.order)
        return nn.functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Return what `print` shows of the layer."""
        gathers = "" if self.order is None else ", gathers its input"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, pattern={self.pattern}{gathers}"
