import pytest

from permllm.sparsity.pattern import NMPattern


def test_a_pattern_keeps_n_of_every_m():
    pattern = NMPattern.parse("1:4")
    assert (pattern.kept, pattern.group, pattern.sparsity) == (1, 4, 0.75)


@pytest.mark.parametrize("text", ["2:4", "4:8", "1:2", "3:20"])
def test_a_pattern_reads_what_it_writes(text):
    assert str(NMPattern.parse(text)) == text


@pytest.mark.parametrize("text", ["4:2", "0:4", "2:2", "5:4", "0:0"])
def test_a_pattern_needs_fewer_kept_than_the_group_has_and_at_least_one(text):
    with pytest.raises(ValueError, match=rf"{text} needs 0 < N < M"):
        NMPattern.parse(text)


@pytest.mark.parametrize("text", ["a:b", "2", "2:", ":4", "2:4:8", "-2:4", "2.0:4", " 2:4", "2:4\n", "", None])
def test_text_of_another_form_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=r"not of the form N:M.*for example 2:4"):
        NMPattern.parse(text)


def test_check_widths_names_every_layer_that_does_not_fit_and_no_other():
    with pytest.raises(ValueError, match="multiples of 4") as error:
        NMPattern.parse("2:4").check_widths({"up": 12, "down": 10, "query": 8, "output": 3})
    assert "down has 10" in str(error.value) and "output has 3" in str(error.value)
    assert "up has" not in str(error.value) and "query" not in str(error.value)


def test_check_widths_accepts_multiples_of_the_group():
    NMPattern.parse("4:8").check_widths({"up": 8, "down": 64})
