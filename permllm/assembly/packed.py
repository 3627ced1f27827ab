"""Pack a pruned checkpoint, and unpack it again, bit for bit.

Channel orders are folded into the neighbouring weights where that is possible; the others become gathers at run time.
Neither loses anything: unpacking undoes the orders.
"""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from permllm.artifacts import creating_folder, fingerprint, need_disk, write_json, write_tensors
from permllm.assembly.checkpoint import MASKS, RECORD_FOLDER, VerificationError, copy_small_files
from permllm.assembly.folding import Folding
from permllm.assembly.packed_format import ORDERS, PackedCheckpoint, PackedManifest, StoredTensor, describe_files, same_bits
from permllm.assembly.record import PrunedCheckpoint, PruningRecord, foreign_entries, target_places
from permllm.models.checkpoint_files import SAFETENSORS, SAFETENSORS_INDEX, CheckpointFiles
from permllm.models.families import adapter_for
from permllm.permutation.permutation import Permutation
from permllm.sparsity.bits import pack_mask
from permllm.sparsity.packed import PackedWeight, pack_weight
from permllm.sparsity.pattern import NMPattern


def write_packed(source: Path, folder: Path, pattern: NMPattern | None = None) -> dict[str, int]:
    """Write a pruned checkpoint without its zeros, and prove by reading it back that none of its bits is lost.

    Args:
        source: a masked or folded checkpoint with its record `permllm/`.
        folder: where to write; must not exist or be empty.
        pattern: of a checkpoint without a record, whose weights are N:M in the order in which they lie.

    Returns:
        `bytes` of the packed weight files, and `source_bytes`.

    Raises:
        ValueError: if the folder is not empty, the checkpoint and its record do not fit each other, or naming every weight
            that is not N:M in its order or not finite. Nothing is left behind.
        OSError: if the disk has no room.
        VerificationError: if what was read back is not what was packed.
    """
    with creating_folder(folder) as partial:
        files = CheckpointFiles.find(source)
        checkpoint = PrunedCheckpoint.open(source, files.names(), pattern)
        _check_tied(files, checkpoint)
        foreign = foreign_entries(source)
        if foreign:
            raise ValueError(f"{source / 'config.json'} has {', '.join(foreign)}, which stops other loaders; remove it from the source first")
        need_disk(folder, files.total_bytes())
        copy_small_files(source, partial)
        _copy_record(source, partial)
        folding, orders = checkpoint.folding(checkpoint.record.stored_orders()), _OrderTable()
        tensors = _pack_shards(files, checkpoint, folding, orders, partial)
        gathers = tuple({name: orders.name(order) for name, order in layer.items()} for layer in folding.gathers)
        if orders.tensors:  # safetensors cannot read a file without tensors
            write_tensors(partial / ORDERS, orders.tensors)
        origin = {"fingerprint": files.fingerprint(), "form": checkpoint.record.form}
        architecture = type(checkpoint.model).__name__
        PackedManifest(checkpoint.record.pattern, architecture, origin, gathers, tensors, describe_files(partial)).write(partial)
        packed = PackedCheckpoint.open(partial)
        _verify(files, packed)
        written = sum(packed.manifest.files[file]["bytes"] for file in packed.weight_files)
    return {"bytes": written, "source_bytes": files.total_bytes()}


def _check_tied(files: CheckpointFiles, checkpoint: PrunedCheckpoint) -> None:
    """Refuse a checkpoint that stores two different tensors for parameters that the model ties."""
    tensors = {parameter: name for name, parameter in checkpoint.parameters.items() if parameter is not None}
    for pair in checkpoint.model.all_tied_weights_keys.items():
        if tensors.keys() >= set(pair):
            found = files.read([tensors[parameter] for parameter in pair])
            if not same_bits(*found.values()):
                raise ValueError(
                    f"config.json ties {' and '.join(found)}, but the checkpoint stores different values; set tie_word_embeddings: false"
                )


class _OrderTable:
    """Names for the distinct orders of a folding, in the order of their first use."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[bytes, str] = {}

    def name(self, order: Permutation | None) -> str | None:
        """Return the name of an order, None for one that changes nothing."""
        if order is None or order == Permutation.identity(len(order)):
            return None
        tensor = order.order.int()
        name = self._names.setdefault(tensor.numpy().tobytes(), str(len(self._names)))
        self.tensors[name] = tensor
        return name


def _copy_record(source: Path, folder: Path) -> None:
    """Copy the record but for the masks, which the packed weights hold."""
    if (source / RECORD_FOLDER).is_dir():
        shutil.copytree(source / RECORD_FOLDER, folder / RECORD_FOLDER, ignore=shutil.ignore_patterns(MASKS))


def _pack_shards(
    files: CheckpointFiles, checkpoint: PrunedCheckpoint, folding: Folding, orders: _OrderTable, folder: Path
) -> dict[str, StoredTensor]:
    """Write a packed file for every weight file of the checkpoint; return what the manifest says of the tensors."""
    tensors: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for number, shard in enumerate(files.shards, start=1):
        name = "packed.safetensors" if len(files.shards) == 1 else f"packed-{number:05d}-of-{len(files.shards):05d}.safetensors"
        parts, stored, found = _pack_shard(files.shard_tensors(shard), checkpoint, folding, orders, name)
        tensors |= stored
        problems += found
        if not problems:
            write_tensors(folder / name, parts, {"format": "pt"})
    if problems:
        raise ValueError(f"{files.folder} cannot be packed: {'; '.join(problems)}")
    return tensors


def _pack_shard(
    tensors: Iterable[tuple[str, Tensor]], checkpoint: PrunedCheckpoint, folding: Folding, orders: _OrderTable, file: str
) -> tuple[dict[str, Tensor], dict[str, StoredTensor], list[str]]:
    parts: dict[str, Tensor] = {}
    stored: dict[str, StoredTensor] = {}
    problems: list[str] = []
    targets = checkpoint.targets()
    for name, tensor in tensors:
        parameter = checkpoint.parameters[name]
        values, bits = (f"{name.removesuffix('.weight')}.{part}" if name in targets else None for part in ("values", "bits"))
        rows, columns = orders.name(folding.rows.get(parameter)), orders.name(folding.columns.get(parameter))
        stored[name] = StoredTensor(file, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), parameter, rows, columns, values, bits)
        folded = folding.apply(parameter, tensor)
        if values is None or bits is None:
            parts[name] = folded
            continue
        try:
            packed = pack_weight(folded, checkpoint.record.pattern)
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        parts |= {values: packed.values, bits: packed.bits}
    return parts, stored, problems


def _verify(source: CheckpointFiles, packed: PackedCheckpoint) -> None:
    """Compare what unpacking gives with the checkpoint, tensor by tensor."""
    problems = []
    for shard, file in zip(source.shards, packed.weight_files, strict=True):
        restored = packed.restored(file)
        for (name, tensor), (restored_name, found) in zip(source.shard_tensors(shard), restored, strict=True):
            if name != restored_name or not same_bits(tensor, found):
                problems.append(name)
    if problems:
        raise VerificationError(f"unpacking {packed.folder} does not give back {', '.join(problems)}; this is an error of permllm, please report it")


def unpack(path: Path, folder: Path) -> dict[str, int]:
    """Write the checkpoint that was packed, bit for bit: its tensors, its small files and its record.

    The masks of the record are those of the packed weights: in a group with kept weights of +0.0 they may mark other
    zeros than the original ones did.

    Args:
        path: a packed checkpoint.
        folder: where to write; must not exist or be empty.

    Returns:
        `bytes` of all tensors.

    Raises:
        ValueError: if the folder is not empty, or the packed checkpoint is damaged. Nothing is left behind.
        VerificationError: if a tensor is not the one whose hash was recorded when the checkpoint was made.
    """
    with creating_folder(folder) as partial:
        packed = PackedCheckpoint.open(path)
        record = PruningRecord.read(path) if (path / RECORD_FOLDER).is_dir() else None
        need_disk(folder, 2 * sum(packed.manifest.files[file]["bytes"] for file in packed.weight_files))
        for name in packed.manifest.files.keys() - {*packed.weight_files, ORDERS}:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path / name, partial / name)
        written = _unpack_shards(packed, partial, record.hashes if record else {})
        if record:
            write_tensors(partial / RECORD_FOLDER / MASKS, _masks(packed, len(record.orders)))
    return {"bytes": written}


def _unpack_shards(packed: PackedCheckpoint, folder: Path, hashes: Mapping[str, str]) -> int:
    files, total = packed.weight_files, 0
    weight_map: dict[str, str] = {}
    changed: list[str] = []
    for number, file in enumerate(files, start=1):
        name = SAFETENSORS if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = dict(packed.restored(file))
        changed += [held for held, tensor in tensors.items() if held in hashes and hashes[held] != fingerprint([tensor])]
        write_tensors(folder / name, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if changed:
        raise VerificationError(f"{packed.folder} does not hold the tensors whose hashes its record has: {', '.join(changed)}")
    if len(files) > 1:
        write_json(folder / SAFETENSORS_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def _masks(packed: PackedCheckpoint, layers: int) -> dict[str, Tensor]:
    """Return the masks of the packed weights in the checkpoint's order, as bits, by `<layer>.<path>`."""
    parameters = {name: stored.parameter for name, stored in packed.manifest.tensors.items()}
    places = target_places(adapter_for(packed.manifest.architecture), layers, parameters)
    masks = {}
    for file in packed.weight_files:
        for name, weight in packed.stored(file):
            if isinstance(weight, PackedWeight):
                index, _, path = places[name]
                masks[f"{index}.{path}"] = pack_mask(packed.restore(name, weight.mask()))
    return masks
