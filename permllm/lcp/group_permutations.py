"""The permutations of several linear groups that learn together, and their value in the current step."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from permllm.lcp.distributed import ALONE, Ranks
from permllm.lcp.optimizers import Scion
from permllm.lcp.recipes import LearnConfig
from permllm.lcp.schedule import cosine_decay
from permllm.permutation.learnable import LearnableBlocks, gumbel_noise
from permllm.permutation.permutation import Permutation
from permllm.pruning.layout import Member, SharedOrder
from permllm.pruning.permutations import LayerPermutations
from permllm.sparsity.pattern import NMPattern


@dataclass
class GroupPermutation:
    """The permutation of one linear group in this step, shared by all its linears.

    Attributes:
        start: (in,) the order that the blocks begin from; it may carry channels across blocks.
        relaxed: (blocks, size, size), collects the gradient; for the soft estimator also the value. None if the order
            does not learn by logits: it then is `start`.
        local: (blocks, size), the channel that each slot takes, counted inside the block; None for the soft estimator.
    """

    start: Tensor
    relaxed: Tensor | None = None
    local: Tensor | None = None

    @property
    def is_soft(self) -> bool:
        """Whether the value is the relaxed matrix itself."""
        return self.relaxed is not None and self.local is None

    @property
    def order(self) -> Tensor:
        """The hard order of all channels, (in,)."""
        if self.is_soft:
            raise RuntimeError("the permutation has no hard value; call `LearnedGroups.update` with hard=True before")
        return self.start if self.local is None else self.start[Permutation.within_blocks(self.local).order]


class LearnedGroups(nn.Module):
    """Learnable permutations of the linear groups of some decoder layers; blocks of equal size are one tensor.

    Args:
        starts: of every linear group of every layer.
        shared: which of them learn one order together.
        generator: of uniform logits and of noise.

    Attributes:
        layers: the permutations by layer and name of the linear group.
    """

    def __init__(
        self,
        starts: Sequence[LayerPermutations],
        shared: Sequence[SharedOrder],
        pattern: NMPattern,
        config: LearnConfig,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.iterations, self.gumbel, self.soft, self.generator = config.sinkhorn_iterations, config.gumbel, config.estimator == "soft", generator
        self.layers = [{name: GroupPermutation(start.order.to(device)) for name, start in layer.items()} for layer in starts]
        self._shared: dict[int, list[SharedOrder]] = defaultdict(list)
        for one in shared:
            self._shared[config.fitting_block_size(one.block or one.width, pattern)].append(one)
        drawn = generator if config.logits == "uniform" or config.rank else None
        self.blocks = nn.ModuleDict(
            {
                str(size): LearnableBlocks(sum(one.width for one in members) // size, size, drawn, config.rank)
                for size, members in self._shared.items()
            }
        )
        self._arguments: dict[str, tuple[float, int, Tensor | None]] = {}
        self.to(device)

    def update(self, temperature: float, *, hard: bool = False, noise: float = 0.0) -> None:
        """Compute the value of every permutation for this step.

        Args:
            temperature: of Sinkhorn.
            hard: the nearest hard permutation even with the soft estimator, for evaluation.
            noise: factor on the scale of the Gumbel noise.

        Raises:
            ValueError: if the logits are not finite.
        """
        for size, shared in self._shared.items():
            blocks = self.blocks[str(size)]
            shape, device = (len(blocks), size, size), blocks.factors[0].device
            drawn = gumbel_noise(shape, self.gumbel * noise, self.generator, device) if self.gumbel * noise else None
            self._arguments[str(size)] = (temperature, self.iterations, drawn)
            relaxed, counts = blocks.relax(*self._arguments[str(size)]), [one.width // size for one in shared]
            local = repeat(None) if self.soft and not hard else blocks.harden().split(counts)
            for one, part, part_local in zip(shared, relaxed.split(counts), local, strict=False):
                for (layer, name), members in _by_group(one).items():
                    group = self.layers[layer][name]
                    group.relaxed, group.local = (_repeated(value, members, size) for value in (part, part_local))

    def pull_back(self) -> None:
        """Carry the gradients that the values of this step collected to the logits."""
        for size, blocks in self.blocks.items():
            blocks.pull_back(*self._arguments[size])

    def permutations(self) -> list[LayerPermutations]:
        """Return the hard permutations of this step."""
        return [{name: Permutation(group.order) for name, group in layer.items()} for layer in self.layers]


def _by_group(shared: SharedOrder) -> dict[tuple[int, str], list[Member]]:
    groups: dict[tuple[int, str], list[Member]] = defaultdict(list)
    for member in shared.members:
        groups[member.layer, member.group].append(member)
    return groups


def _repeated(value: Tensor | None, members: Sequence[Member], size: int) -> Tensor | None:
    """Return the blocks of a linear group, (blocks, ...), from those of the order that its members share."""
    if value is None or members[0].channels is None:
        return value
    # members are the heads that move alike: every block of theirs is a run of channels, and has a place among the group's
    places = torch.cat([member.channels[::size] // size for member in members])
    return value[(torch.arange(len(places)) % len(value))[places.argsort()].to(value.device)]


class LogitLearner:
    """Moves the logits after every batch, with an optimiser and a cosine schedule.

    Args:
        total_steps: batches of the whole run.
        ranks: that run parts of every batch.
    """

    def __init__(self, groups: LearnedGroups, config: LearnConfig, learning_rate: float, total_steps: int, ranks: Ranks = ALONE) -> None:
        self.groups, self.ranks = groups, ranks
        if config.optimizer == "scion":
            self.optimizer: torch.optim.Optimizer = Scion(groups.parameters(), learning_rate, config.radius, config.norm, config.momentum)
        else:
            self.optimizer = torch.optim.AdamW(groups.parameters(), learning_rate, weight_decay=config.weight_decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: cosine_decay(step / total_steps))

    def prepare(self, temperature: float, *, hard: bool = False, noise: float = 0.0) -> None:
        """Give the permutations their values of this step."""
        self.groups.update(temperature, hard=hard, noise=noise)

    def weigh(self, loss: Tensor, share: float) -> Tensor:
        """Return the loss as it is: every batch is a step."""
        return loss

    def end_batch(self) -> None:
        """Move the logits."""
        self.groups.pull_back()
        for parameter in self.groups.parameters():
            self.ranks.sum(parameter.grad)
        self.optimizer.step()
        self.schedule.step()

    def end_epoch(self, progress: float) -> None:
        """Do nothing."""

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        schedule = {name: value for name, value in self.schedule.state_dict().items() if name != "lr_lambdas"}
        return {"groups": self.groups.state_dict(), "optimizer": self.optimizer.state_dict(), "schedule": schedule}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take a saved state up."""
        self.groups.load_state_dict(state["groups"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict({**state["schedule"], "lr_lambdas": [None]})
