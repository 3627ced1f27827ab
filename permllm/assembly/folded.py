"""Write the folded checkpoint: stock architecture, N:M in memory, nothing to permute at run time."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from permllm.artifacts import creating_folder, fingerprint, need_disk, read_manifest, write_json, write_tensors
from permllm.assembly.checkpoint import HASHES, KIND, MASKS, PERMUTATIONS, RECORD_FOLDER, VerificationError, copy_small_files, write_record_manifest
from permllm.assembly.folding import Folding
from permllm.assembly.record import FOLDED, PrunedCheckpoint, read_masks
from permllm.calibration.capture import all_logits
from permllm.models.checkpoint_files import SAFETENSORS_INDEX, CheckpointFiles
from permllm.models.loading import ModelSource
from permllm.models.streaming import StreamedModel
from permllm.sparsity.bits import pack_mask, unpack_mask
from permllm.sparsity.mask import is_nm_sparse
from permllm.tensor_files import write_tensors_in_turn

GATE_TOKENS = (2, 64)  # sequences and their length
GATE_TOLERANCE = 1e-3  # of the largest logit, in float32: sums are taken in another order


def write_folded_checkpoint(masked: Path, folder: Path) -> dict[str, float]:
    """Fold the channel orders of a masked checkpoint into its weights, after proving that its logits stay.

    Args:
        masked: a masked checkpoint with its record, pruned under the `foldable` layout.
        folder: where to write; must not exist or be empty.

    Returns:
        `bytes` of the weight files, and `folding_error`, the largest change of a logit relative to the largest logit.

    Raises:
        ValueError: if an order would have to be gathered at run time: naming all such linear groups.
        VerificationError: if the logits change, or what was read back is not what was meant. Nothing is written.
        OSError: if the disk has no room.
    """
    files = CheckpointFiles.find(masked)
    checkpoint = PrunedCheckpoint.open(masked, files.names())
    folding = checkpoint.folding(checkpoint.record.stored_orders())
    if not folding.is_complete:
        left = [f"{checkpoint.adapter.layer_path(index)} {name}" for index, layer in enumerate(folding.gathers) for name in layer]
        raise ValueError(f"{masked} cannot be folded: {', '.join(left)} would have to be gathered at run time; prune it under layout foldable")
    error = folding_error(StreamedModel.open(ModelSource(str(masked), dtype="float32", device="cpu")), folding)
    if not error <= GATE_TOLERANCE:
        raise VerificationError(f"folding {masked} would change its logits by {error:.2g} of the largest one; at most {GATE_TOLERANCE:g} is rounding")
    with creating_folder(folder) as partial:
        need_disk(folder, files.total_bytes() * 5 // 4)
        copy_small_files(masked, partial)
        written = _write_shards(files, checkpoint, folding, partial)
        _verify(files, CheckpointFiles.find(partial), checkpoint, folding)
    return {"bytes": written, "folding_error": error}


def folding_error(model: StreamedModel, folding: Folding) -> float:
    """Return by how much folding changes a logit at most, relative to the largest one, on random tokens.

    Args:
        model: in float32, as it is before.
    """
    tokens = torch.randint(model.model.config.vocab_size, GATE_TOKENS, generator=torch.Generator().manual_seed(0))
    before = all_logits(model, tokens)
    return float((all_logits(replace(model, change=folding.apply), tokens) - before).abs().max() / before.abs().max())


def _write_shards(files: CheckpointFiles, checkpoint: PrunedCheckpoint, folding: Folding, folder: Path) -> int:
    hashes = dict.fromkeys(files.names(), "")

    def folded(name: str) -> Tensor:
        tensor = folding.apply(checkpoint.parameters[name], files.tensor(name))
        hashes[name] = fingerprint([tensor])
        return tensor

    for shard, names in files.shards.items():
        write_tensors_in_turn(folder / shard, {name: files.specs[name] for name in names}, folded, {"format": "pt"})
    total = sum(spec.nbytes for spec in files.specs.values())
    if len(files.shards) > 1:
        (folder / SAFETENSORS_INDEX).write_bytes((files.folder / SAFETENSORS_INDEX).read_bytes())
    record, before = folder / RECORD_FOLDER, files.folder / RECORD_FOLDER
    record.mkdir()
    (record / PERMUTATIONS).write_bytes((before / PERMUTATIONS).read_bytes())
    write_tensors(record / MASKS, _fold_masks(checkpoint, folding, read_masks(files.folder)))
    write_json(record / HASHES, hashes)
    write_record_manifest(folder, {**read_manifest(before, KIND), "form": FOLDED})
    return total


def _fold_masks(checkpoint: PrunedCheckpoint, folding: Folding, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the masks, as bits, in the order in which the folded weights lie."""
    folded = {}
    for name, (index, group, path) in checkpoint.targets().items():
        mask = unpack_mask(masks[f"{index}.{path}"], len(checkpoint.record.orders[index][group]))
        folded[f"{index}.{path}"] = pack_mask(folding.apply(checkpoint.parameters[name], mask))
    return folded


def _verify(source: CheckpointFiles, written: CheckpointFiles, checkpoint: PrunedCheckpoint, folding: Folding) -> None:
    problems, targets = [], checkpoint.targets()
    for name in source.names():
        found = written.tensor(name)
        if not torch.equal(found, folding.apply(checkpoint.parameters[name], source.tensor(name))):
            problems.append(f"{name} is not the folded tensor")
        if name in targets and not is_nm_sparse(found, checkpoint.record.pattern):
            problems.append(f"{name} is not {checkpoint.record.pattern} as it lies")
    if problems:
        raise VerificationError(f"{written.folder} was not written as it should be: {'; '.join(problems)}")
