"""Pruning one linear group: masks, statistics of what was kept, and the choices that combine."""

from itertools import product

import pytest
import torch

from permllm.calibration.statistics import ActivationStats
from permllm.permutation.heuristic import heuristic_permutation
from permllm.permutation.permutation import Permutation
from permllm.pruning.methods import PrunedLinear, PruningMethod, find_permutation, prune_group
from permllm.pruning.metrics import PRUNING_METRICS, wanda
from permllm.pruning.permutations import PERMUTATIONS
from permllm.pruning.updates.sparsegpt import sparsegpt
from permllm.sparsity.mask import is_nm_sparse, nm_mask
from permllm.sparsity.pattern import NMPattern

PATTERN = NMPattern(2, 4)
METHODS = [
    PruningMethod(score, permutation, update)
    for score, permutation, update in product(PRUNING_METRICS, ("identity", "random", "cp", "search", "lcp"), (None, "sparsegpt", "alps"))
]


def group(in_channels=16, tokens=200, seed=0, dtype=torch.float32):
    """Two weights that read one correlated input, the input (tokens, in), and the statistics of it."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.randn(in_channels, generator=generator).exp()
    x = torch.randn(tokens, in_channels, generator=generator) @ torch.randn(in_channels, in_channels, generator=generator) * strength
    weights = {name: torch.randn(rows, in_channels, generator=generator).to(dtype) for name, rows in {"gate": 6, "up": 10}.items()}
    return weights, x, ActivationStats(x.t() @ x / tokens, tokens)


def given_permutation(method, in_channels=16):
    return Permutation.random(in_channels, torch.Generator().manual_seed(7)) if method.is_learned else None


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_mask_is_exactly_n_of_m_under_the_groups_permutation(text, method):
    pattern = NMPattern.parse(text)
    weights, _, stats = group()
    pruned = prune_group(weights, stats, pattern, method, given_permutation(method))
    assert pruned.linears.keys() == weights.keys()
    for path, linear in pruned.linears.items():
        kept = pruned.permutation.apply(linear.mask).unflatten(-1, (-1, pattern.group)).sum(-1)
        assert (kept == pattern.kept).all()
        assert is_nm_sparse(pruned.permutation.apply(linear.apply(weights[path])), pattern)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_equal_solutions_have_equal_permutations_and_masks(method):
    weights, _, stats = group()
    pruned = prune_group(weights, stats, PATTERN, method, given_permutation(method))
    assert pruned.permutation == pruned.permutation.canonical(4)
    again = prune_group(weights, stats, PATTERN, method, given_permutation(method))
    assert again.permutation == pruned.permutation
    assert all(torch.equal(linear.mask, again.linears[path].mask) for path, linear in pruned.linears.items())


def test_without_a_permutation_the_mask_is_that_of_the_score():
    weights, _, stats = group()
    pruned = prune_group(weights, stats, PATTERN, PruningMethod("wanda"))
    assert pruned.permutation == Permutation.identity(16)
    assert all(torch.equal(pruned.linears[path].mask, nm_mask(wanda(weight, stats).of(weight), PATTERN)) for path, weight in weights.items())
    assert all(linear.weight is None for linear in pruned.linears.values())


def test_the_heuristic_looks_at_all_linears_of_the_group_together():
    weights, _, stats = group()
    pruned = prune_group(weights, stats, PATTERN, PruningMethod("wanda", "cp"))
    weight = torch.cat(list(weights.values()))
    assert pruned.permutation == heuristic_permutation(wanda(weight, stats).of(weight), PATTERN)


def test_the_search_never_changes_the_output_more_than_the_heuristic_it_begins_from():
    for seed in range(5):
        weights, _, stats = group(seed=seed)
        found, start = (prune_group(weights, stats, PATTERN, PruningMethod("wanda", permutation)).output_error for permutation in ("search", "cp"))
        assert found < start


def test_a_random_permutation_depends_on_the_seed_only():
    def permutation(seed, score="wanda", update=None, draw=0):
        weights, _, stats = group(seed=draw)
        return prune_group(weights, stats, PATTERN, PruningMethod(score, "random", update, seed)).permutation

    first = permutation(seed=1)
    assert first == permutation(seed=1, score="ria") == permutation(seed=1, update="sparsegpt") == permutation(seed=1, draw=5)
    assert first != permutation(seed=2)
    torch.manual_seed(9)
    assert first == permutation(seed=1)


@pytest.mark.parametrize("permutation", ["random", "search"])
def test_a_given_generator_goes_on_from_group_to_group(permutation):
    """One seed for a whole model, but every linear group draws anew."""
    weights, _, stats = group(in_channels=32)
    method, generator = PruningMethod("wanda", permutation, seed=3), torch.Generator().manual_seed(3)
    first, second = (prune_group(weights, stats, PATTERN, method, generator=generator).permutation for _ in range(2))
    assert first == prune_group(weights, stats, PATTERN, method).permutation != second


@pytest.mark.parametrize("name", sorted(PERMUTATIONS))
def test_a_permutation_without_learning_is_found_by_name(name):
    weights, _, stats = group()
    scores = {path: wanda(weight, stats).of(weight) for path, weight in weights.items()}
    found = find_permutation(name, weights, scores, stats, PATTERN, torch.Generator().manual_seed(0))
    assert found.canonical(4) == prune_group(weights, stats, PATTERN, PruningMethod("wanda", name)).permutation


@pytest.mark.parametrize("score", sorted(PRUNING_METRICS))
def test_the_heuristic_permutation_retains_at_least_as_much(score):
    weights, _, stats = group()
    before, after = (prune_group(weights, stats, PATTERN, PruningMethod(score, permutation)).retained_score for permutation in ("identity", "cp"))
    assert after > before


def test_pruning_permuted_weights_and_permuting_back_is_pruning_under_the_permutation():
    weights, _, stats = group()
    method = PruningMethod(permutation="lcp", update="sparsegpt")
    pruned = prune_group(weights, stats, PATTERN, method, given_permutation(method))
    order = pruned.permutation.order
    for path, weight in weights.items():
        updated, mask = sparsegpt(weight[:, order], ActivationStats(stats.gram[order][:, order], stats.tokens), PATTERN)
        back = order.argsort()
        assert torch.equal(pruned.linears[path].mask, mask[:, back])
        assert torch.equal(pruned.linears[path].apply(weight), updated[:, back])


def test_the_retained_score_is_the_share_of_the_score_that_the_masks_keep():
    weights = {"a": torch.tensor([[4.0, 3.0, 2.0, 1.0]]), "b": torch.tensor([[-1.0, 1.0, 1.0, 7.0]])}
    pruned = prune_group(weights, ActivationStats(torch.eye(4), 10), PATTERN, PruningMethod("magnitude"))
    assert pruned.retained_score == pytest.approx((4 + 3 + 1 + 7) / 20)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_output_error_is_that_of_the_outputs_over_the_calibration_tokens(method):
    weights, x, stats = group()
    pruned = prune_group(weights, stats, PATTERN, method, given_permutation(method))
    error = total = 0.0
    for path, weight in weights.items():
        dense = x.double() @ weight.double().t()
        sparse = x.double() @ pruned.linears[path].apply(weight).double().t()
        error, total = error + (dense - sparse).square().sum(), total + dense.square().sum()
    assert pruned.output_error == pytest.approx(float(error / total), rel=1e-4)


def test_a_weight_update_lowers_the_output_error():
    weights, _, stats = group()
    errors = [prune_group(weights, stats, PATTERN, PruningMethod(update=update)).output_error for update in (None, "sparsegpt")]
    assert errors[1] < 0.8 * errors[0]


def test_kept_weights_stay_as_they_are_and_the_others_become_plus_zero():
    weight = torch.tensor([[-1.0, 2.0, -3.0, 4.0]], dtype=torch.bfloat16)
    pruned = PrunedLinear(torch.tensor([[False, False, True, True]])).apply(weight)
    assert pruned.dtype == torch.bfloat16 and pruned.tolist() == [[0, 0, -3, 4]]
    assert not pruned.signbit()[0, :2].any()


@pytest.mark.parametrize("update", [None, "sparsegpt"])
def test_low_precision_weights_are_scored_in_float32_and_returned_in_their_own_type(update):
    weights, _, stats = group(dtype=torch.bfloat16)
    wide = {path: weight.float() for path, weight in weights.items()}
    method = PruningMethod(permutation="cp", update=update)
    low, high = prune_group(weights, stats, PATTERN, method), prune_group(wide, stats, PATTERN, method)
    for path, linear in low.linears.items():
        assert torch.equal(linear.mask, high.linears[path].mask)
        assert torch.equal(linear.apply(weights[path]), high.linears[path].apply(wide[path]).bfloat16())


@pytest.mark.parametrize("permutation", sorted(PERMUTATIONS))
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(permutation, broken):
    weights, _, stats = group()
    weights["up"][0, 0] = broken
    with pytest.raises(ValueError, match="finite"):
        prune_group(weights, stats, PATTERN, PruningMethod("wanda", permutation))


@pytest.mark.parametrize(
    "method",
    [
        PruningMethod(),
        PruningMethod(permutation="cp"),
        PruningMethod(permutation="search"),
        PruningMethod(update="sparsegpt"),
        PruningMethod(update="alps"),
    ],
    ids=str,
)
def test_a_group_that_computes_nothing_can_be_pruned(method):
    """Depth-extended models have layers whose output projections are zero."""
    _, _, stats = group()
    pruned = prune_group({"down": torch.zeros(6, 16)}, stats, PATTERN, method)
    assert pruned.output_error == 0
    assert (pruned.linears["down"].apply(torch.zeros(6, 16)) == 0).all()


def test_a_learned_permutation_has_to_be_given():
    weights, _, stats = group()
    with pytest.raises(ValueError, match="permutation 'lcp' has to be learned first"):
        prune_group(weights, stats, PATTERN, PruningMethod(permutation="lcp"))
    with pytest.raises(ValueError, match="permutation 'lcp' has to be learned first"):
        find_permutation("lcp", weights, weights, stats, PATTERN, torch.Generator())


def test_a_width_that_the_pattern_does_not_divide_is_refused():
    weights, _, stats = group(in_channels=18)
    with pytest.raises(ValueError, match="18"):
        prune_group(weights, stats, PATTERN, PruningMethod())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "wand"}, r"unknown score 'wand': choose one of magnitude, obs, ria, wanda; did you mean 'wanda'\?"),
        ({"permutation": "none"}, r"unknown permutation 'none': choose one of cp, identity, lcp, random, search"),
        ({"update": "obs"}, r"unknown weight update 'obs': choose one of adaptive_admm, admm, alps, fitted_swaps, least_squares, sparsegpt, swaps"),
    ],
)
def test_unknown_choices_list_the_known_ones(settings, message):
    with pytest.raises(ValueError, match=message):
        PruningMethod(**settings)


@pytest.mark.parametrize("update", [None, "least_squares", "admm", "adaptive_admm", "sparsegpt", "alps"])
@pytest.mark.parametrize("permutation", ["identity", "cp"])
def test_transposable_masks_are_n_of_m_both_ways_in_the_order_of_rows_and_columns(update, permutation):
    weights, _, stats = group()
    weights = {"up": weights["up"][:8], "gate": weights["up"][4:8]}
    pruned = prune_group(weights, stats, PATTERN, PruningMethod(permutation=permutation, update=update, transposable=True))
    for path, linear in pruned.linears.items():
        assert (linear.rows is None) == (permutation == "identity")
        rows = linear.rows or Permutation.identity(len(weights[path]))
        mask = rows.apply(pruned.permutation.apply(linear.mask), 0)
        for one in (mask, mask.t()):
            assert (one.unflatten(1, (-1, 4)).sum(-1) == 2).all()
        if linear.weight is not None:
            assert (linear.weight[~linear.mask] == 0).all()


def test_an_order_of_the_rows_lets_transposable_masks_keep_more():
    score = torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) + 9 * torch.eye(4).kron(torch.ones(4, 4))  # large ones side by side
    kept = {}
    for permutation in ("identity", "cp"):
        method = PruningMethod("magnitude", permutation, transposable=True)
        kept[permutation] = prune_group({"up": score}, ActivationStats(torch.eye(16), 100), PATTERN, method).retained_score
    assert kept["cp"] > 1.5 * kept["identity"]


def test_updates_that_go_row_by_row_and_outputs_that_m_does_not_divide_are_refused_for_transposable_masks():
    with pytest.raises(ValueError, match="update swaps chooses masks row by row, .* choose one of sparsegpt, least_squares, admm, "):
        PruningMethod(update="swaps", transposable=True)
    with pytest.raises(ValueError, match="the output of q has 6, the output of v has 10"):
        PruningMethod(transposable=True).check_outputs({"q": 6, "k": 8, "v": 10}, PATTERN)
    PruningMethod().check_outputs({"q": 6}, PATTERN)


def test_a_damping_that_had_to_grow_is_part_of_the_result():
    gram = torch.eye(8)
    gram[0, 1] = gram[1, 0] = 1.05  # indefinite until the damping passes 0.05
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    pruned = prune_group({"a": weight}, ActivationStats(gram, 100), PATTERN, PruningMethod(update="least_squares"))
    assert pruned.damping == pytest.approx(0.1)
    assert prune_group({"a": weight}, ActivationStats(torch.eye(8), 100), PATTERN, PruningMethod(update="least_squares")).damping is None
