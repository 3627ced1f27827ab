"""Distances are held against torch's own formulas and worked examples."""

import math
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, smooth_l1_loss

from permllm.calibration.capture import finish
from permllm.lcp.objective import (
    HIDDEN_OBJECTIVES,
    LOGIT_OBJECTIVES,
    NextTokens,
    check_objective,
    cosine_distance,
    kl_divergence,
    needs_logits,
    next_token_loss,
    relative_error,
    smooth_l1,
)
from permllm.models.families import adapter_of

VOCABULARY = 20


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def next_tokens(logits, k):
    """What the dense model says, from its logits."""
    values, indices = logits.log_softmax(-1).topk(k, dim=-1)
    tokens = torch.randint(logits.shape[-1], logits.shape[:2], generator=torch.Generator().manual_seed(5))
    return NextTokens(tokens, indices, values)


def exact_kl(sparse, dense):
    divergence = kl_div(sparse.double().log_softmax(-1), dense.double().log_softmax(-1), reduction="none", log_target=True)
    return divergence.sum(-1).mean().item()


def test_cosine_distance_is_the_mean_over_tokens_of_one_minus_the_cosine():
    dense = torch.tensor([[[1.0, 0.0], [3.0, 4.0]]])
    sparse = torch.tensor([[[2.0, 0.0], [4.0, -3.0]]])
    assert cosine_distance(sparse, dense).item() == pytest.approx((0 + 1) / 2)


@pytest.mark.parametrize("angle", [0.0, 0.3, math.pi / 2, math.pi])
def test_cosine_distance_depends_on_the_angle_alone(angle):
    dense, sparse = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[math.cos(angle), math.sin(angle)]]]) * 7
    assert cosine_distance(sparse, dense).item() == pytest.approx(1 - math.cos(angle), abs=1e-6)


def test_relative_error_is_the_mean_over_tokens_of_squared_error_by_squared_norm():
    dense = torch.tensor([[[1.0, 0.0], [3.0, 4.0]]])
    sparse = torch.tensor([[[1.0, 2.0], [3.0, 3.0]]])
    assert relative_error(sparse, dense).item() == pytest.approx((4 / 1 + 1 / 25) / 2)


def test_relative_error_sees_a_wrong_length_and_the_cosine_does_not():
    dense = normal(2, 5, 8)
    assert cosine_distance(1.5 * dense, dense).item() == pytest.approx(0, abs=1e-6)
    assert relative_error(1.5 * dense, dense).item() == pytest.approx(0.25)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_relative_error_does_not_depend_on_the_size_of_both(scale):
    dense, sparse = normal(2, 5, 8), normal(2, 5, 8, seed=1)
    assert relative_error(scale * sparse, scale * dense).item() == pytest.approx(relative_error(sparse, dense).item(), rel=1e-5)


def test_relative_error_of_a_token_without_a_state_is_finite():
    assert relative_error(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)) == 0


def test_smooth_l1_is_torchs():
    dense, sparse = normal(2, 5, 8), 3 * normal(2, 5, 8, seed=1)
    assert smooth_l1(sparse, dense) == smooth_l1_loss(sparse, dense)


@pytest.mark.parametrize("name", sorted(HIDDEN_OBJECTIVES))
def test_the_distance_of_equal_states_is_zero_and_has_a_gradient_elsewhere(name):
    dense = normal(2, 5, 8)
    assert HIDDEN_OBJECTIVES[name](dense.bfloat16(), dense.bfloat16()).item() == pytest.approx(0, abs=1e-6)
    sparse = (dense + 0.1 * normal(2, 5, 8, seed=1)).requires_grad_()
    distance = HIDDEN_OBJECTIVES[name](sparse, dense)
    assert distance > 0 and torch.autograd.grad(distance, sparse)[0].abs().sum() > 0


@pytest.mark.parametrize("name", sorted(HIDDEN_OBJECTIVES))
def test_low_precision_states_are_compared_in_float32(name):
    dense, sparse = normal(2, 5, 8, dtype=torch.bfloat16), normal(2, 5, 8, seed=1, dtype=torch.bfloat16)
    distance = HIDDEN_OBJECTIVES[name](sparse, dense)
    assert distance.dtype == torch.float32 and torch.equal(distance, HIDDEN_OBJECTIVES[name](sparse.float(), dense.float()))


def test_kl_divergence_over_the_whole_vocabulary_is_torchs():
    dense, sparse = 3 * normal(2, 5, VOCABULARY), 3 * normal(2, 5, VOCABULARY, seed=1)
    assert kl_divergence(sparse, next_tokens(dense, VOCABULARY)).item() == pytest.approx(exact_kl(sparse, dense), rel=1e-5)


@pytest.mark.parametrize("k", [1, 3, VOCABULARY])
def test_kl_divergence_of_equal_logits_is_zero(k):
    logits = 3 * normal(2, 5, VOCABULARY)
    assert kl_divergence(logits, next_tokens(logits, k)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("size", [0.1, 1, 3, 10])
def test_the_more_tokens_are_told_apart_the_nearer_the_bound_comes_from_below(size):
    """Telling more tokens apart can only show more of the difference."""
    slack = 2e-5  # what is left counts at least 1e-6, whose logarithm is -14; and float32
    for seed in range(5):
        dense, sparse = size * normal(2, 5, VOCABULARY, seed=seed), size * normal(2, 5, VOCABULARY, seed=seed + 50)
        bounds = [kl_divergence(sparse, next_tokens(dense, k)).item() for k in range(1, VOCABULARY + 1)]
        assert all(0 <= lower <= higher + slack for lower, higher in pairwise(bounds))
        assert bounds[-1] == pytest.approx(exact_kl(sparse, dense), abs=slack)


@pytest.mark.parametrize("k", [1, 3, VOCABULARY])
@pytest.mark.parametrize(("dense_size", "sparse_size"), [(100, 1), (1, 100), (100, 100), (0, 100), (100, 0)])
def test_kl_divergence_is_finite_and_never_negative_for_certain_predictions(k, dense_size, sparse_size):
    dense, sparse = dense_size * normal(2, 5, VOCABULARY), (sparse_size * normal(2, 5, VOCABULARY, seed=1)).requires_grad_()
    divergence = kl_divergence(sparse, next_tokens(dense, k))
    assert divergence.isfinite() and divergence >= -1e-6  # what is left of a certain prediction counts at least 1e-6
    assert torch.autograd.grad(divergence, sparse)[0].isfinite().all()


def test_kl_divergence_has_the_gradient_of_torchs():
    dense, sparse = normal(2, 5, VOCABULARY), normal(2, 5, VOCABULARY, seed=1).requires_grad_()
    (found,) = torch.autograd.grad(kl_divergence(sparse, next_tokens(dense, VOCABULARY)), sparse)
    expected = (sparse.detach().softmax(-1) - dense.softmax(-1)) / 10  # worked by hand, over 10 tokens
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_next_token_loss_is_the_cross_entropy_of_the_token_after():
    logits, dense = normal(2, 5, VOCABULARY), next_tokens(normal(2, 5, VOCABULARY, seed=1), 3)
    expected = [-logits.log_softmax(-1)[row, place, dense.tokens[row, place + 1]] for row in range(2) for place in range(4)]
    assert next_token_loss(logits, dense).item() == pytest.approx(torch.stack(expected).mean().item())


@pytest.mark.parametrize("name", sorted(LOGIT_OBJECTIVES))
def test_low_precision_logits_are_compared_in_float32(name):
    sparse, dense = normal(2, 5, VOCABULARY, seed=1, dtype=torch.bfloat16), next_tokens(normal(2, 5, VOCABULARY), 4)
    loss = LOGIT_OBJECTIVES[name](sparse, dense)
    assert loss.dtype == torch.float32 and torch.equal(loss, LOGIT_OBJECTIVES[name](sparse.float(), dense))


def test_rows_of_next_tokens_are_those_sequences():
    dense, rows = next_tokens(normal(4, 5, VOCABULARY), 3), torch.tensor([3, 1])
    some = dense[rows]
    for name in ("tokens", "indices", "log_probabilities"):
        assert torch.equal(getattr(some, name), getattr(dense, name)[rows])


def test_only_terms_of_next_tokens_need_logits():
    assert needs_logits({"kl": 1.0}) and needs_logits({"cosine": 1.0, "cross_entropy": 0.1})
    assert not needs_logits(dict.fromkeys(HIDDEN_OBJECTIVES, 1.0)) and not needs_logits({})


def test_unknown_terms_and_weights_that_are_not_positive_are_named():
    with pytest.raises(ValueError, match=r"unknown objective 'cosin': choose one of cosine, .*did you mean 'cosine'\?"):
        check_objective({"cosin": 1.0}, HIDDEN_OBJECTIVES, "objective")
    with pytest.raises(ValueError, match="the terms of objective need weights above 0, but cosine has weight 0, smooth_l1 has weight nan"):
        check_objective({"cosine": 0, "relative_error": 1, "smooth_l1": float("nan")}, HIDDEN_OBJECTIVES, "objective")


# `finish`, which turns hidden states into the logits that these objectives compare.


def last_hidden(model, adapter, tokens):
    seen = []
    handle = adapter.layers(model)[-1].register_forward_hook(lambda _, arguments, output: seen.append(output))
    with torch.no_grad():
        logits = model(tokens).logits
    handle.remove()
    return seen[0], logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("sequences", "length"), [(1, 1), (3, 24)])  # more than Mistral's window
def test_finishing_the_last_hidden_states_gives_the_models_own_logits(model, adapter, draw_tokens, sequences, length, dtype):
    model = model.to(dtype)
    hidden, logits = last_hidden(model, adapter, draw_tokens(sequences, length))
    assert torch.equal(finish(model, adapter, hidden), logits)


def test_finishing_carries_the_gradient_to_the_hidden_states(model, adapter, draw_tokens):
    hidden, _ = last_hidden(model, adapter, draw_tokens(2, 8))
    hidden, step = hidden.requires_grad_(), 1e-2 * normal(*hidden.shape, seed=3)
    loss = cross_entropy(finish(model, adapter, hidden).flatten(0, 1), draw_tokens(2, 8).flatten())
    (gradient,) = torch.autograd.grad(loss, hidden)
    change = [cross_entropy(finish(model, adapter, hidden + sign * step).flatten(0, 1), draw_tokens(2, 8).flatten()) for sign in (1, -1)]
    assert ((change[0] - change[1]) / 2).item() == pytest.approx((gradient * step).sum().item(), rel=0.05)


def test_finishing_runs_no_decoder_layer_and_leaves_the_model_as_it_is(llama, draw_tokens):
    adapter, modules = adapter_of(llama), dict(llama.named_modules())
    hidden, _ = last_hidden(llama, adapter, draw_tokens(2, 8))
    for layer in adapter.layers(llama):
        layer.register_forward_pre_hook(lambda *_: pytest.fail("a decoder layer ran"))
    finish(llama, adapter, hidden)
    assert list(dict(llama.named_modules()).items()) == list(modules.items())
    with pytest.raises(RuntimeError):
        finish(llama, adapter, hidden[..., :-1])  # its final norm refuses them
    assert list(dict(llama.named_modules()).items()) == list(modules.items())
