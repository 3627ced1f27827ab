"""Learning by several processes of one machine: each runs its share of every batch, and keeps its share of the weights.

A rank is one of the processes that `torchrun` starts together, with a device of its own. PyTorch's FSDP2 divides every decoder
layer among the ranks by rows, (out, in), and gathers it while it runs. Sums over a batch and over rows are made by all ranks
together, so all of them know the same losses and take the same decisions; a process that is alone does nothing of this.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from permllm.artifacts import fingerprint
from permllm.models.adapter import ModelAdapter
from permllm.models.loading import ModelSource, resolve_device
from permllm.models.streaming import LayeredModel, LoadedModel, StreamedModel

Made = TypeVar("Made")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Share:
    """The part of a batch that one rank runs.

    Attributes:
        rows: (sequences,) never empty: a rank that the batch has no sequence for runs the first one to stay in step.
        first: the place of `rows[0]` in the batch.
        weight: how much of the batch's mean the mean over `rows` is, 0..1.
    """

    rows: Tensor
    first: int
    weight: float


@dataclass(frozen=True)
class Ranks:
    """Which of the processes this is; by default the only one.

    Attributes:
        count: of all of them.
        device: of this one.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = CPU

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files."""
        return self.rank == 0

    def check(self, batch_size: int, model: nn.Module, adapter: ModelAdapter) -> None:
        """Refuse more ranks than a batch has sequences, or a linear rows.

        Raises:
            ValueError: naming the setting, or every linear.
        """
        check_processes(self.count, batch_size)
        narrow = [
            f"{adapter.path(index, path)} has {linear.out_features}"
            for index, layer in enumerate(adapter.layers(model))
            for path, linear in adapter.linears(layer).items()
            if (self.count - 1) * self._share_of(linear.out_features) >= linear.out_features
        ]
        if narrow:
            raise ValueError(f"{self.count} processes divide the rows of every linear, but {', '.join(narrow)}; use fewer processes")

    def share(self, rows: Tensor) -> Share:
        """Return the part of a batch, (sequences,), that this rank runs."""
        parts = rows.tensor_split(self.count)
        part, first = parts[self.rank], sum(map(len, parts[: self.rank]))
        return Share(part, first, len(part) / len(rows)) if len(part) else Share(rows[:1], 0, 0.0)

    def rows(self, count: int) -> slice:
        """Return the rows of a weight that this rank keeps, as FSDP2 divides them."""
        size = self._share_of(count)
        return slice(self.rank * size, min((self.rank + 1) * size, count))

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of all ranks' tensors, in the place of this rank's."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_rows(self, gradient: Tensor) -> Tensor:
        """Return this rank's rows, (in, rows), of the sum of all ranks' gradients, (in, out)."""
        if self.count == 1:
            return gradient
        channels, count = gradient.shape
        size, mine = self._share_of(count), self.rows(count)
        padded = gradient.new_zeros(size * self.count, channels)
        padded[:count] = gradient.t()
        summed = gradient.new_empty(size, channels)
        dist.reduce_scatter_single(summed, padded)
        return summed[: mine.stop - mine.start].t()

    def all(self, flags: Sequence[bool]) -> list[bool]:
        """Return for each flag whether it is set on every rank."""
        missing = torch.tensor([not flag for flag in flags], dtype=torch.int32, device=self.device)
        return [not count for count in self.sum(missing).tolist()]

    def of_first(self, make: Callable[[], Made]) -> Made:
        """Return what the first rank makes; the others make nothing."""
        if self.count == 1:
            return make()
        made = [make() if self.is_first else None]
        dist.broadcast_object_list(made, device=self.device)
        return made[0]

    def check_same(self, what: str, tensors: Sequence[Tensor]) -> None:
        """Refuse to go on when the ranks do not have equal tensors.

        Raises:
            RuntimeError: if this rank's are not those of the first one.
        """
        if self.count > 1:
            mine = fingerprint(tensor.cpu() for tensor in tensors)
            if mine != (first := self.of_first(lambda: mine)):
                raise RuntimeError(f"{what} of process {self.rank} are not those of process 0 ({mine}, not {first}); are their devices of one kind?")

    def _share_of(self, count: int) -> int:
        return -(-count // self.count)


ALONE = Ranks()


def check_processes(count: int, batch_size: int) -> None:
    """Refuse more processes than a batch has sequences.

    Raises:
        ValueError: naming the setting.
    """
    if batch_size < count:
        raise ValueError(f"learn.batch_size is {batch_size}, but {count} processes divide a batch; raise it to at least {count}, or lower processes")


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Be one of the processes that `torchrun` started, or the only one outside of it.

    Args:
        device: `auto`, `cpu` or `cuda`: every process takes the GPU of its own number.

    Raises:
        ValueError: if the device names one GPU for all, or there are fewer GPUs than processes.
    """
    count = int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1
    if count == 1:
        yield Ranks(device=resolve_device(device))
        return
    kind, local = resolve_device(device), int(os.environ["LOCAL_RANK"])
    if kind.index is not None:
        raise ValueError(f"device is {device}, but {count} processes need one each; choose cuda, and set CUDA_VISIBLE_DEVICES to leave GPUs out")
    if kind.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(f"there are {torch.cuda.device_count()} CUDA devices for {os.environ['LOCAL_WORLD_SIZE']} processes; lower processes")
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if kind.type == "cuda" else "gloo")
    yield Ranks(dist.get_rank(), dist.get_world_size(), kind)
    dist.destroy_process_group()  # not after an error: the others may still wait for this one, until torchrun ends them


def open_sharded(source: ModelSource, ranks: Ranks) -> LoadedModel:
    """Load a checkpoint of which every rank keeps its share of each decoder layer; what lies outside of them, all keep.

    One whole decoder layer is in memory at a time.

    Raises:
        ValueError: as `load_model`, naming all that is wrong.
    """
    from torch.distributed.fsdp import fully_shard  # takes half a second

    streamed = StreamedModel.open(source)
    model, adapter = streamed.model, streamed.adapter
    mesh = init_device_mesh(ranks.device.type, (ranks.count,))
    for index, layer in enumerate(adapter.layers(model)):
        path = adapter.layer_path(index)
        layer.load_state_dict({name: streamed.read(f"{path}.{name}") for name in layer.state_dict()}, assign=True)
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    outside = [name for name in streamed.stored if not name.startswith(f"{adapter.decoder_layers}.")]
    model.load_state_dict({name: streamed.read(name) for name in outside}, assign=True, strict=False)
    model.tie_weights()
    return LoadedModel(model, adapter)


def is_sharded(weight: Tensor) -> bool:
    """Whether every rank keeps some rows of a weight."""
    return hasattr(weight, "full_tensor")  # a DTensor, whose class takes half a second to import


def whole(weight: Tensor) -> Tensor:
    """Return all rows of a weight; all ranks ask for it together."""
    return weight.full_tensor() if is_sharded(weight) else weight


def kept_rows(weight: Tensor) -> Tensor:
    """Return the rows of a weight that this rank keeps."""
    return weight.to_local() if is_sharded(weight) else weight


class WholeWeights(Sequence[Mapping[str, Tensor]]):
    """The target weights of every decoder layer by path below it, read or gathered a layer at a time when they are asked for."""

    def __init__(self, layered: LayeredModel) -> None:
        self.layered = layered
        self._latest = lru_cache(maxsize=1)(self._of)

    def __len__(self) -> int:
        return len(self.layered)

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        return self._latest(index)

    def _of(self, index: int) -> Mapping[str, Tensor]:
        with self.layered.layer(index) as layer:
            return {path: whole(linear.weight.detach()) for path, linear in self.layered.adapter.linears(layer).items()}
