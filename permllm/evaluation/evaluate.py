"""Everything that is measured of a model's quality: perplexity on a text, accuracy on multiple-choice tasks."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from permllm.calibration.samples import tokenize
from permllm.calibration.texts import TextSource, read_documents
from permllm.evaluation.perplexity import perplexity
from permllm.evaluation.zero_shot import ZeroShotConfig, zero_shot

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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

    def check(self) -> None:
        """Refuse files that are missing and unknown tasks, before the long run.

        Raises:
            ValueError: naming them.
        """
        self.perplexity.text.paths()
        self.zero_shot.check()


def evaluate(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", config: EvaluateConfig) -> dict[str, Any]:
    """Return `perplexity`, and `zero_shot` by task."""
    tokens = tokenize(list(read_documents(config.perplexity.text).values()), tokenizer)
    return {
        "perplexity": perplexity(model, tokens, config.perplexity.length, config.perplexity.batch_size),
        "zero_shot": zero_shot(model, tokenizer, config.zero_shot),
    }
