"""Which permutations suit which weight update: every objective of a permutation with every update, over seeds.

A seed draws the calibration sequences, and decides what is random in learning.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from permllm.lcp.recipes import LearnConfig
from permllm.lcp.trainer import learn_permutations
from permllm.pruning.methods import LEARNED_PERMUTATION, PruningMethod
from permllm.pruning.permutations import LayerPermutations
from permllm.sparsity.pattern import NMPattern
from permllm.subject import Subject


@dataclass(frozen=True)
class ObjectiveRows:
    """Permutations of some methods, each with several updates.

    Attributes:
        methods: of params.yaml, whose permutations are found as they say; their own updates do not matter.
        updates: entries of `UPDATES`, or `none`.
    """

    model: str
    patterns: tuple[str, ...]
    methods: tuple[str, ...]
    updates: tuple[str, ...]


@dataclass(frozen=True)
class ObjectivesConfig:
    """The study: which rows, and how many processes share the machine's cores."""

    seeds: tuple[int, ...] = ()
    rows: tuple[ObjectiveRows, ...] = ()
    jobs: int = 1

    def parts(self) -> Iterator["ObjectivePart"]:
        """Yield what is computed together: the rows of one permutation."""
        for rows in self.rows:
            for pattern, method, seed in product(rows.patterns, rows.methods, self.seeds):
                yield ObjectivePart(rows.model, pattern, method, seed, rows.updates)


@dataclass(frozen=True)
class ObjectivePart:
    """One permutation, and the updates that follow it."""

    model: str
    pattern: str
    method: str
    seed: int
    updates: tuple[str, ...]


def find_permutations(subject: Subject, pattern: NMPattern, method: PruningMethod, config: LearnConfig) -> list[LayerPermutations]:
    """Find or learn the permutations of a method; `config` is of learning, and of the seed."""
    if method.is_learned:
        return learn_permutations(subject.layered, subject.samples, subject.statistics, pattern, method.score, config).permutations
    return subject.starts(pattern, method.score, method.permutation, config.seed, method.layout)


def objective_of(method: PruningMethod, config: LearnConfig) -> str:
    """Name what the permutations of a method are chosen by."""
    if method.permutation == "identity":
        return "none"
    return f"{f'lcp {config.recipe}' if method.is_learned else method.permutation}, {method.score}"


def after(method: PruningMethod, update: str) -> PruningMethod:
    """Return a method that prunes in known orders, with an update or `none`."""
    return replace(method, permutation=LEARNED_PERMUTATION, update=None if update == "none" else update)
