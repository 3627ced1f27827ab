"""A checkpoint's weight files, tensor by tensor: safetensors, or pickles through the weights-only loader."""

import json
import pickle
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from permllm.artifacts import fingerprint

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class CheckpointFiles:
    """The weight files of a local checkpoint.

    Attributes:
        folder: where `config.json` lies.
        shards: the tensors of each weight file, by the file's name.
    """

    folder: Path
    shards: dict[str, tuple[str, ...]]

    @classmethod
    def find(cls, folder: Path) -> "CheckpointFiles":
        """List the weight files of a folder; safetensors are preferred to pickles.

        Raises:
            ValueError: if there are none, or if files are missing, damaged, or do not hold what the index says.
        """
        for single, index in ((SAFETENSORS, SAFETENSORS_INDEX), (PICKLE, PICKLE_INDEX)):
            if (folder / single).is_file():  # before the index, as transformers has it
                return cls(folder, {single: _tensor_names(folder / single)})
            if (folder / index).is_file():
                return cls._from_index(folder, index)
        raise ValueError(f"{folder} holds no weights: {SAFETENSORS}, {PICKLE} or their index files are needed")

    @classmethod
    def _from_index(cls, folder: Path, index: str) -> "CheckpointFiles":
        try:
            weight_map = json.loads((folder / index).read_text())["weight_map"]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{folder / index} is damaged ({error!r}); fetch the checkpoint again") from error
        missing = [name for name in sorted(set(weight_map.values())) if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder / index} names files that are not there: {', '.join(missing)}; fetch the checkpoint again")
        shards = {name: _tensor_names(folder / name) for name in sorted(set(weight_map.values()))}
        problems = [f"{tensor} is not in {shard}" for tensor, shard in weight_map.items() if tensor not in shards[shard]]
        problems += [f"{tensor} in {shard} is not in the index" for shard, names in shards.items() for tensor in names if tensor not in weight_map]
        if problems:
            raise ValueError(f"{folder / index} does not match its files: {'; '.join(problems)}; fetch the checkpoint again")
        return cls(folder, shards)

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return [name for names in self.shards.values() for name in names]

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        """Return some tensors by name, from whichever files they lie in."""
        wanted = set(names)
        found: dict[str, Tensor] = {}
        for shard, held in self.shards.items():
            if not wanted.isdisjoint(held):
                found |= dict(self._tensors(shard, [name for name in held if name in wanted]))
        return found

    def shard_tensors(self, shard: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of one file by name, one at a time from safetensors."""
        return self._tensors(shard, self.shards[shard])

    def _tensors(self, shard: str, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        if shard.endswith(".safetensors"):
            with safe_open(self.folder / shard, framework="pt") as file:
                yield from ((name, file.get_tensor(name)) for name in names)
        else:
            tensors = _load_pickle(self.folder / shard)
            yield from ((name, tensors[name]) for name in names)

    def total_bytes(self) -> int:
        """Return the size of all weight files."""
        return sum((self.folder / name).stat().st_size for name in self.shards)

    def fingerprint(self) -> str:
        """Return the content hash of the configuration and of every weight file."""
        return fingerprint([self.folder / "config.json", *(self.folder / name for name in sorted(self.shards))])


def _tensor_names(path: Path) -> tuple[str, ...]:
    if path.suffix != ".safetensors":
        return tuple(_load_pickle(path))
    try:
        with safe_open(path, framework="pt") as file:
            return tuple(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); fetch the checkpoint again") from error


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        return torch.load(path, weights_only=True, mmap=is_zipfile(path), map_location="cpu")  # files of before torch 1.6 cannot be mapped
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors, or is damaged, and was not loaded; use a safetensors checkpoint") from error
    except (RuntimeError, OSError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}); fetch the checkpoint again") from error
