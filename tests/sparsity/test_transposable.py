"""Transposable masks against brute force over all masks of a 4 x 4 block, and against linear programs of larger ones."""

from itertools import combinations, product

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, LinearConstraint, milp

from permllm.sparsity import transposable as module
from permllm.sparsity.mask import nm_mask
from permllm.sparsity.pattern import NMPattern
from permllm.sparsity.transposable import improved_mask, relaxed_mask, rounded_mask, transposable_mask

PATTERNS = ["1:2", "1:4", "2:4", "3:4", "2:8", "4:8", "3:6", "8:16"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def regular_masks(kept, size):
    """List all masks of a block with exactly `kept` in every row and column, (masks, size, size)."""
    rows = [[float(column in chosen) for column in range(size)] for chosen in combinations(range(size), kept)]
    masks = torch.tensor(list(product(rows, repeat=size)))
    return masks[(masks.sum(1) == kept).all(1)]


def best_mask(score, kept):
    """Solve one block as an integer program."""
    size = len(score)
    sums = np.concatenate([np.kron(np.eye(size), np.ones(size)), np.kron(np.ones(size), np.eye(size))])
    found = milp(-score.double().numpy().ravel(), constraints=LinearConstraint(sums, kept, kept), integrality=np.ones(size**2), bounds=Bounds(0, 1))
    return torch.from_numpy(found.x.reshape(size, size).round()).bool()


def gap(blocks, masks, best):
    return 1 - (blocks * masks).sum((1, 2)) / (blocks * best).sum((1, 2))


@pytest.mark.parametrize("text", PATTERNS)
def test_rows_and_columns_keep_exactly_n_of_every_m(text):
    pattern = NMPattern.parse(text)
    mask = transposable_mask(normal(5 * pattern.group, 3 * pattern.group).abs(), pattern)
    for side in (mask, mask.t()):
        assert (side.unflatten(1, (-1, pattern.group)).sum(-1) == pattern.kept).all()


@pytest.mark.parametrize("constant", [0.0, 1.0, -3.0])
def test_equal_scores_give_a_mask_too(constant):
    mask = transposable_mask(torch.full((16, 32), constant), NMPattern(4, 8))
    assert (mask.unflatten(1, (-1, 8)).sum(-1) == 4).all() and (mask.t().unflatten(1, (-1, 8)).sum(-1) == 4).all()


def test_there_are_ninety_masks_of_two_in_four():
    assert len(regular_masks(2, 4)) == 90


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_the_best_of_all_masks_is_found_or_nearly(kept):
    blocks = normal(1000, 4, 4).abs()
    masks = transposable_mask(blocks.flatten(0, 1), NMPattern(kept, 4)).view(-1, 4, 4)
    kept_scores = blocks.flatten(1) @ regular_masks(kept, 4).flatten(1).t()
    gaps = 1 - (blocks * masks).sum((1, 2)) / kept_scores.max(1).values
    assert gaps.min() > -1e-6 and gaps.mean() < 1e-3 and gaps.max() < 0.05


@pytest.mark.parametrize(("text", "count"), [("4:8", 40), ("2:8", 20), ("8:16", 20)])
@pytest.mark.parametrize("spread", [1.0, 3.0], ids=["normal", "heavy-tailed"])
def test_the_kept_score_is_near_that_of_the_exact_solution(text, count, spread):
    pattern = NMPattern.parse(text)
    blocks = normal(count, pattern.group, pattern.group).abs() ** spread
    masks = transposable_mask(blocks.flatten(0, 1), pattern).view(blocks.shape)
    best = torch.stack([best_mask(block, pattern.kept) for block in blocks])
    gaps = gap(blocks, masks, best)
    assert gaps.min() > -1e-6 and gaps.mean() < 0.01 and gaps.max() < 0.05


def test_real_weights_are_masked_as_well(shipped_model):
    from permllm.benchmark.transposable import gaps, real_blocks

    found = gaps(real_blocks(str(shipped_model), 40, 8), NMPattern(4, 8))
    assert found.mean() < 0.01 and found.max() < 0.05


def test_a_score_whose_nm_mask_is_transposable_already_keeps_that_mask():
    one = regular_masks(2, 4)[40].repeat(3, 2)
    score = normal(12, 8).abs() * 0.1 + one
    assert torch.equal(transposable_mask(score, NMPattern(2, 4)), nm_mask(score, NMPattern(2, 4)))


@pytest.mark.parametrize("factor", [1e-20, 1e20])
def test_the_scale_of_a_score_does_not_matter(factor):
    score = normal(32, 32).abs()
    assert torch.equal(transposable_mask(score * factor, NMPattern(4, 8)), transposable_mask(score, NMPattern(4, 8)))


def test_blocks_do_not_depend_on_each_other(monkeypatch):
    score = normal(16, 24).abs()
    together = transposable_mask(score, NMPattern(4, 8))
    monkeypatch.setattr(module, "BATCH_ENTRIES", 1)
    assert float((score * transposable_mask(score, NMPattern(4, 8))).sum()) == pytest.approx(float((score * together).sum()), rel=1e-3)


def test_the_relaxed_mask_has_the_sums_and_bounds_of_a_mask():
    relaxed, is_converged = relaxed_mask(normal(50, 8, 8).abs() / 4, 4)
    assert is_converged.all() and relaxed.min() >= 0 and relaxed.max() <= 1
    torch.testing.assert_close(relaxed.sum(2), torch.full((50, 8), 4.0), atol=0.05, rtol=0)


def test_rounding_fills_rows_and_columns_that_the_greedy_choice_left_open():
    """By the largest entries first, rows 0 to 2 take what row 3 needs."""
    relaxed = torch.tensor([[[9.0, 8, 1, 1], [9, 8, 1, 1], [1, 1, 7, 6], [1, 1, 1, 5]]]) / 10
    mask = rounded_mask(relaxed, relaxed, 2)
    assert (mask.sum(1) == 2).all() and (mask.sum(2) == 2).all()


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_after_the_swaps_no_swap_of_two_rows_and_columns_helps(kept):
    score = normal(20, 5, 5).abs()
    start = torch.stack([torch.eye(5).bool().roll(shift, 1) for shift in range(kept)]).any(0).expand(20, 5, 5)
    mask = improved_mask(score, start)
    assert ((score * mask).sum((1, 2)) >= (score * start).sum((1, 2)) - 1e-6).all()
    for block, kept_here in zip(score, mask, strict=True):
        assert torch.equal(kept_here.sum(0), start[0].sum(0)) and torch.equal(kept_here.sum(1), start[0].sum(1))
        for (i, p), (j, q) in product(product(range(5), repeat=2), repeat=2):
            if kept_here[i, j] and kept_here[p, q] and not kept_here[i, q] and not kept_here[p, j]:
                assert block[i, q] + block[p, j] <= block[i, j] + block[p, q] + 1e-5


def test_blocks_that_do_not_converge_are_told(monkeypatch, caplog):
    monkeypatch.setattr(module, "MOST_SWEEPS", 10)
    monkeypatch.setattr(module, "TOLERANCE", 1e-9)
    mask = transposable_mask(normal(8, 16).abs(), NMPattern(4, 8))
    assert "2 of 2 blocks have not converged after 10 sweeps" in caplog.text
    assert (mask.t().sum(1) == 4).all()


def test_what_cannot_be_masked_is_refused():
    with pytest.raises(ValueError, match="the score along its rows has 10, the score along its columns has 6"):
        transposable_mask(torch.zeros(6, 10), NMPattern(2, 4))
    with pytest.raises(ValueError, match="finite score"):
        transposable_mask(torch.full((4, 4), torch.nan), NMPattern(2, 4))
