"""N:M sparse language models with learnable channel permutations.

`permllm.prune` prunes a loaded model in one call; the packages below it hold the parts.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from permllm.api import PruneResult, prune

__all__ = ["PruneResult", "prune"]


def __getattr__(name: str) -> Any:
    """Import the API when it is asked for: it brings transformers, which takes seconds."""
    if name in __all__:
        from permllm import api

        return getattr(api, name)
    raise AttributeError(f"module 'permllm' has no attribute {name!r}")
