"""Choose by measuring where sparse tensor cores multiply many tokens faster than the weight made dense."""

from collections.abc import Iterable

import torch
from torch.nn.functional import linear
from torch.utils.benchmark import Timer

from permllm.kernels.packed_linear import DENSE, SEMI_STRUCTURED, PackedLinear
from permllm.kernels.semi_structured import pack_semi_structured, why_unavailable

SECONDS_MEASURED = 0.1


@torch.inference_mode()
def choose_prefill(layers: Iterable[PackedLinear], tokens: int) -> dict[tuple[int, int], str]:
    """Let layers use sparse tensor cores for `tokens` tokens or more, where that is faster and can be done.

    Every shape is measured once. The layers that use them hold their weight a second time, as `torch.sparse` has it.

    Returns:
        which way each shape (out, in) runs: `semi_structured` or `dense`.
    """
    chosen: dict[tuple[int, int], str] = {}
    for layer in layers:
        shape = (layer.out_features, layer.in_features)
        if shape not in chosen:
            chosen[shape] = SEMI_STRUCTURED if _gains(layer, tokens) else DENSE
        if chosen[shape] == SEMI_STRUCTURED:
            layer.semi_structured, layer.semi_structured_from = pack_semi_structured(layer.weight), tokens
    return chosen


def _gains(layer: PackedLinear, tokens: int) -> bool:
    """Whether sparse tensor cores can run a layer and are faster than unpacking and multiplying."""
    if why_unavailable(layer.values.device, layer.values.dtype, layer.pattern, layer.out_features, layer.in_features) is not None:
        return False
    x = torch.randn(tokens, layer.in_features, dtype=layer.values.dtype, device=layer.values.device)
    sparse = pack_semi_structured(layer.weight)
    seconds = [
        Timer("multiply()", globals={"multiply": multiply}).blocked_autorange(min_run_time=SECONDS_MEASURED).median
        for multiply in (lambda: linear(x, sparse, layer.bias), lambda: linear(x, layer.weight, layer.bias))
    ]
    return seconds[0] < seconds[1]
