"""Pruned layers on disk: orders, packed masks and updated weights, one file per decoder layer."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from permllm.artifacts import read_manifest, read_tensors, write_manifest, write_tensors
from permllm.models.checkpoint_files import CheckpointFiles
from permllm.permutation.permutation import Permutation
from permllm.pruning.methods import PrunedGroup, PrunedLayer, PrunedLinear, PruningMethod
from permllm.sparsity.bits import pack_mask, unpack_mask

KIND = "prune"


@dataclass(frozen=True)
class SavedPruning:
    """Pruned layers that are read one at a time.

    Attributes:
        manifest: pattern, method, seed, fingerprints of model and calibration, and the quality of every group.
    """

    folder: Path
    manifest: dict[str, Any]

    def __iter__(self) -> Iterator[PrunedLayer]:
        return (self.layer(index) for index in range(len(self.manifest["groups"])))

    def layer(self, index: int) -> PrunedLayer:
        """Read one decoder layer."""
        tensors = read_tensors(_layer_file(self.folder, index))
        return {
            name: _unpack_group(tensors, name, record["linears"], record["retained_score"], record["output_error"])
            for name, record in self.manifest["groups"][index].items()
        }


def save_pruning(folder: Path, layers: Iterable[PrunedLayer], record: Mapping[str, Any]) -> dict[str, float]:
    """Write pruned layers as they come; the manifest comes last.

    Returns:
        `retained_score` and `output_error`, averaged over all linear groups.
    """
    groups: list[dict[str, Any]] = []
    for index, layer in enumerate(layers):
        write_tensors(_layer_file(folder, index), {name: tensor for group in layer.items() for name, tensor in _pack_group(*group)})
        groups.append(
            {
                name: {"linears": list(group.linears), "retained_score": group.retained_score, "output_error": group.output_error}
                for name, group in layer.items()
            }
        )
    write_manifest(folder, KIND, {**record, "groups": groups})
    flat = [group for layer in groups for group in layer.values()]
    return {name: sum(group[name] for group in flat) / len(flat) for name in ("retained_score", "output_error")}


def pruning_bytes(files: CheckpointFiles, method: PruningMethod) -> int:
    """Return at most what the pruned layers of a checkpoint will take on disk: a bit per weight, updated weights in float32.

    Weights are assumed to have 16 bits in the checkpoint; larger ones only raise the bound.
    """
    weights = files.total_bytes() // 2
    return weights // 8 + (weights * torch.float32.itemsize if method.update else 0)


def load_pruning(folder: Path) -> SavedPruning:
    """Open pruned layers.

    Raises:
        StaleArtifactError: if they are missing, not complete, or written by another version.
    """
    return SavedPruning(folder, read_manifest(folder, KIND))


def _pack_group(name: str, group: PrunedGroup) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.order", group.permutation.order.int()
    for path, linear in group.linears.items():
        yield f"{path}.mask", pack_mask(linear.mask)
        if linear.weight is not None:
            yield f"{path}.weight", linear.weight


def _unpack_group(tensors: Mapping[str, Tensor], name: str, paths: list[str], retained_score: float, output_error: float) -> PrunedGroup:
    permutation = Permutation(tensors[f"{name}.order"].to(torch.int64))
    linears = {path: PrunedLinear(unpack_mask(tensors[f"{path}.mask"], len(permutation)), tensors.get(f"{path}.weight")) for path in paths}
    return PrunedGroup(permutation, linears, retained_score, output_error)


def _layer_file(folder: Path, index: int) -> Path:
    return folder / f"layer_{index:03d}.safetensors"
