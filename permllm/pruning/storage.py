"""Pruned layers on disk: orders, packed masks and updated weights, one file per decoder layer."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from permllm.artifacts import checked_file, read_manifest, read_tensors, sha256, write_manifest, write_tensors
from permllm.models.checkpoint_files import CheckpointFiles
from permllm.permutation.permutation import Permutation
from permllm.pruning.methods import PrunedGroup, PrunedLayer, PrunedLinear, PruningMethod
from permllm.pruning.permutations import LayerPermutations
from permllm.scratch import Scratch, layer_name
from permllm.sparsity.bits import pack_mask, unpack_mask
from permllm.tensor_files import TensorSpec, read_tensor, tensor_specs

KIND, LEARNED = "prune", "learn"
ORDERS = "orders.safetensors"
ROWS = ".rows"  # ending of the name of an order of output channels


@dataclass(frozen=True)
class SavedPruning:
    """Pruned layers that are read one at a time; a whole layer is refused if it is not as it was written.

    Attributes:
        manifest: pattern, method, seed, fingerprints of model and calibration, and the quality of every group.
    """

    folder: Path
    manifest: dict[str, Any]

    def __iter__(self) -> Iterator[PrunedLayer]:
        return (self.layer(index) for index in range(len(self.manifest["groups"])))

    def layer(self, index: int) -> PrunedLayer:
        """Read one decoder layer."""
        return _read_layer(checked_file(self.folder, self.manifest, layer_name(index)), self.manifest["groups"][index])

    def orders(self, index: int) -> LayerPermutations:
        """Read the orders of one decoder layer alone."""
        file = _layer_file(self.folder, index)
        return {name: Permutation(read_tensor(file, f"{name}.order").to(torch.int64)) for name in self.manifest["groups"][index]}

    def rows(self, index: int) -> dict[str, Permutation]:
        """Read the orders of output channels of one decoder layer, by path; empty but for transposable masks."""
        file = _layer_file(self.folder, index)
        names = [name for name in tensor_specs(file) if name.endswith(ROWS)]
        return {name.removesuffix(ROWS): Permutation(read_tensor(file, name).to(torch.int64)) for name in names}

    def mask_specs(self) -> dict[str, TensorSpec]:
        """Return type and shape of every packed mask, by `<layer>.<path>`."""
        files = {index: tensor_specs(_layer_file(self.folder, index)) for index in range(len(self.manifest["groups"]))}
        return {
            f"{index}.{name.removesuffix('.mask')}": spec for index, specs in files.items() for name, spec in specs.items() if name.endswith(".mask")
        }

    def packed_mask(self, name: str) -> Tensor:
        """Read one packed mask, by `<layer>.<path>`."""
        index, _, path = name.partition(".")
        return read_tensor(_layer_file(self.folder, int(index)), f"{path}.mask")


@dataclass(frozen=True)
class FinishedLayers(Sequence[PrunedLayer]):
    """Pruned layers that an interrupted run left, read one at a time."""

    scratch: Scratch

    def __len__(self) -> int:
        return len(self.scratch)

    def __getitem__(self, index: int) -> PrunedLayer:
        return _read_layer(self.scratch.file(index), self.scratch.record(index)["groups"])

    def restore(self, generator: torch.Generator) -> None:
        """Put a generator where it stood after the last of them."""
        if len(self):
            state = bytes.fromhex(self.scratch.record(len(self) - 1)["generator"])
            generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


def save_pruning(
    folder: Path,
    layers: Iterable[PrunedLayer],
    record: Mapping[str, Any],
    scratch: Scratch | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """Write pruned layers as they come; the manifest comes last.

    Args:
        scratch: where finished layers are kept until all are, each with the state of the `generator` behind it;
            `layers` go on behind those that are there.

    Returns:
        `retained_score` and `output_error`, averaged over all linear groups.
    """
    files: dict[str, str] = {}
    groups: list[dict[str, Any]] = [] if scratch is None else [scratch.record(index)["groups"] for index in range(len(scratch))]
    for index, layer in enumerate(layers, start=len(groups)):
        tensors = {name: tensor for group in layer.items() for name, tensor in _pack_group(*group)}
        groups.append({name: _record(group) for name, group in layer.items()})
        if scratch is None:
            write_tensors(_layer_file(folder, index), tensors)
            files[layer_name(index)] = sha256(_layer_file(folder, index))
        else:
            scratch.keep(index, tensors, {"groups": groups[index], "generator": generator.get_state().numpy().tobytes().hex()})
    if scratch is not None:
        files = scratch.deliver(folder)
    write_manifest(folder, KIND, {**record, "groups": groups}, files)
    flat = [group for layer in groups for group in layer.values()]
    return {name: sum(group[name] for group in flat) / len(flat) for name in ("retained_score", "output_error")}


def write_orders(file: Path, layers: Sequence[LayerPermutations]) -> None:
    """Write the orders of all linear groups of all decoder layers."""
    # clones: a shared order is one tensor in many places, which safetensors refuses
    write_tensors(file, {f"{index}.{name}": order.order.clone() for index, layer in enumerate(layers) for name, order in layer.items()})


def read_orders(file: Path) -> list[LayerPermutations]:
    """Read what `write_orders` wrote."""
    layers: dict[int, LayerPermutations] = {}
    for name, order in read_tensors(file).items():
        index, _, group = name.partition(".")
        layers.setdefault(int(index), {})[group] = Permutation(order)
    return [layers[index] for index in sorted(layers)]


def kept_orders(file: Path, find: Callable[[], list[LayerPermutations]]) -> list[LayerPermutations]:
    """Return the orders that a file holds, or find them and write it."""
    if not file.is_file():
        write_orders(file, find())
    return read_orders(file)


@dataclass(frozen=True)
class SavedOrders:
    """Learned orders.

    Attributes:
        manifest: pattern, method, settings of learning, fingerprints of model and calibration.
    """

    folder: Path
    manifest: dict[str, Any]

    def orders(self) -> list[LayerPermutations]:
        """Read them.

        Raises:
            StaleArtifactError: if the file is not as it was written.
        """
        return read_orders(checked_file(self.folder, self.manifest, ORDERS))


def save_orders(folder: Path, layers: Sequence[LayerPermutations], record: Mapping[str, Any]) -> None:
    """Write learned orders into a folder; the manifest comes last."""
    write_orders(folder / ORDERS, layers)
    write_manifest(folder, LEARNED, record, {ORDERS: sha256(folder / ORDERS)})


def load_orders(folder: Path) -> SavedOrders:
    """Open learned orders.

    Raises:
        StaleArtifactError: if they are missing, not complete, or written by another version.
    """
    return SavedOrders(folder, read_manifest(folder, LEARNED))


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
        if linear.rows is not None:
            yield f"{path}{ROWS}", linear.rows.order.int()


def _record(group: PrunedGroup) -> dict[str, Any]:
    """Return what the manifest says of a linear group; `damping` where it took more than asked for."""
    damping = {} if group.damping is None else {"damping": group.damping}
    return {"linears": list(group.linears), "retained_score": group.retained_score, "output_error": group.output_error, **damping}


def _unpack_group(tensors: Mapping[str, Tensor], name: str, record: Mapping[str, Any]) -> PrunedGroup:
    permutation = Permutation(tensors[f"{name}.order"].to(torch.int64))
    masks = {path: unpack_mask(tensors[f"{path}.mask"], len(permutation)) for path in record["linears"]}
    rows = {path: Permutation(tensors[f"{path}{ROWS}"].to(torch.int64)) for path in masks if f"{path}{ROWS}" in tensors}
    linears = {path: PrunedLinear(mask, tensors.get(f"{path}.weight"), rows.get(path)) for path, mask in masks.items()}
    return PrunedGroup(permutation, linears, record["retained_score"], record["output_error"], record.get("damping"))


def _read_layer(file: Path, groups: Mapping[str, Any]) -> PrunedLayer:
    tensors = read_tensors(file)
    return {name: _unpack_group(tensors, name, record) for name, record in groups.items()}


def _layer_file(folder: Path, index: int) -> Path:
    return folder / layer_name(index)
