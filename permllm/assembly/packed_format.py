"""The packed checkpoint on disk: what its manifest says, and reading it with nothing taken on trust.

docs/packed-format.md describes every byte. Files are checked against the manifest before a tensor is read.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from permllm.artifacts import fingerprint, read_tensors, sha256, versions, write_json
from permllm.permutation.permutation import Permutation
from permllm.sparsity.packed import PackedWeight
from permllm.sparsity.pattern import NMPattern

KIND, FORMAT = "packed", 1
MANIFEST, ORDERS = "packed.json", "packed.orders.safetensors"


class PackedFormatError(ValueError):
    """A folder that is no packed checkpoint of this format version, or not as it was written."""


@dataclass(frozen=True)
class StoredTensor:
    """How one tensor of the checkpoint lies in the packed one.

    Attributes:
        file: the file that holds it.
        dtype, shape: of the checkpoint's tensor.
        parameter: of the model that it fills; None if models do not read it.
        rows, columns: names of the orders of its first and last dimension; None if they are as in the checkpoint.
        values, bits: names of a packed tensor's parts; None for others, which keep their name.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    parameter: str | None
    rows: str | None = None
    columns: str | None = None
    values: str | None = None
    bits: str | None = None

    def parts(self, name: str, pattern: NMPattern) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return dtype and shape of what the file holds of the tensor, by name."""
        if self.values is None or self.bits is None:
            return {name: (self.dtype, self.shape)}
        rows, channels = self.shape
        values = (rows, channels // pattern.group * pattern.kept)
        return {self.values: (self.dtype, values), self.bits: ("uint8", (rows, -(-channels // 8)))}


@dataclass(frozen=True)
class PackedManifest:
    """What `packed.json` says.

    Attributes:
        architecture: the class of the model.
        source: fingerprint and form (masked or folded) of the checkpoint that was packed.
        gathers: by decoder layer, the linear groups whose input has to be permuted at run time, and the order's name.
        tensors: by name in the checkpoint.
        files: size and SHA-256 of every file of the folder but this one.
    """

    pattern: NMPattern
    architecture: str
    source: Mapping[str, str]
    gathers: tuple[Mapping[str, str], ...]
    tensors: Mapping[str, StoredTensor]
    files: Mapping[str, Mapping[str, Any]]

    def write(self, folder: Path) -> None:
        """Write it, last of all files."""
        record = {
            "kind": KIND,
            "format": FORMAT,
            "pattern": str(self.pattern),
            "architecture": self.architecture,
            "source": dict(self.source),
            "gathers": [dict(groups) for groups in self.gathers],
            "tensors": {name: {key: value for key, value in asdict(stored).items() if value is not None} for name, stored in self.tensors.items()},
            "files": dict(self.files),
            "versions": versions(),
        }
        write_json(folder / MANIFEST, {**record, "checksum": _checksum(record)})

    @classmethod
    def read(cls, folder: Path) -> "PackedManifest":
        """Read it.

        Raises:
            PackedFormatError: if there is none, it is of another format version, or damaged.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise PackedFormatError(
                f"{folder} is not a packed checkpoint: it has no {MANIFEST}; load stock checkpoints with transformers.AutoModelForCausalLM, "
                "or pack a pruned one with `permllm pack`"
            )
        try:
            record = json.loads(path.read_text())
            found = (record["kind"], record["format"])
            if found == (KIND, FORMAT):
                return cls._parse(record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PackedFormatError(f"{path} is damaged ({error!r}); copy or pack the checkpoint again") from error
        raise PackedFormatError(
            f"{path} is a {found[0]} checkpoint of format {found[1]}, but this version of permllm reads {KIND} checkpoints of format {FORMAT}; "
            "use the version of permllm that wrote it, or pack the checkpoint again"
        )

    @classmethod
    def _parse(cls, record: dict[str, Any]) -> "PackedManifest":
        if record.pop("checksum") != _checksum(record):
            raise ValueError("its checksum is of other contents")
        return cls(
            NMPattern.parse(record["pattern"]),
            record["architecture"],
            record["source"],
            tuple(record["gathers"]),
            {name: StoredTensor(**{"parameter": None, **stored, "shape": tuple(stored["shape"])}) for name, stored in record["tensors"].items()},
            record["files"],
        )

    def by_file(self) -> dict[str, list[str]]:
        """Return the names of the tensors in each weight file."""
        names: dict[str, list[str]] = {}
        for name, stored in self.tensors.items():
            names.setdefault(stored.file, []).append(name)
        return names

    def order_names(self) -> set[str]:
        """Return the names of the orders that tensors are stored in or inputs are gathered by."""
        names = {name for groups in self.gathers for name in groups.values()}
        return names | {name for stored in self.tensors.values() for name in (stored.rows, stored.columns) if name is not None}


def _checksum(record: Mapping[str, Any]) -> str:
    return fingerprint([record])


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of every file below a folder, by its path there."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths}


def file_problems(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what is wrong with the files of a folder; contents are hashed where the size is right."""
    problems = []
    for name, recorded in files.items():
        path = folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            problems.append(f"{name} lies outside of the folder")
        elif not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != recorded["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes, not {recorded['bytes']}")
        elif sha256(path) != recorded["sha256"]:
            problems.append(f"{name} has another SHA-256 than recorded: its contents changed")
    return problems


@dataclass(frozen=True)
class PackedCheckpoint:
    """A packed checkpoint whose files are those that were written; its tensors are read one by one.

    Attributes:
        orders: those that the manifest names.
    """

    folder: Path
    manifest: PackedManifest
    orders: Mapping[str, Permutation]

    @classmethod
    def open(cls, folder: Path) -> "PackedCheckpoint":
        """Check all files, and open them.

        Raises:
            PackedFormatError: if the manifest cannot be read, or naming every file that is missing or not as it was
                written, and every tensor that is missing, unexpected, or of another type or shape.
        """
        manifest = PackedManifest.read(folder)
        problems = file_problems(folder, manifest.files)
        if not problems:
            problems = _tensor_problems(folder, manifest)
        if problems:
            raise PackedFormatError(f"the packed checkpoint {folder} is damaged: {'; '.join(problems)}; copy or pack it again")
        orders = read_tensors(folder / ORDERS) if manifest.order_names() else {}
        return cls(folder, manifest, {name: Permutation(order.long()) for name, order in orders.items()})

    def stored(self, file: str) -> Iterator[tuple[str, Tensor | PackedWeight]]:
        """Yield the tensors of one weight file as they are stored, by name in the checkpoint; memory-mapped."""
        with safe_open(self.folder / file, framework="pt") as opened:
            for name in self._names[file]:
                stored = self.manifest.tensors[name]
                if stored.values is None or stored.bits is None:
                    yield name, opened.get_tensor(name)
                else:
                    yield name, PackedWeight(opened.get_tensor(stored.values), opened.get_tensor(stored.bits), self.manifest.pattern, stored.shape[1])

    @property
    def weight_files(self) -> list[str]:
        """The names of the weight files."""
        return sorted(self._names)

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        return self.manifest.by_file()

    def restore(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor of the shape of the checkpoint's in the checkpoint's order."""
        stored = self.manifest.tensors[name]
        for dim, order in ((0, stored.rows), (-1, stored.columns)):
            if order is not None:
                tensor = self.orders[order].inverse().apply(tensor, dim)
        return tensor

    def restored(self, file: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of one weight file as the checkpoint has them, zeros and order included."""
        for name, tensor in self.stored(file):
            yield name, self.restore(name, tensor.dense() if isinstance(tensor, PackedWeight) else tensor)


def _tensor_problems(folder: Path, manifest: PackedManifest) -> list[str]:
    orders = manifest.order_names()
    needed: dict[str, dict[str, tuple[str, tuple[int, ...]] | None]] = {ORDERS: dict.fromkeys(orders)} if orders else {}
    for file, names in manifest.by_file().items():
        needed[file] = {}
        for name in names:
            needed[file] |= manifest.tensors[name].parts(name, manifest.pattern)
    problems = [f"{file} is not among the files" for file in needed if file not in manifest.files]
    for file, parts in needed.items():
        if file in manifest.files:
            problems += _part_problems(folder / file, parts)
    return problems


def _part_problems(path: Path, needed: Mapping[str, tuple[str, tuple[int, ...]] | None]) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            problems = [f"{name} is not in {path.name}" for name in sorted(needed.keys() - names)]
            problems += [f"{name} in {path.name} is unexpected" for name in sorted(names - needed.keys())]
            for name in sorted(names & needed.keys()):
                tensor = file.get_tensor(name)
                found = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
                if needed[name] not in (None, found):
                    problems.append(f"{name} in {path.name} is {found[0]} {found[1]}, not {needed[name][0]} {needed[name][1]}")
    except (SafetensorError, OSError) as error:
        return [f"{path.name} cannot be read ({error})"]
    return problems


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are equal in type, shape and every bit: -0.0 differs from +0.0, and a NaN equals itself."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)))
