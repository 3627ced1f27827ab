"""An audit passes for what the writers write, and names everything that is wrong with anything else."""

import re
import shutil

import pytest
import torch

from permllm.assembly.audit import AuditError, audit
from permllm.assembly.packed import unpack, write_packed
from permllm.assembly.packed_format import PackedFormatError

PROJECTION = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("pattern", ["2:4", "3:8"])
def test_what_is_written_passes_against_its_source(family, pattern, write_masked, tmp_path):
    masked = write_masked(tmp_path, family, pattern)
    write_packed(masked, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    summaries = [audit(tmp_path / name, tmp_path / "dense") for name in ("masked", "packed", "unpacked")]
    assert [summary.form for summary in summaries] == ["masked", "packed", "masked"]
    assert {summary.targets for summary in summaries} == {3 * 6 if "opt" in family else 3 * 7}
    assert all(summary.compared and summary.sparsity[pattern] == {"2:4": 1 / 2, "3:8": 5 / 8}[pattern] for summary in summaries)
    assert summaries[1].bytes < summaries[0].bytes == summaries[2].bytes


@pytest.mark.parametrize("settings", [{"update": "sparsegpt"}, {"dtype": torch.bfloat16, "shard": "20KB"}], ids=["updated weights", "sharded"])
def test_other_checkpoints_pass_too(settings, write_masked, tmp_path):
    audit(write_masked(tmp_path, "llama", **settings), tmp_path / "dense")


def test_a_folded_checkpoint_passes_against_its_source(family, write_folded, tmp_path):
    folded = write_folded(tmp_path, family)
    assert audit(folded, tmp_path / "dense").form == "folded"
    write_packed(folded, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    assert [audit(tmp_path / name, tmp_path / "dense").form for name in ("packed", "unpacked")] == ["packed", "folded"]


def test_a_folded_tensor_in_another_order_is_noticed(write_folded, edit, tmp_path):
    folded = write_folded(tmp_path, "llama")
    edit(folded / "model.safetensors", lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].flip(0)}))
    with pytest.raises(AuditError, match=r"model\.norm\.weight differs from the source"):
        audit(folded, tmp_path / "dense")


def test_a_checkpoint_without_record_is_refused(write_masked, tmp_path):
    write_masked(tmp_path, "llama")
    with pytest.raises(ValueError, match="no record permllm/"):
        audit(tmp_path / "dense")


def change_tensors(change):
    return lambda folder, edit: edit(folder / "model.safetensors", change)


def fill_a_group(tensors):
    tensors[PROJECTION][7] = 1.0


def put(name, place, value):
    return change_tensors(lambda tensors: tensors[name].__setitem__(place, value))


def make_negative_zeros(tensors):
    tensors[PROJECTION][tensors[PROJECTION] == 0] = -0.0


def halve(tensors):
    tensors[PROJECTION] *= 0.5


DAMAGES = {
    "dense row": (
        change_tensors(fill_a_group),
        [rf"{PROJECTION} .*is not 2:4: row 7 group 0 holds 4", "pruned weights that are not", "another hash"],
    ),
    "negative zeros": (change_tensors(make_negative_zeros), [f"{PROJECTION} has pruned weights that are not \\+0.0"]),
    "scaled": (change_tensors(halve), [f"{PROJECTION} has another hash than recorded", f"{PROJECTION} has kept weights that differ"]),
    "nan": (put(PROJECTION, (0, 0), float("nan")), [rf"{PROJECTION} .*NaN or infinity at \(row, channel\)"]),
    "nan in a norm": (put("model.norm.weight", 3, float("nan")), ["model.norm.weight holds NaN", "model.norm.weight differs from the source"]),
    "embedding": (put("model.embed_tokens.weight", (3, 3), 9.0), ["model.embed_tokens.weight differs from the source"]),
    "configuration": (
        lambda folder, edit: edit(folder / "config.json", lambda config: config.update(sparsity_config={}, quantization_config={})),
        ["config.json has sparsity_config", "config.json has quantization_config"],
    ),
    "hashes": (
        lambda folder, edit: edit(folder / "permllm/hashes.json", lambda hashes: hashes.pop(PROJECTION)),
        [f"{PROJECTION} has no recorded hash"],
    ),
    "masks": (
        lambda folder, edit: edit(folder / "permllm/masks.safetensors", lambda masks: (masks.pop("0.mlp.up_proj"), masks["1.mlp.down_proj"].zero_())),
        ["layers.0.mlp.up_proj.weight has no recorded mask", f"{PROJECTION} has a recorded mask that is not 2:4"],
    ),
    "pattern": (
        lambda folder, edit: edit(folder / "permllm/manifest.json", lambda record: record.update(pattern="1:4")),
        ["layers.0.self_attn.q_proj.weight .*not 1:4", "layers.2.mlp.down_proj.weight .*not 1:4"],
    ),
    "origin": (
        lambda folder, edit: edit(folder / "permllm/manifest.json", lambda record: record.update(model_fingerprint="0")),
        ["pruned from another checkpoint"],
    ),
}


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_everything_that_is_wrong_is_named(damage, write_masked, edit, tmp_path):
    masked = write_masked(tmp_path, "llama", permutation="cp")
    change, messages = DAMAGES[damage]
    change(masked, edit)
    with pytest.raises(AuditError) as refused:
        audit(masked, tmp_path / "dense")
    for message in messages:
        assert re.search(message, str(refused.value)), str(refused.value)


def test_the_wrong_channel_order_is_noticed(write_masked, edit, tmp_path):
    masked = write_masked(tmp_path, "llama", permutation="random")
    edit(masked / "permllm/permutations.safetensors", lambda orders: orders.update({"1.mlp_out": torch.arange(48, dtype=torch.int32)}))
    with pytest.raises(AuditError, match=rf"{PROJECTION} .*is not 2:4: row \d+ group \d+ holds"):
        audit(masked)


def test_transposable_masks_are_audited_along_the_output_channels_too(write_masked, edit, tmp_path):
    masked = write_masked(tmp_path, "llama", transposable=True)
    write_packed(masked, tmp_path / "packed")
    audit(masked), audit(tmp_path / "packed")
    edit(masked / "permllm/permutations.safetensors", lambda orders: orders.update({"1.mlp.down_proj.rows": torch.arange(32).roll(1).int()}))
    with pytest.raises(AuditError, match=f"{PROJECTION} is not 2:4 along its output channels"):
        audit(masked)


def test_a_record_of_another_model_is_refused(write_masked, edit, tmp_path):
    masked = write_masked(tmp_path, "llama")
    edit(masked / "permllm/permutations.safetensors", lambda orders: orders.update({"1.mlp_out": torch.arange(32, dtype=torch.int32)}))
    with pytest.raises(ValueError, match=r"another model than LlamaForCausalLM: model\.layers\.1 mlp_out has 32 channels, not 48"):
        audit(masked)


def test_a_missing_and_an_added_tensor_of_the_source_are_named(write_masked, edit, tmp_path):
    masked = write_masked(tmp_path, "llama", tie_word_embeddings=True)
    edit(tmp_path / "dense" / "model.safetensors", lambda tensors: tensors.update({"extra": tensors.pop("model.norm.weight")}))
    with pytest.raises(AuditError, match=r"model\.norm\.weight is not in the source\n- extra of the source is missing\n- it was pruned from another"):
        audit(masked, tmp_path / "dense")


def test_a_damaged_packed_checkpoint_is_refused(write_masked, tmp_path):
    write_packed(write_masked(tmp_path, "llama"), tmp_path / "packed")
    path = tmp_path / "packed" / "packed.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(PackedFormatError, match="another SHA-256"):
        audit(tmp_path / "packed")


def test_a_folder_without_hashes_is_of_an_older_version_and_passes(write_masked, tmp_path):
    masked = write_masked(tmp_path, "llama")
    (masked / "permllm" / "hashes.json").unlink()
    shutil.rmtree(tmp_path / "pruning")
    audit(masked, tmp_path / "dense")
