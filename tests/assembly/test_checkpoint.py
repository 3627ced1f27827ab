"""The masked checkpoint holds what pruning decided, and nothing else changed."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from permllm.artifacts import StaleArtifactError
from permllm.assembly import checkpoint as assembly
from permllm.assembly.checkpoint import VerificationError, write_masked_checkpoint
from permllm.calibration.capture import dense_statistics
from permllm.models.checkpoint_files import CheckpointFiles
from permllm.models.families import adapter_of
from permllm.models.streaming import LoadedModel
from permllm.pruning.layerwise import apply_layer, model_weights, prune_in_parallel
from permllm.pruning.methods import PruningMethod
from permllm.pruning.storage import load_pruning, save_pruning
from permllm.sparsity.bits import unpack_mask
from permllm.sparsity.pattern import NMPattern


@pytest.fixture(params=["whole", "sharded", "pickle"])
def pruned(request, family, tiny_checkpoint, draw_tokens, tmp_path):
    """A checkpoint of every family and layout, its model pruned in memory, and the pruning on disk."""
    source = tiny_checkpoint(tmp_path / "dense", family, **({"max_shard_size": "20KB"} if request.param == "sharded" else {}))
    if request.param == "pickle":
        torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
        (source / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(source)
    adapter, pattern = adapter_of(model), NMPattern.parse("2:4")
    statistics = list(dense_statistics(LoadedModel(model, adapter), draw_tokens(4, 16), 2))
    layers = list(prune_in_parallel(model_weights(model, adapter), adapter, statistics, pattern, PruningMethod("wanda", "cp")))
    for layer, decided in zip(adapter.layers(model), layers, strict=True):
        apply_layer(layer, decided)
    record = {"model_fingerprint": CheckpointFiles.find(source).fingerprint(), "pattern": "2:4", "seed": 0}
    (tmp_path / "pruning").mkdir()
    save_pruning(tmp_path / "pruning", layers, record)
    return source, model, adapter, load_pruning(tmp_path / "pruning")


def test_stock_transformers_loads_exactly_the_pruned_model(pruned, tmp_path):
    source, model, adapter, pruning = pruned
    figures = write_masked_checkpoint(source, adapter, pruning, tmp_path / "masked")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "masked").state_dict()
    assert all(torch.equal(tensor, reloaded[name]) for name, tensor in model.state_dict().items())
    targets = [model.get_submodule(path).weight for path in adapter.paths(3)]
    assert figures["zeros"] == sum(int((weight == 0).sum()) for weight in targets)


def test_the_masks_beside_the_checkpoint_are_those_of_its_weights(pruned, tmp_path):
    source, model, adapter, pruning = pruned
    write_masked_checkpoint(source, adapter, pruning, tmp_path / "masked")
    masks = load_file(tmp_path / "masked" / "permllm" / "masks.safetensors")
    for index, layer in enumerate(adapter.layers(model)):
        for path, linear in adapter.linears(layer).items():
            assert torch.equal(unpack_mask(masks[f"{index}.{path}"], linear.in_features), linear.weight != 0)


def test_a_pruning_of_another_model_is_refused(pruned, tmp_path):
    source, _, adapter, pruning = pruned
    pruning.manifest["model_fingerprint"] = "0" * 16
    with pytest.raises(StaleArtifactError, match="made from another model"):
        write_masked_checkpoint(source, adapter, pruning, tmp_path / "masked")


def test_a_target_that_the_checkpoint_lacks_is_named(pruned, tmp_path):
    source, _, adapter, pruning = pruned
    pruning.manifest["groups"].append(pruning.manifest["groups"][0])
    with pytest.raises(ValueError, match=r"lacks .*layers\.3\."):
        write_masked_checkpoint(source, adapter, pruning, tmp_path / "masked")


def test_verification_notices_what_was_not_written(pruned, tmp_path, monkeypatch):
    source, _, adapter, pruning = pruned
    monkeypatch.setattr(assembly.PrunedLinear, "apply", lambda self, weight: -weight.abs() * self.mask)  # -0.0, and changed weights
    with pytest.raises(VerificationError, match=r"not \+0\.0.*kept weights that changed"):
        write_masked_checkpoint(source, adapter, pruning, tmp_path / "masked")
