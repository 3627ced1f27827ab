"""Read a table by name, with an error that lists the choices."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

Entry = TypeVar("Entry")


def lookup(table: Mapping[str, Entry], name: str, what: str) -> Entry:
    """Return the entry called `name`.

    >>> lookup({"wanda": 1}, "wanda", "pruning metric")
    1

    Raises:
        ValueError: if there is none; the message lists the names there are.
    """
    if name in table:
        return table[name]
    close = difflib.get_close_matches(str(name), table, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"unknown {what} {name!r}: choose one of {', '.join(sorted(table))}{hint}")
