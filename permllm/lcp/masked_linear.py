"""A linear whose N:M mask follows a permutation, and the gradient that the permutation gets from it.

Legend: W (out, in) weight; S (out, in) score; P permutation matrix, block-diagonal; M mask in the original order.
Forward: S^ = S P, M^ = the N:M mask of S^, M = M^ P^T, y = x (W * M)^T. With D = dL/dM, the straight-through
gradients are dL/dP = D^T M^ + S^T dS^, where dS^ pulls D P back through the softmax over every group of S^.
Permutations are gathers here and only the blocks on the diagonal of dL/dP are computed: nothing is (in, in).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from permllm.permutation.learnable import BlockPermutation, LearnableBlockPermutation
from permllm.permutation.permutation import Permutation
from permllm.sparsity.mask import group_softmax, group_softmax_gradient, nm_mask
from permllm.sparsity.pattern import NMPattern


class MaskedLinearFunction(torch.autograd.Function):
    """y = x (W * M)^T, keeping only x and the mask for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, matrix: Tensor, weight: Tensor, score: Tensor, mask: Tensor, order: Tensor, start: Tensor, pattern: NMPattern
    ) -> Tensor:
        """Multiply. `matrix` (blocks, size, size) only carries the gradient; `mask`, `order` are its value."""
        ctx.save_for_backward(x, weight, score, mask, order, start)
        ctx.pattern, ctx.matrix_shape, ctx.matrix_dtype = pattern, matrix.shape, matrix.dtype
        return linear(x, weight * mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `x` and of the permutation matrix."""
        x, weight, score, mask, order, start = ctx.saved_tensors
        grad_x = grad @ (weight * mask) if ctx.needs_input_grad[0] else None
        grad_mask = grad.flatten(0, -2).t() @ x.flatten(0, -2)
        grad_mask = (grad_mask * weight).to(score.dtype)
        soft_mask = group_softmax(score.index_select(1, order), ctx.pattern)
        grad_score = group_softmax_gradient(soft_mask, grad_mask.index_select(1, order), ctx.pattern)
        permuted_mask = mask.index_select(1, order).to(score.dtype)
        grad_matrix = _block_product(grad_mask.index_select(1, start), permuted_mask, ctx.matrix_shape)
        grad_matrix += _block_product(score.index_select(1, start), grad_score, ctx.matrix_shape)
        return grad_x, grad_matrix.to(ctx.matrix_dtype), None, None, None, None, None, None


def _block_product(left: Tensor, right: Tensor, shape: torch.Size) -> Tensor:
    """Return the diagonal blocks of left^T right, (blocks, size, size), from two (out, in) tensors."""
    blocks, size, _ = shape
    return torch.bmm(left.view(-1, blocks, size).permute(1, 2, 0), right.view(-1, blocks, size).transpose(0, 1))


class GroupPermutation(nn.Module):
    """The learnable permutation of one linear group, evaluated once per step for all its linears."""

    def __init__(self, learnable: LearnableBlockPermutation) -> None:
        super().__init__()
        self.learnable = learnable
        self._value: BlockPermutation | None = None

    @property
    def value(self) -> BlockPermutation:
        """The permutation of this step."""
        if self._value is None:
            raise RuntimeError("the permutation has no value yet; call `update` before the model runs")
        return self._value

    def update(self, temperature: float, iterations: int) -> None:
        """Harden the logits for this step."""
        self._value = self.learnable(temperature, iterations)

    @torch.no_grad()
    def fix(self, permutation: Permutation) -> None:
        """Take a given permutation, for evaluation: no gradient flows."""
        self._value = BlockPermutation(self.learnable.logits.detach(), permutation)


class MaskedLinear(nn.Module):
    """Stands in for an `nn.Linear` while its permutation learns. The weight is frozen and shared with the original.

    Args:
        original: the linear it replaces.
        score: (out, in) float32, importance of the weights.
        group: the permutation, shared with the other linears of the group.
    """

    def __init__(self, original: nn.Linear, score: Tensor, group: GroupPermutation, pattern: NMPattern) -> None:
        super().__init__()
        self.original = original
        self.group = [group]  # in a list: the group is a module of the trainer, not of every linear
        self.pattern = pattern
        self.register_buffer("score", score, persistent=False)
        self._order: Tensor | None = None
        self._mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the masked weight; (..., in) to (..., out)."""
        value = self.group[0].value
        order = value.permutation.order
        output = MaskedLinearFunction.apply(
            x, value.matrix, self.original.weight, self.score, self.mask(order), order, self.group[0].learnable.start_order, self.pattern
        )
        return output if self.original.bias is None else output + self.original.bias

    @torch.no_grad()
    def mask(self, order: Tensor) -> Tensor:
        """Return the mask of a channel order, in the original order; chosen anew only when the order changed."""
        if self._order is None or not torch.equal(self._order, order):
            self._mask = torch.empty_like(self.score, dtype=torch.bool).index_copy_(
                1, order, nm_mask(self.score.index_select(1, order), self.pattern)
            )
            self._order = order
        return self._mask
