"""A packed checkpoint is smaller, unpacks bit for bit, and is refused when anything in it changed."""

import dataclasses

import pytest
import torch

from permllm.assembly.packed import unpack, write_packed
from permllm.assembly.packed_format import PackedCheckpoint, PackedFormatError, PackedManifest, describe_files, same_bits
from permllm.models.checkpoint_files import CheckpointFiles
from permllm.sparsity.pattern import NMPattern

PROJECTION = "model.layers.1.mlp.down_proj.weight"


def tensors_of(folder):
    files = CheckpointFiles.find(folder)
    return {shard: dict(files.shard_tensors(shard)) for shard in files.shards}


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_round_trip(checkpoint, folder, pattern=None):
    write_packed(checkpoint, folder / "packed", pattern)
    unpack(folder / "packed", folder / "unpacked")
    tensors, others = tensors_of(checkpoint), tensors_of(folder / "unpacked")
    assert tensors.keys() == others.keys()
    for shard, held in tensors.items():
        assert held.keys() == others[shard].keys()
        assert all(same_bits(tensor, others[shard][name]) for name, tensor in held.items())
    before, after = files_of(checkpoint), files_of(folder / "unpacked")
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} <= {"model.safetensors.index.json", "model.safetensors"}


@pytest.mark.parametrize("pattern", ["2:4", "3:8"])
def test_unpacking_gives_the_masked_checkpoint_back_bit_for_bit(family, pattern, write_masked, tmp_path):
    assert_round_trip(write_masked(tmp_path, family, pattern), tmp_path)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"dtype": torch.bfloat16}),
        ("opt", {"dtype": torch.float16, "tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("qwen2", {"shard": "20KB", "update": "sparsegpt"}),
        ("opt", {"shard": "20KB", "permutation": "random"}),
        ("llama", {"permutation": "identity"}),
    ],
    ids=["bfloat16", "float16, tied", "tied, biases", "sharded, updated weights", "sharded, random orders", "no permutations"],
)
def test_every_kind_of_checkpoint_comes_back(name, settings, write_masked, tmp_path):
    assert_round_trip(write_masked(tmp_path, name, **settings), tmp_path)


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_a_folded_checkpoint_comes_back(family, shard, write_folded, tmp_path):
    assert_round_trip(write_folded(tmp_path, family, shard=shard), tmp_path)
    assert PackedCheckpoint.open(tmp_path / "packed").orders == {}


def test_foldable_orders_leave_nothing_to_gather(family, write_masked, tmp_path):
    assert_round_trip(write_masked(tmp_path, family, layout="foldable"), tmp_path)
    assert gathers(tmp_path) == ({}, {}, {}) and PackedCheckpoint.open(tmp_path / "packed").orders


def test_a_checkpoint_without_record_needs_its_pattern(write_masked, tmp_path):
    masked = write_masked(tmp_path, "llama", permutation="identity")
    for path in (masked / "permllm").iterdir():
        path.unlink()
    (masked / "permllm").rmdir()
    with pytest.raises(ValueError, match=r"no record permllm/.*name the pattern"):
        write_packed(masked, tmp_path / "packed")
    assert_round_trip(masked, tmp_path, NMPattern.parse("2:4"))


def test_names_without_prefix_and_buffers_of_old_versions_come_back(write_masked, edit, tmp_path):
    masked = write_masked(tmp_path, "llama")
    (masked / "permllm" / "hashes.json").unlink()

    def rename(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(4.0)

    edit(masked / "model.safetensors", rename)
    assert_round_trip(masked, tmp_path)


def test_a_negative_zero_and_a_group_of_zeros_survive(write_masked, edit, tmp_path):
    masked = write_masked(tmp_path, "llama", permutation="identity")
    (masked / "permllm" / "hashes.json").unlink()

    def change(tensors):
        tensors[PROJECTION][0, :8] = 0.0
        tensors[PROJECTION][0, 0] = -0.0

    edit(masked / "model.safetensors", change)
    write_packed(masked, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    assert same_bits(*(tensors_of(folder)["model.safetensors"][PROJECTION] for folder in (masked, tmp_path / "unpacked")))


def test_packed_targets_take_the_bytes_of_their_values_and_a_bit_per_weight(write_masked, tmp_path):
    masked = write_masked(tmp_path, "llama", dtype=torch.bfloat16)
    write_packed(masked, tmp_path / "packed")
    packed = PackedCheckpoint.open(tmp_path / "packed")
    weights = {name: weight for name, weight in packed.stored("packed.safetensors") if packed.manifest.tensors[name].values}
    assert len(weights) == 3 * 7
    assert all(weight.nbytes == weight.shape[0] * weight.shape[1] * 2 * 0.5625 for weight in weights.values())


def test_only_what_cannot_be_folded_is_gathered(write_masked, tmp_path):
    write_packed(write_masked(tmp_path, "llama"), tmp_path / "packed")
    assert all({"attention_in", "mlp_in"} <= set(groups) <= {"attention_in", "attention_out", "mlp_in"} for groups in gathers(tmp_path))


def test_nothing_is_gathered_where_nothing_is_permuted(write_masked, tmp_path):
    write_packed(write_masked(tmp_path, "llama", permutation="identity"), tmp_path / "packed")
    assert gathers(tmp_path) == ({}, {}, {})


def gathers(folder):
    return PackedManifest.read(folder / "packed").gathers


def test_packing_twice_gives_equal_files(write_masked, tmp_path):
    masked = write_masked(tmp_path, "opt")
    for name in ("first", "second"):
        write_packed(masked, tmp_path / name)
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second")


# --- what is refused, and what is left behind ---


def test_weights_that_violate_the_pattern_are_all_named_and_nothing_is_left(write_masked, edit, tmp_path):
    masked = write_masked(tmp_path, "llama", permutation="identity", shard="20KB")

    def change(tensors):
        for name in {PROJECTION, "model.layers.2.self_attn.q_proj.weight"} & tensors.keys():
            tensors[name][5, 8:12] = 1.0

    for path in masked.glob("*.safetensors"):
        edit(path, change)
    with pytest.raises(ValueError, match=r"row 5 group 2 holds 4") as refused:
        write_packed(masked, tmp_path / "packed")
    assert f"{PROJECTION}: the weight is not 2:4" in str(refused.value) and "model.layers.2.self_attn.q_proj.weight: " in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "masked", "pruning"]


def test_another_pattern_than_claimed_is_refused(write_masked, edit, tmp_path):
    masked = write_masked(tmp_path, "llama", "4:8")
    edit(masked / "permllm" / "manifest.json", lambda record: record.update(pattern="2:4"))
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj\.weight: the weight is not 2:4"):
        write_packed(masked, tmp_path / "packed")
    with pytest.raises(ValueError, match="recorded as 2:4, not 4:8"):
        write_packed(masked, tmp_path / "packed", NMPattern.parse("4:8"))


@pytest.mark.parametrize("entry", ["sparsity_config", "quantization_config"])
def test_a_configuration_that_stops_other_loaders_is_refused(entry, write_masked, edit, tmp_path):
    masked = write_masked(tmp_path, "llama")
    edit(masked / "config.json", lambda config: config.update({entry: {"quant_method": "compressed-tensors"}}))
    with pytest.raises(ValueError, match=entry):
        write_packed(masked, tmp_path / "packed")


def test_tied_tensors_that_differ_are_refused(write_masked, edit, tmp_path):
    masked = write_masked(tmp_path, "llama", tie_word_embeddings=True)
    edit(masked / "model.safetensors", lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ValueError, match=r"ties lm_head\.weight and model\.embed_tokens\.weight"):
        write_packed(masked, tmp_path / "packed")


def test_tensors_without_a_place_and_missing_ones_are_named(write_masked, edit, tmp_path):
    masked = write_masked(tmp_path, "llama")
    edit(masked / "model.safetensors", lambda tensors: tensors.update({"extra": tensors.pop(PROJECTION)}))
    with pytest.raises(ValueError, match=rf"extra has no place in the model; {PROJECTION} is missing"):
        write_packed(masked, tmp_path / "packed")


@pytest.mark.parametrize("command", [write_packed, unpack])
def test_a_folder_with_something_in_it_is_not_touched(command, write_masked, tmp_path):
    masked = write_masked(tmp_path, "llama")
    write_packed(masked, tmp_path / "packed")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="full exists and is not an empty folder"):
        command(masked if command is write_packed else tmp_path / "packed", tmp_path / "full")
    assert files_of(tmp_path / "full") == {"thesis.tex": b"mine"}


@pytest.fixture
def packed(write_masked, tmp_path):
    """A packed LLaMA in two shards or more."""
    write_packed(write_masked(tmp_path, "llama", shard="40KB"), tmp_path / "packed")
    return tmp_path / "packed"


def refresh(folder, **changes):
    """Write the manifest anew, so that its hashes are those of the files."""
    manifest = PackedManifest.read(folder)
    (folder / "packed.json").unlink()
    dataclasses.replace(manifest, files=describe_files(folder), **changes).write(folder)


def truncate(folder):
    path = sorted(folder.glob("packed-*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


DAMAGES = {
    "truncated": (truncate, r"packed-00001-of-\d+.safetensors has \d+ bytes, not \d+"),
    "flipped": (lambda folder: flip(sorted(folder.glob("packed-*"))[1]), r"packed-00002-of-\d+.safetensors has another SHA-256"),
    "configuration": (lambda folder: (folder / "config.json").write_text("{}"), "config.json has 2 bytes"),
    "missing": (lambda folder: (folder / "packed.orders.safetensors").unlink(), "packed.orders.safetensors is missing"),
    "manifest": (lambda folder: flip(folder / "packed.json"), "packed.json is damaged"),
    "no manifest": (lambda folder: (folder / "packed.json").unlink(), "is not a packed checkpoint.*AutoModelForCausalLM"),
}


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_a_damaged_folder_is_refused_and_not_unpacked(damage, packed, tmp_path):
    change, message = DAMAGES[damage]
    change(packed)
    with pytest.raises(PackedFormatError, match=message):
        unpack(packed, tmp_path / "unpacked")
    assert not (tmp_path / "unpacked").exists() and not list(tmp_path.glob(".*"))


def test_all_damaged_files_are_named_at_once(packed):
    truncate(packed)
    (packed / "config.json").unlink()
    with pytest.raises(PackedFormatError, match=r"config\.json is missing.*packed-00001"):
        PackedCheckpoint.open(packed)


def test_a_newer_format_is_refused(packed, edit):
    edit(packed / "packed.json", lambda record: record.update(format=2))
    with pytest.raises(PackedFormatError, match="of format 2, but this version of permllm reads packed checkpoints of format 1"):
        PackedCheckpoint.open(packed)


def test_missing_unexpected_and_misshapen_tensors_are_named(packed, edit):
    shard = next(path for path in packed.glob("packed-*") if PROJECTION.replace("weight", "bits").encode() in path.read_bytes())

    def change(tensors):
        tensors["extra"] = tensors.pop(PROJECTION.replace("weight", "bits"))
        tensors[PROJECTION.replace("weight", "values")] = torch.zeros(3)

    edit(shard, change)
    refresh(packed)
    with pytest.raises(
        PackedFormatError,
        match=r"down_proj\.bits is not in .*extra in .* is unexpected.*down_proj\.values .* is float32 \(3,\), not float32 \(32, 24\)",
    ):
        PackedCheckpoint.open(packed)


def test_a_manifest_that_leads_out_of_its_folder_is_refused(packed, tmp_path):
    manifest = PackedManifest.read(packed)
    dataclasses.replace(manifest, files={**manifest.files, "../pruning/manifest.json": {"bytes": 1, "sha256": ""}}).write(packed)
    with pytest.raises(PackedFormatError, match="lies outside of the folder"):
        unpack(packed, tmp_path / "unpacked")


def test_unpacking_proves_the_recorded_hashes(packed, edit, tmp_path):
    edit(packed / "permllm" / "hashes.json", lambda hashes: hashes.update({PROJECTION: "0" * 16}))
    refresh(packed)
    with pytest.raises(RuntimeError, match=rf"does not hold the tensors whose hashes its record has: {PROJECTION}"):
        unpack(packed, tmp_path / "unpacked")
