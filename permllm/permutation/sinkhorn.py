"""Sinkhorn normalisation: logits to nearly doubly stochastic matrices, in the log domain."""

from torch import Tensor


def sinkhorn(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    """Relax permutations: turn logits into nearly doubly stochastic matrices.

    Args:
        logits: (blocks, size, size), any real values, float32 or float64.
        temperature: > 0; towards 0 the result approaches a permutation matrix.
        iterations: row-and-column sweeps, at least 0. After one or more, columns sum to 1 exactly and
            rows nearly; 0 gives the row softmax.

    Returns:
        (blocks, size, size), entries in [0, 1].

    Raises:
        ValueError: if `temperature` is not positive or `iterations` is negative.

    Source: Sinkhorn & Knopp 1967; Gumbel-Sinkhorn, arXiv:1802.08665.
    """
    if not temperature > 0 or iterations < 0:
        raise ValueError(f"Sinkhorn needs a temperature above 0 and at least 0 iterations, not {temperature} and {iterations}")
    log_matrix = logits / temperature
    if iterations == 0:
        return log_matrix.softmax(dim=-1)
    for _ in range(iterations):
        log_matrix = log_matrix.log_softmax(dim=-1)
        log_matrix = log_matrix.log_softmax(dim=-2)
    return log_matrix.exp()
