"""Pruned checkpoints on disk of any family: masked with their record, and the same folded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from permllm.assembly.checkpoint import write_masked_checkpoint
from permllm.assembly.folding import fold, fold_model
from permllm.calibration.capture import dense_statistics
from permllm.models.adapter import Heads
from permllm.models.checkpoint_files import CheckpointFiles
from permllm.models.families import adapter_of
from permllm.permutation.permutation import Permutation
from permllm.pruning.layerwise import model_weights, prune_in_parallel
from permllm.pruning.layout import find_permutations
from permllm.pruning.methods import PruningMethod
from permllm.pruning.storage import load_pruning, save_pruning
from permllm.sparsity.bits import pack_mask
from permllm.sparsity.pattern import NMPattern


@pytest.fixture
def write_masked(tiny_model, tiny_tokenizer, draw_tokens) -> Callable[..., Path]:
    """`write_masked(folder, family, pattern="2:4", dtype, permutation="cp", update=None, shard="5GB", **config)`.

    Returns the masked checkpoint's folder; the dense one lies in `folder / "dense"`.
    """

    def write(
        folder: Path,
        family: str,
        pattern: str = "2:4",
        dtype=torch.float32,
        permutation: str = "cp",
        update=None,
        shard: str = "5GB",
        layout: str = "free",
        **config,
    ) -> Path:
        dense, pruning, masked = folder / "dense", folder / "pruning", folder / "masked"
        tiny_model(family, **config).to(dtype).save_pretrained(dense, max_shard_size=shard)
        tiny_tokenizer.save_pretrained(dense)
        model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
        adapter, method = adapter_of(model), PruningMethod("wanda", permutation, update)
        statistics = list(dense_statistics(model, adapter, draw_tokens(4, 16), 2))
        weights, generator, parsed = list(model_weights(model, adapter)), torch.Generator().manual_seed(0), NMPattern.parse(pattern)
        orders = find_permutations(layout, permutation, "wanda", weights, adapter, Heads.of(model.config), statistics, parsed, generator)
        layers = prune_in_parallel(weights, adapter, statistics, parsed, method, orders)
        pruning.mkdir()
        fingerprint = CheckpointFiles.find(dense).fingerprint()
        save_pruning(pruning, layers, {"model_fingerprint": fingerprint, "pattern": pattern, "method_settings": vars(method), "seed": 0})
        write_masked_checkpoint(dense, adapter, load_pruning(pruning), masked)
        return masked

    return write


@pytest.fixture
def write_folded(write_masked) -> Callable[..., Path]:
    """`write_folded(folder)`: a LLaMA pruned without permutations, then stored in random foldable orders. N:M as it lies."""

    def write(folder: Path) -> Path:
        masked, folded = write_masked(folder, "llama", permutation="identity"), folder / "folded"
        model = AutoModelForCausalLM.from_pretrained(masked)
        adapter, generator = adapter_of(model), torch.Generator().manual_seed(0)
        # Whole groups of four move, so that the weights are 2:4 before and after.
        groups = Permutation.random(48 // 4, generator).order[:, None] * 4 + torch.arange(4)
        layers = [
            {name: Permutation.identity(32) for name in ("attention_in", "attention_out", "mlp_in")} | {"mlp_out": Permutation(groups.flatten())}
            for _ in adapter.layers(model)
        ]
        folding = fold(adapter, Heads.of(model.config), layers, [name for name, _ in model.named_parameters()])
        fold_model(model, folding)
        model.save_pretrained(folded)
        shutil.copytree(masked / "permllm", folded / "permllm")
        (folded / "permllm" / "hashes.json").unlink()
        paths = {
            f"{index}.{path}": linear.weight for index, layer in enumerate(adapter.layers(model)) for path, linear in adapter.linears(layer).items()
        }
        save_file({path: pack_mask(weight != 0) for path, weight in paths.items()}, folded / "permllm" / "masks.safetensors")
        orders = {f"{index}.{name}": order.order.int() for index, layer in enumerate(layers) for name, order in layer.items()}
        save_file(orders, folded / "permllm" / "permutations.safetensors")
        edit_json(folded / "permllm" / "manifest.json", lambda record: record.update(form="folded"))
        return folded

    return write


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    """Change a JSON file in place."""
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


@pytest.fixture
def edit() -> Callable[..., None]:
    """`edit(path, change)`: let `change` edit the record of a JSON file, or the tensors of a safetensors file."""

    def edit_file(path: Path, change: Callable[[dict], object]) -> None:
        if path.suffix == ".json":
            return edit_json(path, change)
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        return save_file(tensors, path, {"format": "pt"})

    return edit_file
