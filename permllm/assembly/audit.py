"""Prove from its files alone that a pruned checkpoint is what it claims: whole, N:M in its order, and otherwise its source."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from permllm.artifacts import fingerprint
from permllm.assembly.folding import Folding
from permllm.assembly.packed_format import MANIFEST, PackedCheckpoint, same_bits
from permllm.assembly.record import FOLDED, MASKED, PrunedCheckpoint, foreign_entries, read_masks
from permllm.models.adapter import is_finite
from permllm.models.checkpoint_files import CheckpointFiles
from permllm.permutation.permutation import Permutation
from permllm.sparsity.bits import unpack_mask
from permllm.sparsity.mask import is_nm_sparse
from permllm.sparsity.packed import PackedWeight, pack_weight
from permllm.sparsity.pattern import NMPattern


class AuditError(ValueError):
    """A checkpoint is not what it claims; the message lists all that is wrong."""


@dataclass(frozen=True)
class AuditSummary:
    """What a checkpoint was proved to be.

    Attributes:
        form: masked, folded or packed.
        tensors, targets: how many there are, and how many of them are N:M.
        sparsity: share of zeros in the targets, by pattern.
        bytes: of the weight files.
        compared: whether all but the pruning was found equal to the source.
    """

    form: str
    tensors: int
    targets: int
    sparsity: dict[str, float]
    bytes: int
    compared: bool


def audit(path: Path, source: Path | None = None) -> AuditSummary:
    """Read a masked, folded or packed checkpoint from disk, and prove it.

    Files are whole and have their recorded hashes; every target is N:M in the order of its record, a transposable one both
    ways unless it is folded, its pruned weights are +0.0, no weight is NaN, and `config.json` claims neither sparsity nor
    quantization, which stops other loaders.

    Args:
        source: the dense checkpoint that was pruned. Then all other tensors equal its, bit for bit, and so do the kept weights
            if the method updates none.

    Raises:
        ValueError: if the files or the record cannot be read.
        AuditError: listing everything else that is wrong.
    """
    opened = _open_packed(path) if (path / MANIFEST).is_file() else _open_stock(path)
    checkpoint = opened.checkpoint
    problems = [f"config.json has {name}, which stops other loaders; remove it" for name in foreign_entries(path)]
    problems += opened.problems
    hashes = checkpoint.record.hashes
    if hashes:
        problems += [f"{name} has no recorded hash" for name in sorted(checkpoint.parameters.keys() - hashes.keys())]
        problems += [f"{name} has a recorded hash, but is not there" for name in sorted(hashes.keys() - checkpoint.parameters.keys())]
    targets = _Targets(checkpoint, read_masks(path))
    comparison = _Comparison(checkpoint, targets, source) if source else None
    problems += targets.problems() + (comparison.problems() if comparison else [])
    for name, tensor in opened.tensors:
        found = targets.check(name, tensor) if name in targets else _finite_problems(tensor)
        if hashes and hashes.get(name, "") != fingerprint([tensor]):
            found.append("has another hash than recorded")
        found += comparison.check(name, tensor) if comparison else []
        problems += [f"{name} {problem}" for problem in found]
    if problems:
        raise AuditError("\n- ".join([f"{path} is not what it claims:", *problems]))
    sparsity = {str(checkpoint.record.pattern): targets.zeros / targets.weights}
    return AuditSummary(opened.form, len(checkpoint.parameters), len(targets.places), sparsity, opened.bytes, source is not None)


@dataclass(frozen=True)
class _Opened:
    """A checkpoint, its tensors in the order that its record describes, and what is wrong with how they are stored."""

    checkpoint: PrunedCheckpoint
    form: str
    tensors: Iterator[tuple[str, Tensor]]
    bytes: int
    problems: list[str]


def _open_stock(path: Path) -> _Opened:
    files = CheckpointFiles.find(path)
    checkpoint = PrunedCheckpoint.open(path, files.names())
    tensors = (pair for shard in files.shards for pair in files.shard_tensors(shard))
    return _Opened(checkpoint, checkpoint.record.form, tensors, files.total_bytes(), [])


def _open_packed(path: Path) -> _Opened:
    packed = PackedCheckpoint.open(path)
    checkpoint = PrunedCheckpoint.open(path, packed.manifest.tensors, packed.manifest.pattern)
    problems = [
        f"{name} has groups that do not store exactly {weight.pattern.kept} of {weight.pattern.group} weights"
        for file in packed.weight_files
        for name, weight in packed.stored(file)
        if isinstance(weight, PackedWeight) and not _stores_exactly(weight.mask(), weight.pattern)
    ]
    unpacked = sorted(name for name in checkpoint.targets() if packed.manifest.tensors[name].values is None)
    problems += [f"{name} is not packed" for name in unpacked]
    tensors = () if problems else (pair for file in packed.weight_files for pair in packed.restored(file))
    return _Opened(checkpoint, "packed", iter(tensors), sum(packed.manifest.files[file]["bytes"] for file in packed.weight_files), problems)


def _stores_exactly(mask: Tensor, pattern: NMPattern) -> bool:
    return bool((mask.unflatten(-1, (-1, pattern.group)).sum(-1) == pattern.kept).all())


def _finite_problems(tensor: Tensor) -> list[str]:
    is_broken = tensor.is_floating_point() and tensor.numel() and not is_finite(tensor)
    return ["holds NaN or infinity"] if is_broken else []


class _Targets:
    """The pruned tensors of a checkpoint: their orders and masks, and how many of their weights are zero."""

    def __init__(self, checkpoint: PrunedCheckpoint, masks: Mapping[str, Tensor]) -> None:
        self.places = checkpoint.targets()
        self._record, self._pattern = checkpoint.record, checkpoint.record.pattern
        self._orders = checkpoint.record.stored_orders()
        self._masks = masks
        self.zeros = self.weights = 0

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def mask(self, name: str, in_channels: int) -> Tensor | None:
        """Return the recorded mask of a tensor, None if there is none."""
        index, _, path = self.places[name]
        packed = self._masks.get(f"{index}.{path}")
        return None if packed is None else unpack_mask(packed, in_channels)

    def problems(self) -> list[str]:
        """Return which masks of a record are missing."""
        missing = [name for name, (index, _, path) in self.places.items() if f"{index}.{path}" not in self._masks]
        return [f"{name} has no recorded mask" for name in missing] if self._masks else []

    def check(self, name: str, tensor: Tensor) -> list[str]:
        """Return what is wrong with a pruned tensor."""
        self.zeros += int((tensor == 0).sum())
        self.weights += tensor.numel()
        index, group, path = self.places[name]
        order, mask = self._orders[index][group], self.mask(name, tensor.shape[-1])
        ordered = order.apply(tensor)
        problems = _violations(ordered, self._pattern)
        if self._record.is_transposable and self._record.form == MASKED:
            rows = self._record.rows.get(f"{index}.{path}")
            if not is_nm_sparse((ordered if rows is None else rows.apply(ordered, 0)).t(), self._pattern):
                problems.append(f"is not {self._pattern} along its output channels, as transposable masks are")
        if mask is not None:
            problems += self._mask_problems(tensor, mask, order)
        return problems

    def _mask_problems(self, tensor: Tensor, mask: Tensor, order: Permutation) -> list[str]:
        if mask.shape != tensor.shape:
            return [f"has shape {tuple(tensor.shape)}, but its recorded mask {tuple(mask.shape)}"]
        problems = [] if _stores_exactly(order.apply(mask), self._pattern) else [f"has a recorded mask that is not {self._pattern} in its order"]
        if not same_bits(tensor, tensor.masked_fill(~mask, 0.0)):
            problems.append("has pruned weights that are not +0.0")
        return problems


def _violations(ordered: Tensor, pattern: NMPattern) -> list[str]:
    try:
        pack_weight(ordered, pattern)
    except ValueError as error:
        return [f"cannot be packed in its order: {error}"]
    return []


class _Comparison:
    """The dense checkpoint that a checkpoint was pruned from, and what may differ from it."""

    def __init__(self, checkpoint: PrunedCheckpoint, targets: _Targets, source: Path) -> None:
        self._checkpoint, self._targets, self._source = checkpoint, targets, CheckpointFiles.find(source)
        self._names = set(self._source.names())
        record = checkpoint.record
        self._folding = checkpoint.folding(record.orders) if record.form == FOLDED else Folding()
        settings = record.manifest.get("method_settings", {"update": "unknown"})
        self._keeps_weights = settings.get("update") is None

    def problems(self) -> list[str]:
        """Return what is wrong with the checkpoints as a whole."""
        names = self._checkpoint.parameters.keys()
        problems = [f"{name} is not in the source" for name in sorted(names - self._names)]
        problems += [f"{name} of the source is missing" for name in sorted(self._names - names)]
        recorded = self._checkpoint.record.manifest.get("model_fingerprint")
        if recorded not in (None, self._source.fingerprint()):
            problems.append(f"it was pruned from another checkpoint than {self._source.folder}")
        return problems

    def check(self, name: str, tensor: Tensor) -> list[str]:
        """Return how a tensor differs from the source's where it must not."""
        if name not in self._names:
            return []
        dense = self._folding.apply(self._checkpoint.parameters[name], self._source.read([name])[name])
        if (dense.dtype, dense.shape) != (tensor.dtype, tensor.shape):
            return [f"is {tensor.dtype} {tuple(tensor.shape)}, but {dense.dtype} {tuple(dense.shape)} in the source"]
        if name not in self._targets:
            return [] if same_bits(tensor, dense) else ["differs from the source"]
        mask = self._targets.mask(name, tensor.shape[-1])
        kept = tensor != 0 if mask is None else mask
        return ["has kept weights that differ from the source"] if self._keeps_weights and not same_bits(tensor[kept], dense[kept]) else []
