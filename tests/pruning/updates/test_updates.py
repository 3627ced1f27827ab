"""What every update promises, whatever it does: N:M masks, no larger errors, and plain words about bad input."""

from dataclasses import replace

import pytest
import torch

from permllm.calibration.statistics import ActivationStats
from permllm.pruning.methods import UPDATES, PruningMethod, prune_group
from permllm.pruning.updates.least_squares import fit
from permllm.pruning.updates.reconstruction import Reconstruction, damped
from permllm.sparsity.mask import best_mask
from permllm.sparsity.pattern import NMPattern

PATTERN = NMPattern(2, 4)
FIXED = ("least_squares", "admm")  # updates that keep the mask they are given
EVERY = pytest.mark.parametrize("name", sorted(UPDATES))


@EVERY
@pytest.mark.parametrize("text", ["1:2", "2:4", "1:4", "3:4", "4:8"])
def test_the_weight_is_exactly_n_of_m_and_plus_zero_elsewhere(case, name, text):
    pattern, given = NMPattern.parse(text), case()
    updated, mask = UPDATES[name](given.weight, given.stats, pattern, given.mask(pattern))
    assert updated.dtype == torch.float32 and mask.dtype == torch.bool
    assert (mask.unflatten(1, (-1, pattern.group)).sum(-1) == pattern.kept).all()
    assert (updated[~mask] == 0).all() and not updated[~mask].signbit().any()


@EVERY
@pytest.mark.parametrize("seed", range(5))
def test_no_update_changes_the_output_more_than_the_mask_alone(case, name, seed):
    for pattern in (PATTERN, NMPattern(4, 8)):
        given = case(seed=seed)
        mask = given.mask(pattern)
        updated, _ = UPDATES[name](given.weight, given.stats, pattern, mask)
        assert given.error(updated) < given.error(given.weight * mask) * (1 + 1e-5)


@EVERY
def test_a_bad_mask_is_no_excuse(case, name):
    given = case()
    mask = ~given.mask(PATTERN)
    updated, _ = UPDATES[name](given.weight, given.stats, PATTERN, mask)
    assert given.error(updated) < given.error(given.weight * mask)


@EVERY
def test_uncorrelated_channels_gain_nothing(case, name):
    given = case()
    stats = ActivationStats(given.stats.gram.diagonal().diag(), 400)
    updated, mask = UPDATES[name](given.weight, stats, PATTERN, given.mask(PATTERN))
    assert torch.equal(mask, given.mask(PATTERN))
    torch.testing.assert_close(updated, given.weight * mask, rtol=2e-3, atol=1e-5)  # twenty iterations of ADMM come so near


def test_alps_beats_sparsegpt_beats_the_mask_alone(case):
    for seed in range(5):
        given = case(seed=seed, out_channels=32, in_channels=64)
        mask = given.mask(PATTERN)
        alps, sparsegpt = (given.error(UPDATES[name](given.weight, given.stats, PATTERN, mask)[0]) for name in ("alps", "sparsegpt"))
        assert alps < 0.95 * sparsegpt and sparsegpt < 0.8 * given.error(given.weight * mask)


@EVERY
def test_the_order_of_the_groups_does_not_matter(case, name):
    given = case(in_channels=32)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))[:, None] * 4 + torch.arange(4)
    order = order.flatten()
    if name == "sparsegpt":
        pytest.skip("its sweep goes through the groups in their order")
    updated, mask = UPDATES[name](given.weight, given.stats, PATTERN, given.mask(PATTERN))
    moved = given.permuted(order)
    again, again_mask = UPDATES[name](moved.weight, moved.stats, PATTERN, given.mask(PATTERN)[:, order])
    assert torch.equal(again_mask, mask[:, order])
    torch.testing.assert_close(again, updated[:, order], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", FIXED)
def test_with_a_fixed_mask_no_order_matters(case, name):
    given, order = case(in_channels=64), torch.randperm(64, generator=torch.Generator().manual_seed(1))
    mask = given.mask(PATTERN)
    updated, kept = UPDATES[name](given.weight, given.stats, PATTERN, mask)
    moved = given.permuted(order)
    again, _ = UPDATES[name](moved.weight, moved.stats, PATTERN, mask[:, order])
    assert torch.equal(kept, mask)
    torch.testing.assert_close(again[:, order.argsort()], updated, rtol=1e-3, atol=1e-4)


@EVERY
def test_linears_of_a_group_are_updated_as_each_alone_but_for_when_their_masks_are_final(case, name):
    given = case()
    weights = {"q": given.weight[:6], "k": given.weight[6:]}
    together = prune_group(weights, given.stats, PATTERN, PruningMethod(update=name))
    for path, weight in weights.items():
        alone = prune_group({path: weight}, given.stats, PATTERN, PruningMethod(update=name)).linears[path]
        found = together.linears[path]
        if name == "alps":  # the penalty of all linears grows together
            assert (found.mask == alone.mask).float().mean() > 0.9
        else:
            assert torch.equal(found.mask, alone.mask)
            torch.testing.assert_close(found.weight, alone.weight, rtol=1e-3, atol=1e-4)


@EVERY
def test_low_precision_weights_are_updated_as_their_float32_values(case, name):
    given = case(dtype=torch.bfloat16)
    mask = given.mask(PATTERN)
    low, wide = (UPDATES[name](weight, given.stats, PATTERN, mask) for weight in (given.weight, given.weight.float()))
    assert all(torch.equal(*pair) for pair in zip(low, wide, strict=True))


@EVERY
def test_nothing_that_is_given_is_changed(case, name):
    given = case(dead=(3,))
    mask = given.mask(PATTERN)
    before = given.weight.clone(), given.stats.gram.clone(), mask.clone()
    UPDATES[name](given.weight, given.stats, PATTERN, mask)
    assert torch.equal(given.weight, before[0]) and torch.equal(given.stats.gram, before[1]) and torch.equal(mask, before[2])


@EVERY
def test_channels_that_are_always_zero_disturb_nothing(case, name):
    given = case(dead=(2, 3, 9, 16, 17, 18, 19))
    mask = given.mask(PATTERN)
    updated, chosen = UPDATES[name](given.weight, given.stats, PATTERN, mask)
    assert updated.isfinite().all() and (chosen.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    assert given.error(updated) < given.error(given.weight * mask) * (1 + 1e-5)


@EVERY
def test_a_weight_of_zeros_stays_zero(case, name):
    given = case()
    updated, mask = UPDATES[name](torch.zeros(5, 32), given.stats, PATTERN, given.mask(PATTERN)[:5])
    assert (updated == 0).all() and (mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()


@EVERY
def test_too_few_tokens_are_told_with_the_number_needed(case, name, caplog):
    given = case(tokens=10)
    mask = given.mask(PATTERN)
    updated, _ = UPDATES[name](given.weight, given.stats, PATTERN, mask)
    assert "10 calibration tokens leave the Gram matrix of 32 channels rank-deficient" in caplog.text and "at least 32 tokens" in caplog.text
    assert updated.isfinite().all() and given.error(updated) < given.error(given.weight * mask) * (1 + 1e-5)


@EVERY
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gram_matrix_that_is_not_finite_is_refused(case, name, value):
    given = case()
    given.stats.gram[3, 5] = value
    with pytest.raises(ValueError, match="holds NaN or infinity; gather the statistics again"):
        UPDATES[name](given.weight, given.stats, PATTERN, torch.ones(12, 32).bool())


@EVERY
def test_a_gram_matrix_of_other_channels_is_refused(case, name):
    with pytest.raises(ValueError, match=r"32 input channels needs a Gram matrix \(32, 32\), not \(16, 16\)"):
        UPDATES[name](case().weight, case(in_channels=16).stats, PATTERN, case().mask(PATTERN))


@EVERY
def test_a_matrix_that_is_no_gram_matrix_is_refused(case, name):
    given = case()
    with pytest.raises(ValueError, match="negative diagonal"):
        UPDATES[name](given.weight, ActivationStats(-given.stats.gram, 400), PATTERN, given.mask(PATTERN))
    indefinite = torch.full((32, 32), 4.0).fill_diagonal_(1.0)
    with pytest.raises(torch.linalg.LinAlgError, match="not positive definite, even with 1 of its mean diagonal added"):
        UPDATES[name](given.weight, ActivationStats(indefinite, 400), PATTERN, given.mask(PATTERN))


@EVERY
def test_damping_that_does_not_suffice_grows_and_is_told(case, name, caplog):
    given = case()
    gram = torch.eye(32)
    gram[0, 1] = gram[1, 0] = 1.4  # eigenvalue -0.4: sums of numbers that a GPU rounded, say
    updated, _ = UPDATES[name](given.weight, ActivationStats(gram, 400), PATTERN, given.mask(PATTERN))
    assert "factorised the Gram matrix with a damping of 1 of its mean diagonal" in caplog.text
    assert updated.isfinite().all()


@EVERY
def test_a_width_that_the_group_does_not_divide_is_refused(name):
    with pytest.raises(ValueError, match="the weight has 10"):
        UPDATES[name](torch.zeros(2, 10), ActivationStats(torch.eye(10), 40), PATTERN, torch.ones(2, 10).bool())


@pytest.mark.parametrize("name", ["sparsegpt", "alps", "adaptive_admm"])
@pytest.mark.parametrize("text", ["2:4", "4:8"])
def test_updates_that_choose_masks_choose_transposable_ones_where_the_pattern_is(case, name, text):
    pattern = replace(NMPattern.parse(text), transposable=True)
    for seed in range(3):
        given = case(seed=seed, out_channels=16)
        mask = best_mask(given.weight.abs() * given.stats.norms, pattern)
        updated, chosen = UPDATES[name](given.weight, given.stats, pattern, mask)
        for one in (chosen, chosen.t()):
            assert (one.unflatten(1, (-1, pattern.group)).sum(-1) == pattern.kept).all()
        assert given.error(updated) < given.error(given.weight * mask)
        free, _ = UPDATES[name](given.weight, given.stats, replace(pattern, transposable=False), given.mask(pattern))
        assert given.error(free) < given.error(updated)


def test_rows_that_share_a_mask_keep_what_they_had_together(case):
    given = case()
    problem, mask = Reconstruction.of(given.weight, given.stats, 0.01), given.mask(PATTERN)
    solution = fit(problem, mask)
    solution[2] *= 30
    updated, _ = problem.finish(solution, mask, mask, rows_together=4)
    is_start = (updated == given.weight * mask).all(1)
    assert is_start.tolist() == [True] * 4 + [False] * 8


def test_rows_that_are_worse_keep_what_they_had_and_a_warning_tells(case, caplog):
    given = case()
    problem, mask = Reconstruction.of(given.weight, given.stats, 0.01), given.mask(PATTERN)
    solution = problem.target.clone()
    solution[2] *= 3
    solution[4, 0] = torch.nan
    mask[4, 0], mask[4, 1:4] = True, torch.tensor([True, False, False])
    updated, chosen = problem.finish(solution, mask, given.mask(PATTERN))
    assert "the update raises the output error of 2 of 12 rows" in caplog.text
    rest = [row for row in range(12) if row not in (2, 4)]
    dense = given.weight * given.mask(PATTERN)
    assert torch.equal(updated[[2, 4]], dense[[2, 4]]) and torch.equal(chosen, given.mask(PATTERN))
    torch.testing.assert_close(updated[rest], dense[rest])


def test_a_factorisation_that_works_takes_the_damping_asked_for(caplog):
    assert damped(lambda damping: torch.tensor(damping), 0.01) == (torch.tensor(0.01), 0.01)
    assert not caplog.text
