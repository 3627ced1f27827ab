"""Orders of channels without learning, by name."""

from collections.abc import Sequence

import torch

from permllm.permutation.heuristic import heuristic_permutation
from permllm.permutation.permutation import Permutation
from permllm.permutation.search import Problem, search_permutation
from permllm.sparsity.pattern import NMPattern

SEARCH_SWEEPS = 1  # a second one lowers the output error further, but not the perplexity

LayerPermutations = dict[str, Permutation]  # of a decoder layer, by the name of the linear group


def _identity(problems: Sequence[Problem], pattern: NMPattern, block: int | None, generator: torch.Generator) -> Permutation:
    return Permutation.identity(problems[0].weight.shape[1])


def _random(problems: Sequence[Problem], pattern: NMPattern, block: int | None, generator: torch.Generator) -> Permutation:
    channels = problems[0].weight.shape[1]
    size = block or channels
    return Permutation.within_blocks(torch.stack([Permutation.random(size, generator).order for _ in range(channels // size)]))


def _heuristic(problems: Sequence[Problem], pattern: NMPattern, block: int | None, generator: torch.Generator) -> Permutation:
    """Keep most score, of several problems most of each one's own total."""
    scores = [problem.score for problem in problems]
    score = scores[0] if len(scores) == 1 else torch.cat([one / one.sum().clamp(min=torch.finfo(one.dtype).tiny) for one in scores])
    parts = score.split(block or score.shape[1], dim=1)
    return Permutation.within_blocks(torch.stack([heuristic_permutation(part, pattern).order for part in parts]))


def _search(problems: Sequence[Problem], pattern: NMPattern, block: int | None, generator: torch.Generator) -> Permutation:
    return search_permutation(problems, pattern, _heuristic(problems, pattern, block, generator), SEARCH_SWEEPS, generator, block)


PERMUTATIONS = {"identity": _identity, "random": _random, "cp": _heuristic, "search": _search}
