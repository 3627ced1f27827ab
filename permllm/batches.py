"""Loops over batches that say how far they are, in the log at its lowest level: a terminal makes a bar of it."""

import logging
from collections.abc import Iterator, Sequence
from typing import TypeVar

Batch = TypeVar("Batch")
logger = logging.getLogger(__name__)


def batches(items: Sequence[Batch], what: str) -> Iterator[Batch]:
    """Yield the items; after each, log what they are batches of, its number from 1, and how many there are."""
    for number, item in enumerate(items, start=1):
        yield item
        logger.debug("%s: batch %d of %d", what, number, len(items))
