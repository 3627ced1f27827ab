"""A checkpoint's weight files, tensor by tensor: safetensors, or pickles through the weights-only loader."""

import json
import pickle
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from permllm.artifacts import fingerprint
from permllm.tensor_files import TensorSpec, read_tensor, tensor_specs, warm

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
        shards: dict[str, tuple[str, ...]] = {}
        problems: list[str] = []
        for name in sorted(set(weight_map.values())):
            if (folder / name).is_file():
                try:
                    shards[name] = _tensor_names(folder / name)
                except ValueError as error:
                    problems.append(str(error))
            else:
                problems.append(f"{name} is not there")
        problems += [f"{tensor} is not in {shard}" for tensor, shard in weight_map.items() if tensor not in shards.get(shard, (tensor,))]
        for shard, names in shards.items():
            problems += [f"{tensor} in {shard} is not in the index" for tensor in names if tensor not in weight_map]
            problems += [
                f"{tensor} is in {shard}, but the index names {weight_map[tensor]}" for tensor in names if weight_map.get(tensor, shard) != shard
            ]
        if problems:
            raise ValueError(f"{folder / index} does not match its files: {'; '.join(problems)}; fetch the checkpoint again")
        return cls(folder, shards)

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return [name for names in self.shards.values() for name in names]

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Type and shape of every tensor, by name."""
        return {name: spec for shard in self.shards for name, spec in self._shard_specs(shard).items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, by name."""
        return {name: spec.shape for name, spec in self.specs.items()}

    @cached_property
    def _shard_of(self) -> dict[str, str]:
        return {name: shard for shard, names in self.shards.items() for name in names}

    def tensor(self, name: str) -> Tensor:
        """Read one tensor; nothing else of its file stays in memory, unless it is a pickle of before torch 1.6."""
        shard = self._shard_of[name]
        if shard.endswith(".safetensors"):
            return read_tensor(self.folder / shard, name)
        return _load_pickle(self.folder / shard)[name].clone()

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        """Return some tensors by name, from whichever files they lie in."""
        return {name: self.tensor(name) for name in names}

    def shard_tensors(self, shard: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of one file by name, one at a time."""
        return ((name, self.tensor(name)) for name in self.shards[shard])

    def warm(self, names: Collection[str]) -> None:
        """Have the system read some tensors into its file cache. Does nothing for pickles."""
        for shard in {self._shard_of[name] for name in names}:
            if shard.endswith(".safetensors"):
                warm(self.folder / shard, [self.specs[name] for name in names if self._shard_of[name] == shard])

    def _shard_specs(self, shard: str) -> dict[str, TensorSpec]:
        if shard.endswith(".safetensors"):
            return tensor_specs(self.folder / shard)
        return {name: TensorSpec.of(tensor) for name, tensor in _load_pickle(self.folder / shard).items()}

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
