"""N:M sparse language models with learnable channel permutations.

`permllm.prune` prunes a loaded model in one call, `permllm.load` loads a packed checkpoint; the packages below hold the parts.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from permllm.api import PruneResult, load, prune

__all__ = ["PruneResult", "load", "prune"]


def __getattr__(name: str) -> Any:
    """Import the API when it is asked for: it brings transformers, which takes seconds."""
    if name in __all__:
        from permllm import api

        return getattr(api, name)
    raise AttributeError(f"module 'permllm' has no attribute {name!r}")
