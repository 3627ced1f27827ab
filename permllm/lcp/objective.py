"""Distances between the dense and the sparse model's hidden states."""

from torch import Tensor
from torch.nn.functional import cosine_similarity


def cosine_distance(sparse: Tensor, dense: Tensor) -> Tensor:
    """Return 1 - cosine similarity over the channels, averaged over the tokens.

    Args:
        sparse, dense: (sequences, length, channels) hidden states; compared in float32.

    Source: PermLLM (NeurIPS 2025), equation 8.
    """
    return 1 - cosine_similarity(sparse.float(), dense.float(), dim=-1).mean()


OBJECTIVES = {"cosine": cosine_distance}
