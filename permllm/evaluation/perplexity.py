"""Perplexity with the papers' protocol: joined text, consecutive windows of the context length, no overlap."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from permllm.batches import batches
from permllm.calibration.capture import HiddenStates, finish, last_hidden, on_device
from permllm.models.streaming import LayeredModel


@torch.no_grad()
def perplexity(layered: LayeredModel, tokens: Tensor, length: int, batch_size: int = 8, keep: HiddenStates = on_device) -> float:
    """Return exp of the mean negative log-likelihood of every token given those before it in its window.

    Args:
        tokens: (tokens,) int64, the joined text; what is left after the last whole window is not used.
        length: tokens per window; the first token of a window is given, not predicted.
        keep: where the hidden states of all windows are to be, an entry of `HIDDEN_STATES`.

    Raises:
        ValueError: if `length` is below 2, the text is shorter than one window, or the likelihoods are not finite.

    Source: GPTQ and SparseGPT; the mean is in float64 over all windows.
    """
    if length < 2:
        raise ValueError(f"length is {length}, but a window needs at least 2 tokens, one given and one to predict")
    windows = tokens[: tokens.numel() // length * length].view(-1, length)
    if not len(windows):
        raise ValueError(f"the evaluation text has {tokens.numel()} tokens, fewer than one window of {length}; give more text or lower length")
    last = last_hidden(layered, windows, batch_size, keep)
    total = torch.zeros((), dtype=torch.float64)
    with layered.head():
        for batch, hidden in batches(list(zip(windows.split(batch_size), last.split(batch_size), strict=True)), "logits"):
            logits = finish(layered.model, layered.adapter, hidden.to(layered.device))[:, :-1].float()
            total += cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten().to(logits.device), reduction="sum").double().cpu()
    mean = total / (windows.numel() - len(windows))
    if not mean.isfinite():
        raise ValueError(f"the mean log-likelihood is {float(mean)}: the model's weights or activations are not finite")
    return float(mean.exp())
