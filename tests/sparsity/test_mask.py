from itertools import combinations

import pytest
import torch

from permllm.sparsity import mask as mask_module
from permllm.sparsity.mask import group_softmax, group_softmax_gradient, is_nm_sparse, nm_mask
from permllm.sparsity.pattern import NMPattern

PATTERNS = ["1:2", "1:4", "2:4", "3:4", "4:8", "5:16", "1:17", "3:20"]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ranked_mask(score, pattern):
    """Sort every group in Python: the highest first, of equal ones the first."""
    mask = torch.zeros(score.shape, dtype=torch.bool)
    for row in range(len(score)):
        for start in range(0, score.shape[1], pattern.group):
            ranked = sorted(range(start, start + pattern.group), key=lambda channel, row=row: (-score[row, channel].item(), channel))
            mask[row, ranked[: pattern.kept]] = True
    return mask


@pytest.mark.parametrize("text", PATTERNS)
def test_nm_mask_keeps_exactly_n_of_every_m(text):
    pattern = NMPattern.parse(text)
    mask = nm_mask(normal(5, 3 * pattern.group), pattern)
    assert mask.dtype == torch.bool
    assert (mask.unflatten(-1, (-1, pattern.group)).sum(-1) == pattern.kept).all()


@pytest.mark.parametrize("text", ["1:2", "1:4", "2:4", "3:4", "2:5", "4:8"])
def test_no_other_mask_of_a_group_keeps_more_score(text):
    pattern = NMPattern.parse(text)
    score = normal(6, 2 * pattern.group, dtype=torch.float64)
    kept = (score * nm_mask(score, pattern)).unflatten(-1, (-1, pattern.group)).sum(-1)
    groups = score.unflatten(-1, (-1, pattern.group))
    best = torch.stack([groups[..., list(chosen)].sum(-1) for chosen in combinations(range(pattern.group), pattern.kept)]).amax(0)
    torch.testing.assert_close(kept, best)


@pytest.mark.parametrize("text", PATTERNS)
def test_of_equal_scores_the_first_are_kept(text):
    pattern = NMPattern.parse(text)
    score = torch.randint(3, (20, 2 * pattern.group), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(nm_mask(score, pattern), ranked_mask(score, pattern))


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("text", PATTERNS)
def test_comparing_and_sorting_give_the_same_mask(text, dim, monkeypatch):
    pattern = NMPattern.parse(text)
    score = normal(2 * pattern.group, 3 * pattern.group, seed=1).mul(2).round()  # with ties
    masks = []
    for largest in (0, 1000):
        monkeypatch.setattr(mask_module, "LARGEST_COMPARED_GROUP", largest)
        masks.append(nm_mask(score, pattern, dim))
    assert torch.equal(*masks)


@pytest.mark.parametrize("dim", [0, 1, 2, -3, -2, -1])
@pytest.mark.parametrize("text", ["2:4", "4:8", "3:20"])
def test_the_channels_may_lie_in_any_dimension(text, dim):
    pattern = NMPattern.parse(text)
    channels_last = normal(3, 5, 2 * pattern.group).mul(2).round()  # with ties
    mask = nm_mask(channels_last.movedim(-1, dim), pattern, dim)
    assert torch.equal(mask.movedim(dim, -1), nm_mask(channels_last, pattern))
    assert torch.equal(nm_mask(channels_last.movedim(-1, dim).contiguous(), pattern, dim), mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_nm_mask_takes_scores_of_any_type_and_any_leading_shape(dtype):
    pattern = NMPattern(2, 4)
    score = normal(2, 3, 8).mul(10).to(dtype)
    assert torch.equal(nm_mask(score, pattern).flatten(0, 1), ranked_mask(score.flatten(0, 1), pattern))


@pytest.mark.parametrize("dim", [0, 1])
def test_nm_mask_refuses_a_width_that_the_group_does_not_divide(dim):
    score = normal(2, 10) if dim else normal(10, 2)
    with pytest.raises(ValueError, match="the score has 10"):
        nm_mask(score, NMPattern(2, 4), dim)


@pytest.mark.parametrize("text", ["2:4", "4:8", "3:20"])
def test_group_softmax_is_the_softmax_over_each_group_of_channels(text):
    pattern = NMPattern.parse(text)
    score = normal(3 * pattern.group, 4)
    groups = [group.softmax(0) for group in score.split(pattern.group)]
    torch.testing.assert_close(group_softmax(score, pattern), torch.cat(groups))


def test_the_sharper_the_scores_the_nearer_group_softmax_is_to_the_mask():
    pattern, score = NMPattern(1, 4), normal(12, 5, dtype=torch.float64)
    distances = [(group_softmax(score * sharpness, pattern) - nm_mask(score, pattern, dim=0).double()).abs().max() for sharpness in (1, 10, 1000)]
    assert distances[0] > distances[1] > distances[2] < 1e-3


@pytest.mark.parametrize("text", ["2:4", "4:8", "3:20"])
def test_group_softmax_gradient_is_what_autograd_computes(text):
    pattern = NMPattern.parse(text)
    score, upstream = (normal(3 * pattern.group, 4, seed=seed, dtype=torch.float64) for seed in (0, 1))
    softmax = group_softmax(score.requires_grad_(), pattern)
    (expected,) = torch.autograd.grad(softmax, score, upstream)
    torch.testing.assert_close(group_softmax_gradient(softmax.detach(), upstream, pattern), expected)


def test_a_masked_weight_is_nm_sparse_and_one_more_weight_breaks_it():
    pattern = NMPattern(2, 4)
    weight = normal(6, 12)
    masked = weight * nm_mask(weight.abs(), pattern)
    assert is_nm_sparse(masked, pattern)
    row, channel = (masked == 0).nonzero()[7].tolist()
    masked[row, channel] = 1e-30
    assert not is_nm_sparse(masked, pattern)


def test_fewer_weights_than_n_are_still_nm_sparse():
    assert is_nm_sparse(torch.zeros(2, 8), NMPattern(2, 4))
