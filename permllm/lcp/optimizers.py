"""Optimisers for permutation logits: steps of a set size in a chosen norm, in the direction that the gradient chooses.

A linear minimiser maps a direction `d` to the `z` of the norm's unit ball with the smallest inner product <d, z>.
It takes (..., rows, columns), treats every matrix by itself, computes in float32, and depends on the direction of
`d` but not on its size. Zero gives zero; NaN and infinity give NaN.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from permllm.lookup import lookup


def orthogonalize(matrix: Tensor) -> Tensor:
    """Push the singular values towards 1: (..., rows, columns) = U S V^T to about U V^T.

    Five Newton-Schulz steps bring singular values above 0.2 % of the Frobenius norm into [0.68, 1.21]; smaller
    ones stay smaller and zeros stay zero.

    Source: the quintic of Muon (Jordan et al. 2024), as used in arXiv:2502.07529.
    """
    matrix = matrix.float()
    tiny = torch.finfo(torch.float32).tiny
    matrix = matrix / matrix.abs().amax((-2, -1), keepdim=True).clamp_min(tiny)  # else the squares of small entries vanish
    matrix = matrix / matrix.norm(dim=(-2, -1), keepdim=True).clamp_min(tiny)
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    result = matrix.mT if is_tall else matrix  # the smaller Gram matrix
    for _ in range(5):
        gram = result @ result.mT
        result = 3.4445 * result + (-4.7750 * gram + 2.0315 * gram @ gram) @ result
    return result.mT if is_tall else result


def spectral_minimizer(direction: Tensor) -> Tensor:
    """Minimise over matrices of spectral norm up to 1: -U V^T, with the accuracy of `orthogonalize`."""
    return -orthogonalize(direction)


def sign_minimizer(direction: Tensor) -> Tensor:
    """Minimise over matrices with entries in [-1, 1]: the negative sign."""
    direction = direction.float()
    return -(direction.sign() + 0 * direction)  # the sign of NaN is 0


def double_center(matrix: Tensor) -> Tensor:
    """Subtract from (..., rows, columns) the means, so that every row and every column sums to 0.

    Constants added to rows or columns of logits are what Sinkhorn does not see.
    """
    matrix = matrix - matrix.mean(-1, keepdim=True)
    return matrix - matrix.mean(-2, keepdim=True)


class Scion(torch.optim.Optimizer):
    """Move by linear minimisers of an averaged gradient, inside a ball or freely.

    With gradient `g`, average `d` and the norm's linear minimiser `lmo`, a step is

        d <- (1 - momentum) d + momentum g
        x <- (1 - lr) x + lr radius lmo(d)      (constrained)
        x <- x + lr radius lmo(d)               (unconstrained)

    Constrained, a matrix that is within `radius` stays within; outside, its excess shrinks by `1 - lr` a step.
    `sign` keeps this exactly; `spectral` up to the factor 1.21 of `orthogonalize`.

    Args:
        params: (..., rows, columns) each, such as logits (blocks, size, size); every matrix is bounded by itself.
        lr: above 0; at most 1 if constrained.
        radius: above 0, in units of `norm`; it scales the step too.
        norm: an entry of `LINEAR_MINIMIZERS`; without factors for the shape, unlike in the paper: `spectral` bounds
            the largest singular value, `sign` the largest entry.
        momentum: share of the new gradient in the average, in (0, 1]; 1 is no average.
        constrained: whether the step contracts towards the ball.
        center: whether to drop from the average of square matrices what Sinkhorn does not see.

    Raises:
        ValueError: naming all settings out of range, or a parameter that is no matrix, or if `norm` is unknown.

    Source: arXiv:2502.07529, algorithms 1 (unconstrained) and 2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        radius: float,
        norm: str = "spectral",
        momentum: float = 0.1,
        constrained: bool = True,
        center: bool = True,
    ) -> None:
        super().__init__(params, {"lr": lr, "radius": radius, "norm": norm, "momentum": momentum, "constrained": constrained, "center": center})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own; what is left open is as in the constructor."""
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Move every parameter that has a gradient, and return what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["average"] = torch.zeros_like(parameter)
        direction = state["average"].lerp_(parameter.grad, group["momentum"])
        if group["center"] and direction.shape[-2] == direction.shape[-1]:
            direction = double_center(direction)
        corner = group["radius"] * LINEAR_MINIMIZERS[group["norm"]](direction).to(parameter.dtype)
        if group["constrained"]:
            parameter.lerp_(corner, group["lr"])  # unlike mul and add, never rounds to beyond the corner
        else:
            parameter.add_(corner, alpha=group["lr"])


def _check(group: dict[str, Any]) -> None:
    lookup(LINEAR_MINIMIZERS, group["norm"], "norm")
    bounds = {"lr": 1 if group["constrained"] else float("inf"), "radius": float("inf"), "momentum": 1}
    wrong = [f"{name} is {group[name]}, not in (0, {bound}]" for name, bound in bounds.items() if not 0 < group[name] <= bound]
    wrong += [f"a parameter has shape {tuple(parameter.shape)}, which is no matrix" for parameter in group["params"] if parameter.ndim < 2]
    if wrong:
        raise ValueError(f"Scion cannot use these settings: {'; '.join(wrong)}")


LINEAR_MINIMIZERS = {"spectral": spectral_minimizer, "sign": sign_minimizer}
