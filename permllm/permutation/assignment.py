"""Exact linear sum assignment: from matrices of gains to the permutations with the highest sum.

Legend for the lockstep solver: `price` (blocks, size) is the dual variable of every column, a row's `cost` of a column is
how much less gain minus price it finds there than at its best column, and a row is free (-1) until it holds a column.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

LOCKSTEP_BLOCKS = 128  # on a GPU: with fewer blocks the launches of `batched_assignment` should cost more than SciPy; not measured
CHUNK_ENTRIES = 16 * 64 * 64  # per task of a thread: one to two milliseconds of work, several times what starting threads costs


def best_assignment(gain: Tensor) -> Tensor:
    """Choose one column per row with the highest total gain, for every matrix of a batch, exactly.

    Blocks whose rows all prefer different columns never leave the device of `gain`. Of equally good
    assignments, any one is returned.

    Args:
        gain: (blocks, size, size), finite in float32, to which it is rounded; `gain[b, i, j]` is gained when row
            `i` takes column `j`.

    Returns:
        (blocks, size) int64 on the device of `gain`: the column that each row takes.

    Raises:
        ValueError: if a gain is not finite.
    """
    gain = gain.detach().float()  # sums that are equal but for the rounding of float64 become equal
    if not gain.abs().amax(dim=(1, 2)).isfinite().all():  # NaN and infinity both outlast the maximum
        raise ValueError("the gains of an assignment must be finite in float32; they hold NaN or infinity")
    columns = gain.max(dim=2).indices
    is_permutation = (columns.sort(dim=1).values == torch.arange(gain.shape[1], device=gain.device)).all(dim=1)
    contested = (~is_permutation).nonzero().flatten()
    if len(contested):
        solve = batched_assignment if gain.is_cuda and len(contested) >= LOCKSTEP_BLOCKS else _scipy_assignment
        columns[contested] = solve(gain[contested])
    return columns


def _scipy_assignment(gain: Tensor) -> Tensor:
    """Solve block by block on the CPU, on as many threads as torch uses: SciPy lets go of the interpreter lock."""
    chunks = gain.cpu().split(max(1, CHUNK_ENTRIES // gain[0].numel()))
    if len(chunks) == 1 or torch.get_num_threads() == 1:
        solved = [_scipy_chunk(chunk) for chunk in chunks]
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            solved = list(threads.map(_scipy_chunk, chunks))
    return torch.cat(solved).to(gain.device)


def _scipy_chunk(gain: Tensor) -> Tensor:
    columns = [linear_sum_assignment(matrix, maximize=True)[1] for matrix in gain.numpy()]
    return torch.from_numpy(np.stack(columns))


def batched_assignment(gain: Tensor) -> Tensor:
    """Solve as `best_assignment` does, all blocks in lockstep on the device of `gain`, in float64.

    Its number of steps hardly grows with the number of blocks, so it suits GPUs and many blocks. Ties and
    gains close to an outer product need the most steps, up to `size` phases.

    Args:
        gain: (blocks, size, size); neither the gains nor their differences overflow, which is not checked.

    Returns:
        (blocks, size) int64: the column that each row takes.

    Source: shortest augmenting paths from all free rows at once, Balas, Miller, Pekny & Toth 1991.
    """
    gain = gain.detach().double()
    favourite = gain.argmax(dim=2)
    row = torch.arange(gain.shape[1], device=gain.device).expand_as(favourite)
    first = torch.full_like(favourite, gain.shape[1]).scatter_reduce(1, favourite, row, "amin")
    columns = favourite.where(first.gather(1, favourite) == row, -1)
    price = torch.zeros_like(gain[:, 0])
    while len(unsolved := (columns < 0).any(dim=1).nonzero().flatten()):
        columns[unsolved], price[unsolved] = _augment(gain[unsolved], columns[unsolved], price[unsolved])
    return columns


def _augment(gain: Tensor, columns: Tensor, price: Tensor) -> tuple[Tensor, Tensor]:
    """Give columns to more free rows, at least one per block; return columns and prices.

    Rows hold columns of cost 0 before and after, which makes the assignment optimal once no row is free.
    """
    profit = gain - price[:, None, :]
    cost = profit.amax(dim=2, keepdim=True) - profit
    distance, parent = _shortest_paths(cost, columns)
    return _flip_paths(columns, parent), price - distance  # at these prices every step of a path costs 0


def _shortest_paths(cost: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far every column is from the nearest free row, and the row before it on the way there.

    A path steps from a row to any column at its cost, and from a column to the row that holds it at no cost.
    """
    held = columns.clamp(min=0)
    row_distance = torch.zeros_like(cost[:, 0]).where(columns < 0, torch.inf)
    distance, parent = torch.full_like(row_distance, torch.inf), torch.zeros_like(columns)
    while True:
        through, row = (cost + row_distance[:, :, None]).min(dim=1)
        closer = through < distance  # strictly, or steps of cost 0 could close a circle of parents
        if not closer.any():
            return distance, parent
        distance, parent = through.where(closer, distance), row.where(closer, parent)
        row_distance = distance.gather(1, held)  # of held rows; free rows have had their say


def _flip_paths(columns: Tensor, parent: Tensor) -> Tensor:
    """Let every free row whose tree of paths reaches a vacant column shift the columns along that path.

    A column has one parent, so trees of different free rows share nothing and change at once.
    """
    free, held = columns < 0, columns.clamp(min=0)
    size = columns.shape[1]
    column = torch.arange(size, device=columns.device).expand_as(columns)
    ahead = [column.where(free.gather(1, parent), held.gather(1, parent))]  # one column towards the root; the last stays
    while 2 ** (len(ahead) - 1) < size:
        ahead.append(ahead[-1].gather(1, ahead[-1]))  # 2, 4, 8, ... columns
    root = parent.gather(1, ahead[-1])
    vacant = torch.zeros_like(columns).scatter_add(1, held, (~free).long()) == 0
    end = torch.full_like(columns, size).scatter_reduce(1, root, column.where(vacant, size), "amin")
    on_path = (end.gather(1, root) == column).long()
    for jump in ahead:
        on_path = on_path.scatter_reduce(1, jump, on_path, "amax")
    taken = torch.full_like(columns, -1).scatter_reduce(1, parent, column.where(on_path > 0, -1), "amax")
    return taken.where(taken >= 0, columns)
