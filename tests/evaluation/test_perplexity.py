import math

import pytest

from permllm.evaluation.perplexity import perplexity
from permllm.models.streaming import LoadedModel


def perplexity_token_by_token(model, tokens, length):
    """Predict every token from what precedes it in its window, one forward pass for each."""
    log_likelihoods = []
    for start in range(0, len(tokens) - length + 1, length):
        window = tokens[start : start + length]
        for position in range(1, length):
            logits = model(window[None, :position]).logits[0, -1].double()
            log_likelihoods.append((logits[window[position]] - logits.logsumexp(-1)).item())
    return math.exp(-sum(log_likelihoods) / len(log_likelihoods))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_perplexity_equals_predicting_token_by_token(model, draw_tokens, batch_size):
    tokens = draw_tokens(1, 50)[0]  # three windows of 16, two tokens left over
    assert perplexity(LoadedModel.of(model), tokens, 16, batch_size) == pytest.approx(perplexity_token_by_token(model, tokens, 16), rel=1e-5)


def test_uniform_predictions_have_the_size_of_the_vocabulary_as_perplexity(llama, draw_tokens):
    llama.lm_head.weight.zero_()
    assert perplexity(LoadedModel.of(llama), draw_tokens(1, 64)[0], 8) == pytest.approx(97)


def test_what_is_left_after_the_last_window_is_not_used(llama, draw_tokens):
    tokens = draw_tokens(1, 47)[0]
    assert perplexity(LoadedModel.of(llama), tokens, 16) == perplexity(LoadedModel.of(llama), tokens[:32], 16)


def test_every_window_is_on_its_own(llama, draw_tokens):
    tokens = draw_tokens(1, 32)[0]
    means = [math.log(perplexity(LoadedModel.of(llama), window, 16)) for window in tokens.split(16)]
    assert math.log(perplexity(LoadedModel.of(llama), tokens, 16)) == pytest.approx(sum(means) / 2, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_batch_size_does_not_matter(model, draw_tokens, batch_size):
    tokens = draw_tokens(1, 120)[0]
    assert perplexity(LoadedModel.of(model), tokens, 24, batch_size) == pytest.approx(perplexity(LoadedModel.of(model), tokens, 24, 5), rel=1e-6)


def test_a_text_shorter_than_one_window_is_refused(llama, draw_tokens):
    with pytest.raises(ValueError, match="has 15 tokens, fewer than one window of 16; give more text or lower length"):
        perplexity(LoadedModel.of(llama), draw_tokens(1, 15)[0], 16)


def test_a_model_that_is_not_finite_is_refused(llama, draw_tokens):
    llama.lm_head.weight[3, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        perplexity(LoadedModel.of(llama), draw_tokens(1, 32)[0], 16)


def test_windows_of_one_token_have_nothing_to_predict(llama, draw_tokens):
    with pytest.raises(ValueError, match="length"):
        perplexity(LoadedModel.of(llama), draw_tokens(1, 32)[0], 1)
