"""Loading refuses every checkpoint that is not whole, and says what is wrong with it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from permllm.models.checkpoint_files import CheckpointFiles
from permllm.models.families import adapter_of
from permllm.models.loading import ModelSource, check_length, load_config, load_model, load_skeleton, load_tokenizer, resolve_device

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    return tiny_checkpoint(tmp_path, "llama")


@pytest.fixture
def sharded(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint(tmp_path, "llama", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def source(folder, **settings):
    return ModelSource(str(folder), **{"device": "cpu", **settings})


def edit_tensors(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def as_pickle(folder):
    """Turn a safetensors checkpoint into a `pytorch_model.bin`."""
    path = folder / "model.safetensors"
    torch.save(load_file(path), folder / "pytorch_model.bin")
    path.unlink()
    return folder / "pytorch_model.bin"


class Payload:
    """Unpickled without care, this writes a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.write_text, (self.target, "executed")


def test_a_loaded_model_has_the_checkpoints_weights_and_is_ready_for_inference(tiny_checkpoint, tiny_model, tmp_path, family):
    folder = tiny_checkpoint(tmp_path, family)
    edit_json(folder / "config.json", lambda config: config.update(use_cache=True))
    loaded = load_model(source(folder))
    expected = tiny_model(family).state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.config.use_cache is False


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_the_dtype_is_the_one_asked_for(checkpoint, name):
    assert {parameter.dtype for parameter in load_model(source(checkpoint, dtype=name)).parameters()} == {getattr(torch, name)}


def test_an_unknown_dtype_lists_the_known_ones(checkpoint):
    with pytest.raises(ValueError, match=r"unknown dtype 'float23': choose one of bfloat16, float16, float32; did you mean 'float32'\?"):
        source(checkpoint, dtype="float23")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "cpu cuda"])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(ValueError, match="unknown device"):
        resolve_device(name)


def test_a_missing_gpu_is_refused_and_never_replaced(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'cuda:1' is not on this machine, which has 0 CUDA devices"):
        resolve_device("cuda:1")
    assert resolve_device("auto") == torch.device("cpu")


def test_an_unknown_device_is_refused_before_the_weights_are_read(checkpoint, monkeypatch):
    def read(*_, **__):
        raise AssertionError("the weights were read first")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read)
    with pytest.raises(ValueError, match="unknown device"):
        load_model(source(checkpoint, device="gpu"))


@pytest.mark.parametrize("name", ["no/such/folder", "./missing", "/missing", "~/missing", "missing"])
def test_a_folder_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=rf"model '{name}' is not a directory"):
        ModelSource(name).folder()


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(ValueError, match="config.json cannot be read"):
        load_config(source(tmp_path))


def test_an_unknown_architecture_is_refused_before_the_weights_are_read(checkpoint):
    edit_json(checkpoint / "config.json", lambda config: config.update(architectures=["LlamaForSequenceClassification"]))
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"unknown architecture 'LlamaForSequenceClassification': choose one of LlamaForCausalLM"):
        load_model(source(checkpoint))


def test_the_skeleton_has_the_shapes_and_no_weights(checkpoint, llama):
    skeleton = load_skeleton(source(checkpoint))
    assert adapter_of(skeleton).widths(skeleton) == adapter_of(llama).widths(llama)
    assert all(parameter.is_meta for parameter in skeleton.parameters())


def test_missing_tensors_are_all_named(checkpoint):
    edit_tensors(checkpoint, lambda tensors: [tensors.pop(name) for name in (DOWN, "model.norm.weight")])
    with pytest.raises(ValueError, match=rf"{DOWN} is missing; model.norm.weight is missing"):
        load_model(source(checkpoint))


def test_a_tensor_of_another_shape_is_named_with_both_shapes(checkpoint):
    edit_tensors(checkpoint, lambda tensors: tensors.update({DOWN: torch.zeros(32, 40)}))
    with pytest.raises(ValueError, match=rf"{DOWN} has shape \(32, 40\), not \(32, 48\)"):
        load_model(source(checkpoint))


def test_a_tensor_that_the_configuration_has_no_place_for_is_named(checkpoint):
    edit_tensors(checkpoint, lambda tensors: tensors.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(32)}))
    with pytest.raises(ValueError, match=r"model.layers.1.self_attn.q_proj.bias"):
        load_model(source(checkpoint))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [DOWN, "model.layers.2.input_layernorm.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_a_weight_that_is_not_finite_is_named(checkpoint, name, broken):
    edit_tensors(checkpoint, lambda tensors: tensors[name].view(-1)[3:4].fill_(broken))
    with pytest.raises(ValueError, match=rf"NaN or infinity in {name.removesuffix('.weight')}"):
        load_model(source(checkpoint))


def test_a_folder_without_weights_says_which_files_are_needed(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no weights: model\.safetensors, pytorch_model\.bin"):
        load_model(source(checkpoint))


@pytest.mark.parametrize("size", [0, 4, 5000])
def test_damaged_safetensors_are_named(checkpoint, size):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_model(source(checkpoint))


def test_a_sharded_checkpoint_loads_like_a_single_file(sharded, llama):
    files = CheckpointFiles.find(sharded)
    assert sorted(files.names()) == sorted(llama.state_dict())
    assert all(torch.equal(tensor, llama.state_dict()[name]) for shard in files.shards for name, tensor in files.shard_tensors(shard))
    assert torch.equal(load_model(source(sharded)).get_parameter(DOWN), llama.get_parameter(DOWN))


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=rf"does not match its files: {shard.name} is not there; fetch the checkpoint again"):
        load_model(source(sharded))


def test_an_index_that_lies_is_refused_with_every_lie(sharded):
    shards = sorted(path.name for path in sharded.glob("*.safetensors"))

    def lie(index):
        index["weight_map"][DOWN] = next(name for name in shards if name != index["weight_map"][DOWN])
        index["weight_map"]["model.invented"] = shards[0]
        del index["weight_map"]["model.norm.weight"]

    edit_json(sharded / "model.safetensors.index.json", lie)
    with pytest.raises(ValueError, match="does not match its files") as error:
        load_model(source(sharded))
    for lie in (f"{DOWN} is not in", "model.invented is not in", "model.norm.weight in"):
        assert lie in str(error.value)


def test_tensors_in_two_shards_and_shards_that_are_gone_or_damaged_are_refused_together(sharded):
    shards = sorted(sharded.glob("*.safetensors"))
    weight_map = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    twice = next(name for name, shard in weight_map.items() if shard == shards[0].name)
    save_file({**load_file(shards[1]), twice: torch.zeros(2)}, shards[1], {"format": "pt"})
    shards[2].write_bytes(shards[2].read_bytes()[:-10])
    shards[3].unlink()
    with pytest.raises(ValueError, match="does not match its files") as error:
        CheckpointFiles.find(sharded)
    for lie in (
        f"{twice} is in {shards[1].name}, but the index names {shards[0].name}",
        f"{shards[2].name} is damaged",
        f"{shards[3].name} is not there",
    ):
        assert lie in str(error.value)


@pytest.mark.parametrize("text", ["not json", "{}"])
def test_an_index_that_cannot_be_read_is_named(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        load_model(source(sharded))


def test_the_files_that_are_listed_are_the_ones_that_are_loaded(sharded, llama):
    """With a single file beside an index, both must take the same one: the fingerprint is that of the model."""
    tensors = {name: tensor + 1 for name, tensor in llama.state_dict().items()}
    save_file(tensors, sharded / "model.safetensors", {"format": "pt"})
    files = CheckpointFiles.find(sharded)
    listed = {name: tensor for shard in files.shards for name, tensor in files.shard_tensors(shard)}
    assert torch.equal(listed[DOWN], load_model(source(sharded)).get_parameter(DOWN))


def test_a_pickled_checkpoint_loads_like_safetensors(checkpoint, llama):
    as_pickle(checkpoint)
    files = CheckpointFiles.find(checkpoint)
    assert list(files.shards) == ["pytorch_model.bin"] and sorted(files.names()) == sorted(llama.state_dict())
    assert all(torch.equal(tensor, llama.state_dict()[name]) for name, tensor in files.shard_tensors("pytorch_model.bin"))
    assert torch.equal(load_model(source(checkpoint)).get_parameter(DOWN), llama.get_parameter(DOWN))


def test_safetensors_are_preferred_to_pickles(checkpoint):
    (checkpoint / "pytorch_model.bin").write_bytes(b"")
    assert list(CheckpointFiles.find(checkpoint).shards) == ["model.safetensors"]


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_pickle_is_refused_without_being_executed(checkpoint, tmp_path, legacy):
    path, target = as_pickle(checkpoint), tmp_path / "target"
    torch.save({"model.norm.weight": Payload(target)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        load_model(source(checkpoint))
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.read_text() == "executed"  # the payload works where it is trusted


def test_a_damaged_pickle_is_named(checkpoint):
    path = as_pickle(checkpoint)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged"):
        load_model(source(checkpoint))


def test_a_pickle_of_the_old_format_can_be_read(checkpoint, llama):
    path = as_pickle(checkpoint)
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    assert torch.equal(dict(CheckpointFiles.find(checkpoint).shard_tensors(path.name))[DOWN], llama.get_parameter(DOWN))


def test_the_fingerprint_of_a_checkpoint_follows_its_weights_and_its_configuration(checkpoint):
    before = CheckpointFiles.find(checkpoint).fingerprint()
    assert CheckpointFiles.find(checkpoint).fingerprint() == before
    edit_tensors(checkpoint, lambda tensors: tensors[DOWN].view(-1)[:1].add_(1))
    changed = CheckpointFiles.find(checkpoint).fingerprint()
    edit_json(checkpoint / "config.json", lambda config: config.update(rms_norm_eps=1e-3))
    assert len({before, changed, CheckpointFiles.find(checkpoint).fingerprint()}) == 3


def test_a_tokenizer_reads_back_and_a_missing_one_is_named(checkpoint):
    tokenizer = load_tokenizer(source(checkpoint))
    assert tokenizer.decode(tokenizer("Hello, you!").input_ids) == "Hello, you!"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).unlink()
    with pytest.raises(ValueError, match="no tokenizer that can be read"):
        load_tokenizer(source(checkpoint))


@pytest.mark.parametrize("length", [0, 1, 65])
def test_sequences_longer_than_the_context_or_without_a_next_token_are_refused(llama, length):
    with pytest.raises(ValueError, match=rf"calibrate.length is {length} tokens, but sequences of this model hold 2 to 64; change calibrate.length"):
        check_length(length, llama.config, "calibrate.length")


def test_sequences_up_to_the_context_are_accepted(llama):
    check_length(64, llama.config, "calibrate.length")
    check_length(2, llama.config, "calibrate.length")


def edit_json(path, edit):
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))
