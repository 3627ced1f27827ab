from itertools import permutations

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from permllm.permutation import assignment
from permllm.permutation.assignment import batched_assignment, best_assignment
from permllm.permutation.sinkhorn import sinkhorn

SOLVERS = [best_assignment, batched_assignment]
SIZES = [1, 2, 3, 5, 8, 17, 33, 64]


def random(blocks, size, seed=0):
    return torch.randn(blocks, size, size, generator=torch.Generator().manual_seed(seed))


def near_permutations(blocks, size, noise=0.3):
    """What Sinkhorn makes of random permutations with some noise; hardly any block is settled by its largest entries."""
    order = random(blocks, size, seed=1)[:, 0].argsort(dim=-1)
    return sinkhorn(torch.eye(size)[order] + noise * random(blocks, size), 0.1, 5)


GAINS = {
    "normal": random,
    "few distinct values": lambda blocks, size: (2 * random(blocks, size)).round(),
    "mostly zero": lambda blocks, size: random(blocks, size).sub(1.5).clamp(min=0),
    "constant": lambda blocks, size: torch.full((blocks, size, size), 0.3),
    "equal rows": lambda blocks, size: random(blocks, size)[:, :1].expand(-1, size, -1),
    "equal columns": lambda blocks, size: random(blocks, size)[:, :, :1].expand(-1, -1, size),
    "outer products": lambda blocks, size: random(blocks, size)[:, :, :1] * random(blocks, size, seed=1)[:, :1],
    "from tiny to huge": lambda blocks, size: (6 * random(blocks, size)).exp(),
    "soft, temperature 1": lambda blocks, size: sinkhorn(random(blocks, size), 1.0, 5),
    "soft, temperature 0.1": lambda blocks, size: sinkhorn(random(blocks, size), 0.1, 5),
    "soft, temperature 0.001": lambda blocks, size: sinkhorn(random(blocks, size), 0.001, 5),
    "soft, transposed": lambda blocks, size: sinkhorn(random(blocks, size), 0.1, 5).transpose(1, 2),
    "near permutations": near_permutations,
}


def total(gain, columns):
    return gain.double().gather(2, columns[:, :, None]).sum(dim=(1, 2))


def scipy_columns(gain):
    return torch.stack([torch.from_numpy(linear_sum_assignment(matrix, maximize=True)[1]) for matrix in gain.double().numpy()])


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("rounded", [False, True])
def test_no_permutation_gains_more_than_the_assignment(solve, size, rounded):
    gain = random(20, size, seed=size)
    gain = gain.round() if rounded else gain
    orders = torch.tensor(list(permutations(range(size))))
    most = gain.double()[:, torch.arange(size), orders].sum(-1).amax(-1)
    torch.testing.assert_close(total(gain, solve(gain)), most, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", GAINS)
def test_the_assignment_is_a_permutation_that_gains_as_much_as_that_of_scipy(solve, kind, size):
    gain = GAINS[kind](20, size)
    columns = solve(gain)
    assert columns.dtype == torch.int64
    assert torch.equal(columns.sort(dim=1).values, torch.arange(size).expand(20, size))
    torch.testing.assert_close(total(gain, columns), total(gain, scipy_columns(gain)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize("size", SIZES)
def test_without_ties_the_permutation_is_that_of_scipy(solve, size):
    gain = random(20, size)
    assert torch.equal(solve(gain), scipy_columns(gain))


@pytest.mark.parametrize("solve", SOLVERS)
def test_row_i_takes_column_j_where_the_gain_at_i_j_is_highest(solve):
    assert solve(torch.tensor([[[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]])).tolist() == [[1, 2, 0]]


@pytest.mark.parametrize("solve", SOLVERS)
def test_a_row_gives_way_where_it_loses_less(solve):
    assert solve(torch.tensor([[[3.0, 2.0, 0.0], [3.0, 0.0, 0.0], [2.0, 2.5, 2.0]]])).tolist() == [[1, 0, 2]]


@pytest.mark.parametrize("solve", SOLVERS)
def test_no_blocks_need_no_assignment(solve):
    columns = solve(torch.empty(0, 4, 4))
    assert columns.shape == (0, 4) and columns.dtype == torch.int64


@pytest.mark.parametrize("solve", SOLVERS)
def test_a_block_does_not_depend_on_the_others(solve):
    gain = torch.cat([near_permutations(6, 12, noise=0.0), random(6, 12), torch.zeros(1, 12, 12)])[torch.tensor([7, 0, 12, 3, 9, 1, 11])]
    assert torch.equal(solve(gain), torch.cat([solve(block[None]) for block in gain]))


def test_gains_that_differ_by_the_rounding_of_float64_are_told_apart_by_the_batched_solver_only():
    gain = torch.ones(1, 3, 3, dtype=torch.float64)
    gain[0, [0, 1, 2], [2, 0, 1]] += 1e-12
    assert batched_assignment(gain).tolist() == [[2, 0, 1]]
    assert torch.equal(best_assignment(gain), best_assignment(torch.ones(1, 3, 3)))


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gains_are_assigned_exactly(solve, dtype):
    gain = random(4, 9).to(dtype).requires_grad_()
    torch.testing.assert_close(total(gain, solve(gain)), total(gain, scipy_columns(gain.detach())), rtol=1e-9, atol=0)


def test_only_blocks_whose_rows_prefer_the_same_column_are_solved(monkeypatch):
    solved = []

    def solve(gain):
        solved.append(gain)
        return batched_assignment(gain)

    monkeypatch.setattr(assignment, "_scipy_assignment", solve)
    settled, contested = near_permutations(5, 8, noise=0.0), random(2, 8)
    columns = best_assignment(torch.cat([contested[:1], settled, contested[1:]]))
    assert torch.equal(columns[1:-1], scipy_columns(settled))
    assert len(solved) == 1 and torch.equal(solved[0], contested)


def test_threads_do_not_change_the_assignment():
    gain = random(70, 64)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        columns = best_assignment(gain)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(columns, scipy_columns(gain))


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_gains_that_are_not_finite_are_refused(broken):
    gain = torch.zeros(2, 3, 3)
    gain[1, 2, 0] = broken
    with pytest.raises(ValueError, match="must be finite"):
        best_assignment(gain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize("blocks", [1, assignment.LOCKSTEP_BLOCKS])
def test_a_gpu_gains_as_much_as_the_cpu(solve, blocks):
    gain = torch.cat([draw(blocks, 16) for draw in GAINS.values()])
    columns = solve(gain.cuda())
    assert columns.is_cuda
    assert torch.equal(columns.cpu().sort(dim=1).values, torch.arange(16).expand(len(gain), 16))
    torch.testing.assert_close(total(gain, columns.cpu()), total(gain, scipy_columns(gain)), rtol=1e-9, atol=1e-12)
