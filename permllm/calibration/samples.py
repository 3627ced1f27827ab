"""Token windows drawn by seed: what a model is calibrated and learned on."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from permllm.calibration.texts import TextSource

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CalibrateConfig:
    """Settings of calibration.

    Attributes:
        text: what the sequences are drawn from.
        sequences: how many, the held out ones included.
        length: tokens per sequence.
        held_out: sequences kept aside to choose between learned permutations.
        batch_size: sequences per forward pass.
        seed: of the draw.

    Raises:
        ValueError: if a number makes no sense.
    """

    text: TextSource
    sequences: int = 128
    length: int = 1024
    held_out: int = 16
    batch_size: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.sequences, self.length, self.batch_size) < 1 or not 0 <= self.held_out < self.sequences:
            raise ValueError(
                f"calibrate needs sequences, length and batch_size of at least 1 and fewer held_out than sequences, "
                f"not {self.sequences}, {self.length}, {self.batch_size} and {self.held_out}"
            )


@dataclass(frozen=True)
class CalibrationSet:
    """Token sequences of equal length, the last of them held out.

    Attributes:
        tokens: (sequences, length) int64.
        held_out: how many of the last sequences are kept aside to choose between learned permutations.

    Raises:
        ValueError: unless at least one sequence is left to learn on.
    """

    tokens: Tensor
    held_out: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < len(self.tokens):
            raise ValueError(f"held_out is {self.held_out} of {len(self.tokens)} calibration sequences; at least one must be left")

    @property
    def training_rows(self) -> slice:
        """Rows to learn on."""
        return slice(0, len(self.tokens) - self.held_out)

    @property
    def held_out_rows(self) -> slice:
        """Rows kept aside."""
        return slice(len(self.tokens) - self.held_out, len(self.tokens))


def tokenize(documents: Sequence[str], tokenizer: "PreTrainedTokenizerBase", separator: str = "\n\n") -> Tensor:
    """Join documents as the papers' evaluation does and return their tokens, (tokens,) int64.

    Source: SparseGPT and Wanda, `"\\n\\n".join(test["text"])`.
    """
    # verbose=False: the text is longer than the model's context on purpose
    return tokenizer(separator.join(documents), return_tensors="pt", verbose=False).input_ids[0]


def draw_windows(tokens: Tensor, sequences: int, length: int, seed: int, held_out: int = 0) -> CalibrationSet:
    """Draw windows of `length` tokens from a joined text, without overlap as long as the text is long enough.

    Args:
        tokens: (tokens,).
        sequences: windows to draw; a text with fewer windows than that gives overlapping ones, at random offsets.
        seed: decides which windows, and their order.
        held_out: how many of them are kept aside. Text with enough windows keeps them free of training tokens.

    Raises:
        ValueError: if the text is shorter than `sequences` windows need at half overlap.
    """
    generator = torch.Generator().manual_seed(seed)
    whole = tokens.numel() // length
    if tokens.numel() < length * (sequences + 1) // 2 or whole < 1:
        raise ValueError(
            f"the calibration text has {tokens.numel()} tokens, too few for {sequences} sequences of {length}; "
            f"give at least {length * sequences} tokens, or lower sequences or length"
        )
    if whole >= sequences:
        starts = torch.randperm(whole, generator=generator)[:sequences] * length
    else:
        logger.warning("the text has %d windows of %d tokens, fewer than the %d asked for: they overlap, held-out ones too", whole, length, sequences)
        starts = torch.randint(tokens.numel() - length + 1, (sequences,), generator=generator)
    return CalibrationSet(torch.stack([tokens[start : start + length] for start in starts.tolist()]), held_out)
