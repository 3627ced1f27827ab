"""What all updates have in common: a Gram matrix that can be trusted, and a result that is never worse than its input.

Legend: W (out, in) weight; G (in, in) Gram matrix of the input; s_j = sqrt(G_jj), 1 for a channel that is always zero.
In scaled channels the weight is T_ij = W_ij s_j and the Gram matrix G_ij / (s_i s_j) has a diagonal of 1: magnitude is then
Wanda's score. H is that matrix plus damping on its diagonal; a new weight V has the damped error tr((V - T) H (V - T)^T).
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from permllm.calibration.statistics import ActivationStats

logger = logging.getLogger(__name__)

LARGEST_DAMPING = 1.0  # as much as the mean of the diagonal itself: more would no longer be the Gram matrix
ESCALATION = 10.0  # of a damping that did not suffice
ROUNDING = 1e-6  # of an error, relative


_larger_dampings: ContextVar[list[float] | None] = ContextVar("larger_dampings", default=None)


@contextmanager
def larger_dampings() -> Iterator[list[float]]:
    """Yield a list that gets every damping that had to be larger than asked for meanwhile."""
    found: list[float] = []
    token = _larger_dampings.set(found)
    try:
        yield found
    finally:
        _larger_dampings.reset(token)


def damped(factorise: Callable[[float], Tensor], damping: float) -> tuple[Tensor, float]:
    """Factorise with as little damping as works, at least `damping`; a warning says where it took more.

    Args:
        factorise: a damping to a factorisation; raises `torch.linalg.LinAlgError` where that is too little.

    Returns:
        The factorisation, and the damping that it took.

    Raises:
        torch.linalg.LinAlgError: if even `LARGEST_DAMPING` does not suffice.
    """
    tried = damping
    while True:
        try:
            result = factorise(tried)
        except torch.linalg.LinAlgError as error:
            larger = tried * ESCALATION
            if larger > LARGEST_DAMPING:
                raise torch.linalg.LinAlgError(
                    "the Gram matrix is not positive definite, even with "
                    f"{tried:g} of its mean diagonal added; gather the statistics again with `calibrate`"
                ) from error
            tried = larger
        else:
            if tried > damping:
                if (found := _larger_dampings.get()) is not None:
                    found.append(tried)
                logger.warning("factorised the Gram matrix with a damping of %g of its mean diagonal: %g did not suffice", tried, damping)
            return result, tried


def check_gram(stats: ActivationStats, channels: int) -> None:
    """Refuse a Gram matrix that no update can use, and warn of one that too few tokens went into.

    Raises:
        ValueError: if it has not the weight's channels, is not finite, or has a negative diagonal.
    """
    if stats.gram.shape != (channels, channels):
        raise ValueError(f"a weight of {channels} input channels needs a Gram matrix ({channels}, {channels}), not {tuple(stats.gram.shape)}")
    if not stats.gram.isfinite().all():
        raise ValueError("the Gram matrix holds NaN or infinity; gather the statistics again with `calibrate`")
    if stats.gram.diagonal().min() < 0:
        raise ValueError("the Gram matrix has a negative diagonal: it is none; gather the statistics again with `calibrate`")
    if stats.tokens < channels:
        logger.warning(
            "%d calibration tokens leave the Gram matrix of %d channels rank-deficient: the update rests on damping; it needs at least %d tokens",
            stats.tokens, channels, channels,
        )  # fmt: skip


def scaled_gram(stats: ActivationStats, damping: float) -> tuple[Tensor, Tensor, float]:
    """Return H and s, float32, and the damping on H's diagonal: more than asked for where that leaves it indefinite.

    Raises:
        torch.linalg.LinAlgError: if no damping makes it positive definite.
    """
    scale = stats.norms.clone()
    scale[scale == 0] = 1.0  # a channel that is always zero: only damping acts on its weights, and keeps them
    scaled = (stats.gram.double() / scale.double() / scale.double()[:, None]).float()

    def positive_definite(tried: float) -> Tensor:
        gram = scaled.clone()
        gram.diagonal().add_(tried)
        torch.linalg.cholesky(gram)
        return gram

    gram, used = damped(positive_definite, damping)
    return gram, scale, used


@dataclass(frozen=True)
class Reconstruction:
    """The least squares problem that a weight update solves, in scaled channels; see the top of the file.

    Attributes:
        weight: (out, in) float32, the dense weight.
        target: (out, in) float32, T.
        gram: (in, in) float32, H.
        scale: (in,) float32, s.
        damping: on the diagonal of H.
    """

    weight: Tensor
    target: Tensor
    gram: Tensor
    scale: Tensor
    damping: float

    @classmethod
    def of(cls, weight: Tensor, stats: ActivationStats, damping: float) -> Self:
        """Scale and damp a problem, with more than `damping` where that leaves H indefinite.

        Raises:
            ValueError: see `check_gram`.
            torch.linalg.LinAlgError: if no damping makes the Gram matrix positive definite.
        """
        check_gram(stats, weight.shape[1])
        dense, (gram, scale, used) = weight.float(), scaled_gram(stats, damping)
        return cls(dense, dense * scale, gram, scale, used)

    def errors(self, solution: Tensor) -> Tensor:
        """Return the error of every row of V, (out,) float64, without damping."""
        change = solution - self.target
        return ((change @ self.gram - self.damping * change) * change).sum(1, dtype=torch.float64)

    def finish(self, solution: Tensor, mask: Tensor, start: Tensor, rows_together: int = 1) -> tuple[Tensor, Tensor]:
        """Return weight and mask in the channels as they came, of V where it is no worse than the start, row by row.

        Args:
            solution: (out, in), V, which may be anything where `mask` (out, in) does not keep it.
            start: (out, in) mask, that the dense weight is kept by in rows where V is worse; a warning tells how many.
            rows_together: how many consecutive rows have a mask in common, and so take V or leave it together.
        """
        dense = self.weight.masked_fill(~start, 0.0)
        allowed = self.errors(self.target * start) + ROUNDING * self.errors(torch.zeros_like(self.target))
        found, allowed = (errors.view(-1, rows_together).sum(1) for errors in (self.errors(solution * mask), allowed))
        is_worse = (~(found <= allowed)).repeat_interleave(rows_together)  # and where it is NaN
        if is_worse.any():
            logger.warning(
                "the update raises the output error of %d of %d rows: these keep the mask and the weights that they had",
                int(is_worse.sum()), len(is_worse),
            )  # fmt: skip
            mask = torch.where(is_worse[:, None], start, mask)
        updated = (solution / self.scale).masked_fill(~mask, 0.0)
        return torch.where(is_worse[:, None], dense, updated), mask
