"""Everything that is measured of a model's quality: perplexity on a text, accuracy on multiple-choice tasks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from permllm.calibration.capture import HiddenStates, on_device
from permllm.calibration.samples import tokenize
from permllm.calibration.texts import TextSource, read_documents
from permllm.evaluation.perplexity import perplexity
from permllm.evaluation.zero_shot import Once, ZeroShotConfig, directly, zero_shot
from permllm.models.streaming import LayeredModel

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class PerplexityConfig:
    """Text and window of the perplexity; `length` is the context that the papers' protocol fixes."""

    text: TextSource
    length: int = 2048
    batch_size: int = 1


@dataclass(frozen=True)
class EvaluateConfig:
    """What to evaluate on."""

    perplexity: PerplexityConfig
    zero_shot: ZeroShotConfig

    def parts(self) -> list[str]:
        """Return the names of what is measured, each finished by itself."""
        return [PERPLEXITY, *self.zero_shot.tasks]

    def check(self) -> None:
        """Refuse files that are missing and unknown tasks, before the long run.

        Raises:
            ValueError: naming them.
        """
        self.perplexity.text.paths()
        self.zero_shot.check()


def perplexity_tokens(config: PerplexityConfig, tokenizer: "PreTrainedTokenizerBase") -> Tensor:
    """Return the tokens of the text, (tokens,) int64."""
    return tokenize(list(read_documents(config.text).values()), tokenizer)


def evaluate(
    layered: LayeredModel,
    load: "Callable[[], PreTrainedModel]",
    tokenizer: "PreTrainedTokenizerBase",
    tokens: Tensor,
    config: EvaluateConfig,
    keep: HiddenStates = on_device,
    once: Once = directly,
) -> dict[str, Any]:
    """Return `perplexity`, and `zero_shot` by task.

    Args:
        tokens: of the text for the perplexity, see `perplexity_tokens`.
        load: returns the whole model; called if zero-shot tasks are left to do.
        keep: see `perplexity`.
        once: measures the perplexity and every task, or returns what an interrupted run measured.
    """
    length, batch_size = config.perplexity.length, config.perplexity.batch_size
    return {
        PERPLEXITY: once(PERPLEXITY, lambda: perplexity(layered, tokens, length, batch_size, keep)),
        "zero_shot": zero_shot(load, tokenizer, config.zero_shot, once),
    }
