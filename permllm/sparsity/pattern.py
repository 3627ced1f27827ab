"""N:M patterns. N of every M consecutive input channels are kept, as NVIDIA reads "2:4"."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class NMPattern:
    """Keep `kept` weights of every `group` consecutive input channels; if it is transposable, of as many output channels too.

    >>> NMPattern.parse("2:4")
    NMPattern(kept=2, group=4, transposable=False)

    Raises:
        ValueError: unless 0 < kept < group.
    """

    kept: int
    group: int
    transposable: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.kept < self.group:
            raise ValueError(f"pattern {self.kept}:{self.group} needs 0 < N < M, N kept of every M, for example 2:4")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "N:M".

        Raises:
            ValueError: if the text is not two whole numbers with 0 < N < M.
        """
        match = re.fullmatch(r"(\d+):(\d+)", str(text))
        if match is None:
            raise ValueError(f"pattern {text!r} is not of the form N:M, N kept of every M, for example 2:4")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"

    @property
    def rows_together(self) -> int:
        """How many consecutive rows of a weight one choice of a mask is about."""
        return self.group if self.transposable else 1

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return 1 - self.kept / self.group

    def check_widths(self, channels: Mapping[str, int]) -> None:
        """Refuse layers that the pattern does not divide, all of them at once.

        Args:
            channels: width of each layer's input, by the layer's name; or of its output, for a transposable pattern.

        Raises:
            ValueError: naming every layer whose width is not a multiple of M.
        """
        misfits = [f"{name} has {width}" for name, width in channels.items() if width % self.group]
        if misfits:
            raise ValueError(
                f"{self} sparsity needs channels in multiples of {self.group}, but {', '.join(misfits)}; choose a pattern whose M divides them"
            )
