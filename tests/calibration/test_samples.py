from itertools import pairwise

import pytest
import torch

from permllm.calibration.samples import CalibrationSet, draw_windows, tokenize

TEXT = torch.arange(1000)  # every token tells its place


def starts(samples):
    return samples.tokens[:, 0].tolist()


def test_windows_are_consecutive_tokens_of_the_text():
    samples = draw_windows(TEXT, 8, 32, seed=0)
    assert samples.tokens.shape == (8, 32)
    assert all(torch.equal(row, torch.arange(int(row[0]), int(row[0]) + 32)) for row in samples.tokens)


@pytest.mark.parametrize("sequences", [8, 30])
def test_equal_seeds_draw_equal_windows_and_others_do_not(sequences):
    first, second, other = (draw_windows(TEXT, sequences, 40, seed) for seed in (3, 3, 4))
    assert torch.equal(first.tokens, second.tokens)
    assert not torch.equal(first.tokens, other.tokens)


@pytest.mark.parametrize("sequences", [1, 10, 25])
def test_windows_do_not_overlap_when_the_text_is_long_enough(sequences):
    ordered = sorted(starts(draw_windows(TEXT, sequences, 40, seed=1)))  # 1000 tokens hold 25 windows of 40
    assert all(following - start >= 40 for start, following in pairwise(ordered))
    assert len(ordered) == sequences


def test_windows_are_drawn_from_all_of_the_text():
    drawn = {start for seed in range(30) for start in starts(draw_windows(TEXT, 3, 100, seed))}
    assert drawn == set(range(0, 1000, 100))


def test_a_text_with_fewer_windows_gives_overlapping_ones():
    ordered = sorted(starts(draw_windows(TEXT, 40, 40, seed=1)))
    assert len(ordered) == 40 and ordered[-1] <= 960
    assert any(following - start < 40 for start, following in pairwise(ordered))


@pytest.mark.parametrize(("sequences", "length"), [(1, 1001), (50, 40), (2001, 1)])
def test_a_text_that_is_too_short_says_how_much_is_needed(sequences, length):
    with pytest.raises(ValueError, match=rf"has 1000 tokens, too few for {sequences} sequences of {length}; give at least {sequences * length}"):
        draw_windows(TEXT, sequences, length, seed=0)


def test_half_overlap_is_just_enough():
    assert len(draw_windows(TEXT, 49, 40, seed=0).tokens) == 49


def test_the_last_rows_are_held_out():
    samples = draw_windows(TEXT, 10, 20, seed=0, held_out=3)
    assert len(samples.tokens[samples.training_rows]) == 7 and len(samples.tokens[samples.held_out_rows]) == 3
    assert torch.equal(torch.cat([samples.tokens[samples.training_rows], samples.tokens[samples.held_out_rows]]), samples.tokens)


def test_nothing_is_held_out_unless_asked_for():
    samples = draw_windows(TEXT, 10, 20, seed=0)
    assert len(samples.tokens[samples.held_out_rows]) == 0 and len(samples.tokens[samples.training_rows]) == 10


@pytest.mark.parametrize("held_out", [-1, 4, 5])
def test_at_least_one_sequence_is_left_to_learn_on(held_out):
    with pytest.raises(ValueError, match=f"held_out is {held_out} of 4"):
        CalibrationSet(torch.zeros(4, 8, dtype=torch.int64), held_out)


def test_documents_are_joined_by_an_empty_line(tiny_tokenizer):
    tokens = tokenize(["ab", "c"], tiny_tokenizer)
    assert tokens.tolist() == tiny_tokenizer("ab\n\nc").input_ids
    assert tokens.dtype == torch.int64 and tokens.shape == (5,)
