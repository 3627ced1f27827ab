import pytest

from permllm.lookup import lookup

TABLE = {"wanda": 1, "ria": 2, "magnitude": None}


@pytest.mark.parametrize("name", TABLE)
def test_an_entry_is_found_by_its_name(name):
    assert lookup(TABLE, name, "score") == TABLE[name]


def test_an_unknown_name_lists_the_names_there_are_in_order():
    with pytest.raises(ValueError, match=r"^unknown score 'xyz': choose one of magnitude, ria, wanda$"):
        lookup(TABLE, "xyz", "score")


def test_a_misspelt_name_is_guessed():
    with pytest.raises(ValueError, match=r"did you mean 'magnitude'\?$"):
        lookup(TABLE, "magnitud", "score")


@pytest.mark.parametrize("name", [None, 16, 2.5, True])
def test_a_name_that_is_no_text_is_unknown_too(name):
    """A number or an empty value in params.yaml."""
    with pytest.raises(ValueError, match=rf"unknown score {name!r}: choose one of"):
        lookup(TABLE, name, "score")
