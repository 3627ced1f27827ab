"""A learning run on a tiny model, with settings under which its permutations move at every step."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from permllm.calibration.capture import dense_statistics
from permllm.calibration.samples import CalibrationSet
from permllm.lcp.recipes import LOGIT_SETTINGS, LearnConfig
from permllm.lcp.trainer import LearnResult, learn_permutations
from permllm.models.adapter import ModelAdapter
from permllm.models.streaming import LoadedModel
from permllm.sparsity.pattern import NMPattern

LEARN = {"block_size": 16, "start": "cp", "logits": "identity", "epochs": 3, "batch_size": 4, "learning_rate": 0.5}


@pytest.fixture
def samples(draw_tokens: Callable) -> CalibrationSet:
    """Eight sequences to learn on and four held out."""
    return CalibrationSet(draw_tokens(12, 16), held_out=4)


@pytest.fixture
def config() -> Callable[..., LearnConfig]:
    """`config(**settings)`: those of a short run, changed by `settings`."""

    def make(**settings: object) -> LearnConfig:
        unused = LOGIT_SETTINGS if settings.get("optimizer") == "guided" else ()
        return LearnConfig(**{**{name: value for name, value in LEARN.items() if name not in unused}, **settings})

    return make


@pytest.fixture
def learn(model: PreTrainedModel, adapter: ModelAdapter, samples: CalibrationSet, config: Callable) -> Callable[..., LearnResult]:
    """`learn(score, samples, on_epoch, state_file, pattern, **settings)`: a run on `model`."""
    statistics = list(dense_statistics(LoadedModel(model, adapter), samples.tokens, 4))

    def run(
        score: str = "wanda",
        samples: CalibrationSet = samples,
        on_epoch: Callable = lambda record: None,
        state_file: Path | None = None,
        pattern: str = "2:4",
        **settings: object,
    ) -> LearnResult:
        parsed = NMPattern.parse(pattern)
        return learn_permutations(LoadedModel(model, adapter), samples, statistics, parsed, score, config(**settings), on_epoch, state_file)

    return run
