"""Exact linear sum assignment: from a matrix of gains to the permutation with the highest sum."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def best_assignment(gain: Tensor) -> Tensor:
    """Choose one column per row with the highest total gain, for every matrix of a batch, exactly.

    Args:
        gain: (blocks, size, size), finite; `gain[b, i, j]` is gained when row `i` takes column `j`.

    Returns:
        (blocks, size) int64 on the device of `gain`: the column that each row takes.

    Raises:
        ValueError: if a gain is not finite.

    Source: Jonker-Volgenant as in `scipy.optimize.linear_sum_assignment`.
    """
    if not gain.isfinite().all():
        raise ValueError("the gains of an assignment must be finite; they hold NaN or infinity")
    matrices = gain.detach().float().cpu().numpy()  # one copy for the whole batch
    columns = [linear_sum_assignment(matrix, maximize=True)[1] for matrix in matrices]
    return torch.stack([torch.from_numpy(column) for column in columns]).to(gain.device)
