"""Distances between the dense and the sparse model: of hidden states, and of the distribution of the next token."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, smooth_l1_loss

from permllm.lookup import lookup


def cosine_distance(sparse: Tensor, dense: Tensor) -> Tensor:
    """Return 1 - cosine similarity over the channels, averaged over the tokens.

    Args:
        sparse, dense: (sequences, length, channels) hidden states; compared in float32.

    Source: PermLLM (NeurIPS 2025), equation 8.
    """
    return 1 - cosine_similarity(sparse.float(), dense.float(), dim=-1).mean()


def relative_error(sparse: Tensor, dense: Tensor) -> Tensor:
    """Return the squared error of a token's hidden state by its squared norm, averaged over the tokens.

    Unlike the cosine it sees a wrong length. Arguments as for `cosine_distance`.
    """
    dense = dense.float()
    return ((sparse.float() - dense).square().sum(-1) / dense.square().sum(-1).clamp(min=1e-12)).mean()


def smooth_l1(sparse: Tensor, dense: Tensor) -> Tensor:
    """Return the smooth L1 distance, averaged over all entries. Arguments as for `cosine_distance`.

    Source: the layer distillation of arXiv:2601.22980.
    """
    return smooth_l1_loss(sparse.float(), dense.float())


@dataclass(frozen=True)
class NextTokens:
    """What the dense model says of every next token.

    Attributes:
        tokens: (sequences, length) int64, the text itself.
        indices: (sequences, length, k), the k likeliest next tokens.
        log_probabilities: (sequences, length, k) float32, of them.
    """

    tokens: Tensor
    indices: Tensor
    log_probabilities: Tensor

    def __getitem__(self, rows: Tensor) -> "NextTokens":
        return NextTokens(self.tokens[rows], self.indices[rows], self.log_probabilities[rows])


def kl_divergence(logits: Tensor, dense: NextTokens) -> Tensor:
    """Return KL(dense || sparse) of the next token, averaged over the tokens.

    The dense model's k likeliest tokens are told apart, all others count as one: a lower bound that is exact for
    k = vocabulary.

    Args:
        logits: (sequences, length, vocabulary) of the sparse model; computed in float32.
    """
    logits = logits.float()
    sparse = logits.gather(-1, dense.indices) - logits.logsumexp(-1, keepdim=True)
    told_apart = (dense.log_probabilities.exp() * (dense.log_probabilities - sparse)).sum(-1)
    rest_dense, rest_sparse = _rest(dense.log_probabilities), _rest(sparse)
    return (told_apart + rest_dense.exp() * (rest_dense - rest_sparse)).mean()


def _rest(log_probabilities: Tensor) -> Tensor:
    """Return log(1 - sum of the probabilities), bounded below where nothing is left."""
    return torch.log((1 - log_probabilities.exp().sum(-1)).clamp(min=1e-6))


def next_token_loss(logits: Tensor, dense: NextTokens) -> Tensor:
    """Return the cross-entropy of the text's own next tokens. Arguments as for `kl_divergence`."""
    return cross_entropy(logits[:, :-1].float().flatten(0, 1), dense.tokens[:, 1:].flatten())


HIDDEN_OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": cosine_distance,
    "relative_error": relative_error,
    "smooth_l1": smooth_l1,
}
LOGIT_OBJECTIVES: dict[str, Callable[[Tensor, NextTokens], Tensor]] = {"kl": kl_divergence, "cross_entropy": next_token_loss}


def curvature_probe(name: str, output: Tensor, generator: torch.Generator, first: int = 0, sequences: int | None = None) -> Tensor:
    """Return a scalar whose squared gradient is, in expectation, the curvature of an objective near equality.

    Of a token's objective, that is: the gradient is to be squared per token, then averaged.

    Args:
        name: of an objective.
        output: of the model: (sequences, length, channels) hidden states, or (sequences, length, vocabulary) logits.
        generator: draws next tokens for the objectives of logits (the Fisher information), and signs for those of hidden states.
        first, sequences: `output` is that of a part of a batch, from its `first` sequence on, and the generator draws for all
            `sequences` of the batch; None for a batch that is whole.
    """
    output = output.float()
    batch, mine = (sequences or len(output), *output.shape[1:]), slice(first, first + len(output))
    if name in LOGIT_OBJECTIVES:
        flat = output.flatten(0, 1)
        uniform = torch.rand(*batch[:2], 1, generator=generator)[mine].flatten(0, 1).to(flat.device)  # drawn on the host: the same on every device
        drawn = torch.searchsorted(flat.detach().softmax(-1).cumsum(-1), uniform)[:, 0].clamp_(max=flat.shape[-1] - 1)
        return cross_entropy(flat, drawn, reduction="sum")
    signs = (torch.randint(2, batch, generator=generator)[mine] * 2 - 1).to(output.device, output.dtype)
    norm = output.detach().square().sum(-1, keepdim=True).clamp(min=1e-12).sqrt()
    scale = {"relative_error": 2**0.5 / norm, "cosine": 1 / norm, "smooth_l1": output.shape[-1] ** -0.5}[name]
    return (signs * output * scale).sum()


def check_objective(weights: Mapping[str, float], known: Mapping[str, object], what: str) -> None:
    """Refuse unknown terms and weights that are not positive.

    Raises:
        ValueError: naming them.
    """
    for name in weights:
        lookup(known, name, what)
    wrong = [f"{name} has weight {weight}" for name, weight in weights.items() if not weight > 0]
    if wrong:
        raise ValueError(f"the terms of {what} need weights above 0, but {', '.join(wrong)}")


def needs_logits(weights: Mapping[str, float]) -> bool:
    """Whether a term compares next tokens."""
    return not weights.keys().isdisjoint(LOGIT_OBJECTIVES)
