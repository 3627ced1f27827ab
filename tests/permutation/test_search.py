"""The search for a channel permutation, held against explicit masks and inputs in float64. Weights and scores are (out, in)."""

from itertools import combinations, pairwise

import pytest
import torch

from permllm.calibration.statistics import ActivationStats
from permllm.permutation import search
from permllm.permutation.heuristic import heuristic_permutation
from permllm.permutation.permutation import Permutation
from permllm.permutation.search import Partition, Problem, improve, propose, random_pairs, ranks, regrouped, search_permutation
from permllm.pruning.methods import PruningMethod, prune_group
from permllm.sparsity.mask import nm_mask
from permllm.sparsity.pattern import NMPattern

WIDTHS = [("2:4", 12), ("2:4", 20), ("2:4", 172), ("1:4", 20), ("3:4", 12), ("1:3", 15), ("4:8", 40), ("1:2", 10), ("1:2", 14), ("9:18", 36)]
STARTS = ["identity", "random", "heuristic"]
FLOAT32 = 1e-6  # the search works in float32, the oracles in float64


def problem(out_channels, in_channels, seed, rank=None, kind="plain"):
    """Return weight, score and inputs, (in, tokens), in float64: correlated inputs, or only `rank` independent ones."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_channels, in_channels, generator=generator, dtype=torch.float64)
    rank = rank or in_channels
    mix = torch.randn(in_channels, rank, generator=generator, dtype=torch.float64)
    inputs = mix @ torch.randn(rank, 4 * in_channels, generator=generator, dtype=torch.float64)
    if kind == "dead":
        inputs[::3] = 0
    if kind == "ties":
        weight = (2 * weight).round()
        return weight, weight.abs(), inputs
    return weight, weight.abs() * inputs.square().mean(dim=1).sqrt(), inputs


def gram_of(inputs):
    return inputs @ inputs.t() / inputs.shape[1]


def start_of(name, score, pattern):
    width = score.shape[1]
    return {
        "identity": Permutation.identity(width),
        "random": Permutation.random(width, torch.Generator().manual_seed(5)),
        "heuristic": heuristic_permutation(score, pattern),
    }[name]


def removed_by_hand(weight, score, groups, pattern):
    """Return W - M*W, one row of one group at a time; of equal scores the lower channel is kept."""
    removed = weight.clone()
    for group in groups:
        for row, row_score in enumerate(score.tolist()):
            best_first = sorted(group, key=lambda channel: (-row_score[channel], channel))
            removed[row, best_first[: pattern.kept]] = 0
    return removed


def error_of(groups, weight, score, inputs, pattern):
    """Return ||(W - M*W) X||^2 per token."""
    return float((removed_by_hand(weight, score, groups, pattern) @ inputs).square().sum() / inputs.shape[1])


def groups_of(permutation, pattern):
    return permutation.order.view(-1, pattern.group).tolist()


def splits(channels):
    """List all ways to split channels into two groups of equal size."""
    first, *others = channels
    halves = [[first, *rest] for rest in combinations(others, len(channels) // 2 - 1)]
    return [[half, [channel for channel in channels if channel not in half]] for half in halves]


def swaps(left, right):
    """List all exchanges of one channel of `left` for one of `right`."""
    return [[[*left[:i], b, *left[i + 1 :]], [*right[:j], a, *right[j + 1 :]]] for i, a in enumerate(left) for j, b in enumerate(right)]


def found_by_search(weight, score, inputs, pattern, start, sweeps=2, seed=0):
    return search_permutation([Problem(weight, score, gram_of(inputs))], pattern, start, sweeps, torch.Generator().manual_seed(seed))


def make_partition(weight, score, inputs, pattern, start):
    return Partition(weight.float(), ranks(score), gram_of(inputs).float(), pattern, start.order)


@pytest.mark.parametrize(("text", "width"), WIDTHS)
@pytest.mark.parametrize("start_name", STARTS)
@pytest.mark.parametrize("kind", ["plain", "dead", "ties"])
@pytest.mark.parametrize("rank", [None, 2])
def test_the_search_never_raises_the_output_error(text, width, start_name, kind, rank):
    pattern = NMPattern.parse(text)
    weight, score, inputs = problem(5, width, seed=width, rank=rank, kind=kind)
    start = start_of(start_name, score, pattern)
    found = found_by_search(weight, score, inputs, pattern, start)
    before, after = (error_of(groups_of(order, pattern), weight, score, inputs, pattern) for order in (start, found))
    assert after < before or found == start.canonical(pattern.group)


@pytest.mark.parametrize("start_name", STARTS)
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("text", "number"), [("2:4", 35), ("1:4", 35), ("3:4", 35), ("1:2", 3), ("2:3", 10)])
def test_two_groups_end_at_the_best_of_all_partitions(text, number, start_name, seed):
    pattern = NMPattern.parse(text)
    weight, score, inputs = problem(6, 2 * pattern.group, seed)
    partitions = splits(range(2 * pattern.group))
    best = min(error_of(groups, weight, score, inputs, pattern) for groups in partitions)
    found = found_by_search(weight, score, inputs, pattern, start_of(start_name, score, pattern), sweeps=1)
    assert len(partitions) == number
    assert error_of(groups_of(found, pattern), weight, score, inputs, pattern) == pytest.approx(best, rel=FLOAT32)


@pytest.mark.parametrize("start_name", STARTS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("text", "neighbours"), [("2:4", lambda left, right: splits([*left, *right])), ("4:8", swaps)])
def test_the_search_ends_where_no_two_groups_gain(text, neighbours, start_name, seed):
    pattern = NMPattern.parse(text)
    weight, score, inputs = problem(4, 3 * pattern.group, seed)
    start = start_of(start_name, score, pattern)
    found = groups_of(found_by_search(weight, score, inputs, pattern, start, sweeps=10**9), pattern)
    reached = error_of(found, weight, score, inputs, pattern)
    rounding = FLOAT32 * error_of(groups_of(start, pattern), weight, score, inputs, pattern)  # of which the search calls 1e-7 no gain
    for left, right in combinations(range(3), 2):
        untouched = [group for number, group in enumerate(found) if number not in (left, right)]
        for two_groups in neighbours(found[left], found[right]):
            assert error_of([*two_groups, *untouched], weight, score, inputs, pattern) >= reached - rounding


@pytest.mark.parametrize(("text", "width"), WIDTHS)
@pytest.mark.parametrize("kind", ["plain", "ties"])
@pytest.mark.parametrize("rank", [None, 1])
def test_every_round_lowers_the_error_and_keeps_the_books(text, width, kind, rank):
    pattern = NMPattern.parse(text)
    weight, score, inputs = problem(3, width, seed=1, rank=rank, kind=kind)
    partition = make_partition(weight, score, inputs, pattern, start_of("random", score, pattern))
    errors, scale = [error_of(partition.groups.tolist(), weight, score, inputs, pattern)], gram_of(inputs).abs().max()
    for pairs in search._pairings(width, None, pattern, torch.Generator().manual_seed(0))[:8]:
        moves = improve([partition], pairs, FLOAT32 * errors[0])
        removed = removed_by_hand(weight, score, partition.groups.tolist(), pattern)
        assert torch.equal(partition.removed, removed.t().float())
        torch.testing.assert_close(partition.pull / scale, (gram_of(inputs) @ removed.t() / scale).float(), rtol=1e-5, atol=1e-5)
        errors.append(error_of(partition.groups.tolist(), weight, score, inputs, pattern))
        assert (errors[-1] < errors[-2]) if moves else (errors[-1] == errors[-2])
    assert len(set(errors)) > 1


@pytest.mark.parametrize("text", ["2:4", "4:8", "1:2"])
def test_a_pair_gains_what_the_output_error_falls(text):
    pattern = NMPattern.parse(text)
    weight, score, inputs = problem(4, 4 * pattern.group, seed=2)
    start = start_of("random", score, pattern)
    before = error_of(groups_of(start, pattern), weight, score, inputs, pattern)
    for pair in combinations(range(4), 2):
        partition = make_partition(weight, score, inputs, pattern, start)
        gain = float(propose([partition], torch.tensor([pair])).gain)
        assert improve([partition], torch.tensor([pair]), FLOAT32 * before) == (gain > FLOAT32 * before)
        after = error_of(partition.groups.tolist(), weight, score, inputs, pattern)
        assert before - after == pytest.approx(gain, abs=FLOAT32 * before)


def test_a_partition_with_another_pull_proposes_what_lowers_that_loss_most():
    """A loss that changes by 2 <pull, D> + <D G, D> when what the mask removes changes by D."""
    pattern = NMPattern(2, 4)
    weight, score, inputs = problem(4, 16, seed=12)
    partition = make_partition(weight, score, inputs, pattern, start_of("random", score, pattern))
    pull = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)) * 10 * partition.pull.std()
    partition.pull = pull.clone()
    before = partition.groups.tolist()
    removed = removed_by_hand(weight, score, before, pattern)

    def loss_change(groups):
        change = removed_by_hand(weight, score, groups, pattern) - removed
        return float(2 * (pull.t() * change).sum() + (change @ gram_of(inputs) * change).sum())

    moves = propose([partition], torch.tensor([[0, 2], [3, 1]]))
    assert moves.pairs.tolist() == [[0, 2], [3, 1]]
    assert (moves.gain > 0).all()
    for move, (left, right) in enumerate(moves.pairs.tolist()):
        untouched = [group for number, group in enumerate(before) if number not in (left, right)]
        best = min(loss_change([*two_groups, *untouched]) for two_groups in splits([*before[left], *before[right]]))
        after = regrouped(partition.groups, moves[torch.tensor([move])]).tolist()
        assert [group for group in untouched if group not in after] == []
        assert loss_change(after) == pytest.approx(best, rel=1e-5)
        assert -float(moves.gain[move]) == pytest.approx(best, rel=1e-5)
    assert partition.groups.tolist() == before  # a proposal moves nothing


def test_pairs_that_gain_alone_but_lose_together_do_not_all_move():
    pattern = NMPattern(2, 4)
    weight, score, inputs = problem(1, 64, seed=0, rank=1)  # one input: every pair corrects the same error, and together they overshoot
    start = Permutation.identity(64)
    pairs = torch.arange(16).view(-1, 2)
    alone = make_partition(weight, score, inputs, pattern, start).groups
    before = error_of(alone.tolist(), weight, score, inputs, pattern)
    for pair in pairs:
        partition = make_partition(weight, score, inputs, pattern, start)
        assert improve([partition], pair[None], 0.0) == 1
        alone[pair] = partition.groups[pair]
    together = make_partition(weight, score, inputs, pattern, start)
    best = pairs[propose([together], pairs).gain.argmax()]
    assert 0 < improve([together], pairs, 0.0) < len(pairs)
    assert torch.equal(together.groups[best], alone[best])
    assert error_of(together.groups.tolist(), weight, score, inputs, pattern) < before < error_of(alone.tolist(), weight, score, inputs, pattern)


def test_a_search_led_astray_returns_the_start(monkeypatch):
    pattern = NMPattern(2, 4)
    weight, score, inputs = problem(4, 8, seed=13)
    optimum = found_by_search(weight, score, inputs, pattern, Permutation.identity(8))
    promise = torch.zeros(1, 35)
    promise[0, 7] = -1e6  # a large gain from whatever candidate 7 is
    monkeypatch.setattr(Partition, "weigh", lambda partition, pairs: (promise, torch.zeros(1)))
    partition = make_partition(weight, score, inputs, pattern, optimum)
    before = partition.error()
    assert improve([partition], torch.tensor([[0, 1]]), 0.0) == 1
    assert partition.error() > before
    assert found_by_search(weight, score, inputs, pattern, optimum, sweeps=1) == optimum


@pytest.mark.parametrize(("text", "width"), WIDTHS)
def test_of_equal_scores_the_search_counts_on_those_that_the_mask_keeps(text, width):
    pattern = NMPattern.parse(text)
    weight, score, inputs = problem(4, width, seed=3, kind="ties")
    partition = make_partition(weight, score, inputs, pattern, start_of("random", score, pattern))
    for pairs in search._pairings(width, None, pattern, torch.Generator().manual_seed(0))[:8]:
        improve([partition], pairs, 0.0)
    canonical = Permutation(partition.groups.flatten()).canonical(pattern.group)
    mask = canonical.inverse().apply(nm_mask(canonical.apply(score), pattern))
    assert torch.equal(partition.removed.t(), (weight * ~mask).float())


@pytest.mark.parametrize(("text", "width"), WIDTHS)
def test_the_search_returns_a_canonical_order(text, width):
    pattern = NMPattern.parse(text)
    weight, score, inputs = problem(4, width, seed=4)
    found = found_by_search(weight, score, inputs, pattern, start_of("random", score, pattern))
    assert found == found.canonical(pattern.group)


@pytest.mark.parametrize("text", ["2:4", "4:8"])
def test_equal_generators_give_equal_results_and_the_inputs_stay_as_they_are(text):
    pattern = NMPattern.parse(text)
    weight, score, inputs = problem(4, 48, seed=5)
    arguments, start = (weight.float(), score, gram_of(inputs).float()), start_of("random", score, pattern)
    copies = [argument.clone() for argument in arguments]
    first, second = (search_permutation([Problem(*arguments)], pattern, start, 2, torch.Generator().manual_seed(7)) for _ in range(2))
    assert first == second
    assert start == start_of("random", score, pattern)
    assert all(torch.equal(argument, copy) for argument, copy in zip(arguments, copies, strict=True))


@pytest.mark.parametrize("text", ["2:4", "4:8"])
def test_how_many_candidates_are_judged_at_once_does_not_matter(text, monkeypatch):
    pattern = NMPattern.parse(text)
    weight, score, inputs = problem(16, 80, seed=6)
    start = start_of("random", score, pattern)
    results = []
    for pairs_at_once in (1, 3, 1000):
        pair_bytes = 4 * 16 * 2 * pattern.group * len(search._candidates(pattern.group))
        monkeypatch.setattr(search, "CANDIDATE_BYTES", pairs_at_once * pair_bytes)
        results.append(found_by_search(weight, score, inputs, pattern, start))
    assert all(first == second for first, second in pairwise(results))


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60])
def test_the_scale_of_the_gram_matrix_does_not_matter(scale):
    pattern = NMPattern(2, 4)
    weight, score, inputs = problem(4, 48, seed=7)
    start = Permutation.identity(48)
    scaled = search_permutation([Problem(weight, score, gram_of(inputs) * scale)], pattern, start, 2, torch.Generator().manual_seed(0))
    assert scaled == found_by_search(weight, score, inputs, pattern, start)


def test_the_weights_of_a_model_are_judged_in_float32():
    pattern = NMPattern(2, 4)
    weight, _, inputs = problem(4, 48, seed=8)
    weight = weight.bfloat16()
    problems = [Problem(each, each.abs(), gram_of(inputs)) for each in (weight, weight.float())]
    half, single = (search_permutation([each], pattern, Permutation.identity(48), 1, torch.Generator().manual_seed(0)) for each in problems)
    assert half == single


@pytest.mark.parametrize(("width", "sweeps"), [(4, 3), (48, 0)])
def test_without_pairs_or_sweeps_the_start_comes_back_in_canonical_form(width, sweeps):
    pattern = NMPattern(2, 4)
    weight, score, inputs = problem(3, width, seed=9)
    start = start_of("random", score, pattern)
    assert found_by_search(weight, score, inputs, pattern, start, sweeps) == start.canonical(4)


def test_nothing_to_gain_leaves_the_start():
    pattern = NMPattern(2, 4)
    _, score, inputs = problem(3, 48, seed=10)
    start = start_of("random", score, pattern)
    assert found_by_search(torch.zeros(3, 48), score, inputs, pattern, start) == start.canonical(4)


@pytest.mark.parametrize("groups", range(1, 10))
def test_in_a_sweep_every_two_groups_meet_exactly_once(groups):
    rounds = search._pairings(4 * groups, None, NMPattern(2, 4), torch.Generator().manual_seed(0))
    meetings = [frozenset(pair) for pairs in rounds for pair in pairs.tolist()]
    assert sorted(map(sorted, meetings)) == [list(pair) for pair in combinations(range(groups), 2)]
    assert all(len(pairs.unique()) == pairs.numel() for pairs in rounds)  # each group in one pair of a round at most


@pytest.mark.parametrize("groups", [1, 2, 7, 8])
def test_random_pairs_leave_out_one_group_at_most(groups):
    pairs = random_pairs(4 * groups, None, NMPattern(2, 4), torch.Generator().manual_seed(0))
    assert pairs.shape == (groups // 2, 2)
    assert len(set(pairs.flatten().tolist()) & set(range(groups))) == groups // 2 * 2


def test_small_groups_try_every_partition_and_large_ones_every_swap():
    assert [[sorted(half[:4]), sorted(half[4:])] for half in search._candidates(4)] == splits(range(8))
    swapped = sorted([sorted(half[:8]), sorted(half[8:])] for half in search._candidates(8))
    assert swapped == sorted([sorted(left), sorted(right)] for left, right in swaps(list(range(8)), list(range(8, 16))))


def test_shapes_that_do_not_fit_are_named():
    weight = torch.rand(3, 8)
    for score, gram in [(weight[:2], torch.eye(8)), (weight, torch.eye(4))]:
        given = rf"not \({len(score)}, 8\) and \({len(gram)}, {len(gram)}\)"
        with pytest.raises(ValueError, match=rf"needs score \(3, 8\) and a Gram matrix \(8, 8\).*{given}"):
            Problem(weight, score, gram)
    with pytest.raises(ValueError, match="as many channels as the weight has, not 12 for 8"):
        search_permutation([Problem(weight, weight, torch.eye(8))], NMPattern(2, 4), Permutation.identity(12), 1, torch.Generator())


@pytest.mark.parametrize(("text", "block"), [("2:4", 16), ("4:8", 16), ("2:4", 8)])
def test_several_problems_share_an_order_that_stays_inside_blocks_and_lowers_the_sum_of_their_errors(text, block):
    pattern = NMPattern.parse(text)
    made = [problem(6, 48, seed=seed) for seed in range(3)]
    problems = [Problem(weight, score, gram_of(inputs)) for weight, score, inputs in made]
    blocks = [Permutation.random(block, torch.Generator().manual_seed(seed)).order for seed in range(48 // block)]
    start = Permutation.within_blocks(torch.stack(blocks)).canonical(pattern.group)
    found = search_permutation(problems, pattern, start, 2, torch.Generator().manual_seed(0), block)

    def relative_errors(order):
        return [
            error_of(groups_of(order, pattern), weight, score, inputs, pattern) / float((weight.double() @ inputs.double()).square().sum())
            for weight, score, inputs in made
        ]

    assert sum(relative_errors(found)) < 0.98 * sum(relative_errors(start))
    places = torch.arange(48) // block
    assert torch.equal(found.order // block, places)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (2, 5)])
def test_a_gram_matrix_that_is_not_finite_is_refused(value, place):
    gram = torch.eye(8)
    gram[place] = value
    with pytest.raises(ValueError, match=r"finite Gram matrix.*gather the statistics again"):
        search_permutation([Problem(torch.rand(3, 8), torch.rand(3, 8), gram)], NMPattern(2, 4), Permutation.identity(8), 1, torch.Generator())


def test_a_gram_matrix_without_signal_says_what_to_do():
    with pytest.raises(ValueError, match="not all zero; gather the statistics again with `calibrate`"):
        search_permutation(
            [Problem(torch.rand(3, 8), torch.rand(3, 8), torch.zeros(8, 8))], NMPattern(2, 4), Permutation.identity(8), 1, torch.Generator()
        )


def test_the_search_refuses_a_width_that_the_group_does_not_divide():
    with pytest.raises(ValueError, match="the weight has 10"):
        search_permutation(
            [Problem(torch.rand(3, 10), torch.rand(3, 10), torch.eye(10))], NMPattern(2, 4), Permutation.identity(10), 1, torch.Generator()
        )


@pytest.mark.parametrize("text", ["2:4", "4:8"])
@pytest.mark.parametrize("score", ["wanda", "ria", "magnitude"])
def test_pruning_with_the_search_has_a_lower_output_error_than_with_the_heuristic(text, score):
    weight, _, inputs = problem(24, 64, seed=11)
    weights = {"gate": weight[:16].float(), "up": weight[16:].float()}
    stats = ActivationStats(gram_of(inputs).float(), inputs.shape[1])
    methods = {name: PruningMethod(score=score, permutation=name) for name in ("cp", "search")}
    pruned = {name: prune_group(weights, stats, NMPattern.parse(text), method) for name, method in methods.items()}
    assert pruned["search"].output_error < pruned["cp"].output_error
    removed = [weights[path].double() - linear.apply(weights[path]).double() for path, linear in pruned["search"].linears.items()]
    by_hand = (torch.cat(removed) @ inputs).square().sum() / (weight.float().double() @ inputs).square().sum()
    assert pruned["search"].output_error == pytest.approx(float(by_hand), rel=1e-5)
