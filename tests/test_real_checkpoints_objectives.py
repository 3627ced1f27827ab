"""On checkpoints by others, permutations learned for a weight update leave less of the gap than the update alone."""

import pytest

from permllm.calibration.samples import CalibrateConfig, tokenize
from permllm.calibration.texts import TextSource, read_documents
from permllm.lcp.recipes import LearnConfig
from permllm.models.families import adapter_of
from permllm.models.loading import ModelSource, load_model, load_tokenizer
from permllm.objectives import Calibrated, after
from permllm.pruning.methods import PruningMethod
from permllm.sparsity.pattern import NMPattern

LENGTH = 128
METHOD = PruningMethod("obs", "lcp", "alps")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stories260K-llama", "BabyLlama-tok361"])
def test_permutations_for_an_update_help_it(third_party, name):
    source = ModelSource(str(third_party / "models" / name), device="cpu")
    text = TextSource(files=str(third_party / "text/tinystories_sample/stories_clean.jsonl"))
    stories = list(read_documents(text).values())
    model, tokenizer = load_model(source), load_tokenizer(source)
    half = len(stories) // 2
    calibration, judged = tokenize(stories[:half], tokenizer), tokenize(stories[half:], tokenizer)[: 200 * LENGTH]
    config = CalibrateConfig(text, sequences=192, length=LENGTH, held_out=12, batch_size=16)
    calibrated, pattern = Calibrated.with_seed(model, adapter_of(model), calibration, config, 0, judged, LENGTH), NMPattern.parse("2:4")
    learn = LearnConfig.from_recipe({"recipe": "refit", "epochs": 6, "sequences": 48, "batch_size": 12})
    alone = calibrated.pruned_perplexity(pattern, PruningMethod("obs", update="alps"))
    together = calibrated.pruned_perplexity(pattern, after(METHOD, "alps"), calibrated.permutations(pattern, METHOD, learn))
    print(f"{name}: dense {calibrated.dense_perplexity:.4f}, ALPS {alone:.4f}, learned + ALPS {together:.4f}")
    assert calibrated.dense_perplexity < together < alone
