"""Write the masked checkpoint: stock format, zeros in the original channel order, exact in any runtime.

The weight files are copied one by one with the target tensors replaced, then read back and checked. Beside them a
folder `permllm/` holds the channel orders, the packed masks, a hash of every tensor and a manifest; other loaders ignore
it, and `config.json` is copied as it is.
"""

import functools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from permllm.artifacts import (
    StaleArtifactError,
    checked_file,
    fingerprint,
    need_disk,
    read_manifest,
    sha256,
    write_json,
    write_manifest,
    write_tensors,
)
from permllm.models.adapter import ModelAdapter
from permllm.models.checkpoint_files import PICKLE_INDEX, SAFETENSORS, SAFETENSORS_INDEX, CheckpointFiles
from permllm.permutation.permutation import Permutation
from permllm.pruning.methods import PrunedLinear
from permllm.pruning.storage import ROWS, SavedPruning
from permllm.sparsity.mask import is_nm_sparse
from permllm.sparsity.pattern import NMPattern
from permllm.tensor_files import write_tensors_in_turn

KIND = "assemble"
RECORD_FOLDER, PERMUTATIONS, MASKS, HASHES = "permllm", "permutations.safetensors", "masks.safetensors", "hashes.json"


class VerificationError(RuntimeError):
    """A checkpoint that was just written does not hold what it should."""


def write_masked_checkpoint(source: Path, adapter: ModelAdapter, pruning: SavedPruning, folder: Path) -> dict[str, int]:
    """Copy a checkpoint with its target weights pruned, and prove it by reading it back.

    Args:
        source: the dense checkpoint, whose fingerprint the pruning must name.
        folder: where to write; must not exist or be empty.

    Returns:
        `bytes` of the weight files and `zeros`, the number of pruned weights.

    Raises:
        StaleArtifactError: if the pruning was made from another model.
        ValueError: if the checkpoint lacks a target tensor.
        OSError: if the disk has no room.
        VerificationError: if what was read back is not what was meant to be written.
    """
    files = CheckpointFiles.find(source)
    if files.fingerprint() != pruning.manifest["model_fingerprint"]:
        raise StaleArtifactError(f"{pruning.folder} was made from another model than {source}; run the prune or learn stage again")
    need_disk(folder, files.total_bytes() * 5 // 4)
    folder.mkdir(parents=True, exist_ok=True)
    copy_small_files(source, folder)
    written, hashes = _write_shards(files, _Targets(files, adapter, pruning), folder)
    zeros = _verify(files, CheckpointFiles.find(folder), _Targets(files, adapter, pruning), NMPattern.parse(pruning.manifest["pattern"]))
    _write_record(folder, pruning, hashes)
    return {"bytes": written, "zeros": zeros}


def check_checkpoint(folder: Path) -> None:
    """Compare a checkpoint with its record: every tensor, the files beside them, and the record's own. Reads all of it once.

    Raises:
        StaleArtifactError: if there is no record, or naming everything that is not as it was written.
        ValueError: if the weight files cannot be read.
    """
    record = folder / RECORD_FOLDER
    manifest = read_manifest(record, KIND)
    files, hashes = CheckpointFiles.find(folder), json.loads(checked_file(record, manifest, HASHES).read_text())
    checked_file(record, manifest, PERMUTATIONS)
    changed = [name for name in sorted({*files.names(), *hashes}) if name not in files.specs or hashes.get(name) != fingerprint([files.tensor(name)])]
    changed += [name for name, recorded in manifest["beside"].items() if not (folder / name).is_file() or sha256(folder / name) != recorded]
    if changed:
        raise StaleArtifactError(
            f"{folder} is not as it was written: {', '.join(changed)} changed; run the {KIND} stage again with `dvc repro --force`"
        )


class _Targets:
    """What pruning decided for a checkpoint's target tensors, by their name there. Keeps one layer in memory."""

    def __init__(self, files: CheckpointFiles, adapter: ModelAdapter, pruning: SavedPruning) -> None:
        layers = len(pruning.manifest["groups"])
        names = adapter.tensor_names(layers, files.names())
        self._places = {
            names[adapter.path(index, path)]: (index, name, path)
            for index in range(layers)
            for name, group in adapter.linear_groups.items()
            for path in group.readers
        }
        self._layer = functools.lru_cache(maxsize=1)(pruning.layer)

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._places

    def pruned(self, tensor: str) -> tuple[PrunedLinear, Permutation]:
        """Return what pruning decided for a tensor, and the order of its input channels."""
        index, name, path = self._places[tensor]
        group = self._layer(index)[name]
        return group.linears[path], group.permutation


def copy_small_files(source: Path, folder: Path) -> None:
    """Copy configuration, tokenizer and what else lies beside the weights of a checkpoint."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not _is_weights(path):
            shutil.copyfile(path, folder / path.name)


def _is_weights(path: Path) -> bool:
    """Whether a file belongs to the weights; an index is checked against the files that it names whenever those are read."""
    return path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack") or path.name in (SAFETENSORS_INDEX, PICKLE_INDEX)


def _write_shards(files: CheckpointFiles, targets: _Targets, folder: Path) -> tuple[int, dict[str, str]]:
    """Return the bytes of all tensors, and the fingerprint of each."""
    hashes = dict.fromkeys(files.names(), "")

    def pruned(name: str) -> Tensor:
        tensor = files.tensor(name)
        tensor = targets.pruned(name)[0].apply(tensor) if name in targets else tensor
        hashes[name] = fingerprint([tensor])
        return tensor

    weight_map: dict[str, str] = {}
    for shard, names in files.shards.items():
        written = SAFETENSORS if len(files.shards) == 1 else Path(shard).with_suffix(".safetensors").name
        write_tensors_in_turn(folder / written, {name: files.specs[name] for name in names}, pruned, {"format": "pt"})
        weight_map |= dict.fromkeys(names, written)
    total = sum(spec.nbytes for spec in files.specs.values())
    if len(files.shards) > 1:
        write_json(folder / SAFETENSORS_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total, hashes


def _verify(source: CheckpointFiles, written: CheckpointFiles, targets: _Targets, pattern: NMPattern) -> int:
    """Compare the written checkpoint with the source, tensor by tensor; return the number of pruned weights."""
    problems: list[str] = []
    zeros = 0
    for name in source.names():
        tensor, found = source.tensor(name), written.tensor(name)
        if name not in targets:
            if not torch.equal(found, tensor):
                problems.append(f"{name} changed")
            continue
        linear, permutation = targets.pruned(name)
        zeros += int((~linear.mask).sum())
        if not is_nm_sparse(permutation.apply(found), pattern):
            problems.append(f"{name} is not {pattern} in its channel order")
        if found.masked_fill(linear.mask, 0).view(torch.uint8).any():  # also catches -0.0
            problems.append(f"{name} has pruned weights that are not +0.0")
        if linear.weight is None and not torch.equal(found.masked_fill(~linear.mask, 0), tensor.masked_fill(~linear.mask, 0)):
            problems.append(f"{name} has kept weights that changed")
    if problems:
        raise VerificationError(f"{written.folder} was not written as it should be: {'; '.join(problems)}")
    return zeros


def write_record_manifest(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the manifest of a checkpoint's record, with the hashes of the record's files and of the small files beside the weights."""
    hashed = {name: sha256(folder / RECORD_FOLDER / name) for name in (PERMUTATIONS, HASHES)}
    beside = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file() and not _is_weights(path)}
    write_manifest(folder / RECORD_FOLDER, KIND, {**record, "beside": beside}, hashed)


def _write_record(folder: Path, pruning: SavedPruning, hashes: dict[str, str]) -> None:
    record, layers = folder / RECORD_FOLDER, range(len(pruning.manifest["groups"]))
    orders = {f"{index}.{name}": order.order.int() for index in layers for name, order in pruning.orders(index).items()}
    orders |= {f"{index}.{path}{ROWS}": order.order.int() for index in layers for path, order in pruning.rows(index).items()}
    write_tensors(record / PERMUTATIONS, orders)
    write_tensors_in_turn(record / MASKS, pruning.mask_specs(), pruning.packed_mask)
    write_json(record / HASHES, hashes)
    write_record_manifest(folder, pruning.manifest)
