"""Pruned checkpoints on disk of any family: masked with their record, and the same folded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from permllm.artifacts import fingerprint
from permllm.assembly.checkpoint import write_masked_checkpoint
from permllm.assembly.folded import write_folded_checkpoint
from permllm.calibration.capture import dense_statistics
from permllm.calibration.samples import draw_windows, tokenize
from permllm.calibration.texts import TextSource, read_documents
from permllm.models.adapter import Heads
from permllm.models.checkpoint_files import CheckpointFiles
from permllm.models.families import adapter_of
from permllm.models.loading import ModelSource, context_length, load_config, load_tokenizer
from permllm.models.streaming import LoadedModel
from permllm.pruning.layerwise import model_weights, prune_in_parallel
from permllm.pruning.layout import find_permutations
from permllm.pruning.methods import PruningMethod
from permllm.pruning.storage import load_pruning, save_pruning
from permllm.sparsity.pattern import NMPattern


def prune_checkpoint(folder: Path, tokens: Tensor, pattern: str, method: PruningMethod) -> Path:
    """Prune `folder / "dense"` into `folder / "masked"`, calibrated on (sequences, length) tokens."""
    dense, pruning, masked = folder / "dense", folder / "pruning", folder / "masked"
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    adapter = adapter_of(model)
    statistics = list(dense_statistics(LoadedModel(model, adapter), tokens, 2))
    weights, generator, parsed = list(model_weights(model, adapter)), torch.Generator().manual_seed(0), NMPattern.parse(pattern)
    arguments = weights, adapter, Heads.of(model.config), statistics, parsed, generator
    orders = find_permutations(method.layout, method.permutation, method.score, *arguments)
    layers = prune_in_parallel(weights, adapter, statistics, parsed, method, orders)
    pruning.mkdir()
    fingerprint = CheckpointFiles.find(dense).fingerprint()
    save_pruning(pruning, layers, {"model_fingerprint": fingerprint, "pattern": pattern, "method_settings": vars(method), "seed": 0})
    write_masked_checkpoint(dense, adapter, load_pruning(pruning), masked)
    return masked


@pytest.fixture
def write_masked(tiny_model, tiny_tokenizer, draw_tokens) -> Callable[..., Path]:
    """`write_masked(folder, family, pattern="2:4", dtype, permutation="cp", update=None, shard="5GB", layout="free",
    transposable=False, **config)`.

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
        transposable: bool = False,
        **config,
    ) -> Path:
        tiny_model(family, **config).to(dtype).save_pretrained(folder / "dense", max_shard_size=shard)
        tiny_tokenizer.save_pretrained(folder / "dense")
        return prune_checkpoint(
            folder, draw_tokens(4, 16), pattern, PruningMethod("wanda", permutation, update, layout=layout, transposable=transposable)
        )

    return write


@pytest.fixture
def prune_real(third_party) -> Callable[..., Path]:
    """`prune_real(folder, name)`: a checkpoint by others, masked 2:4 with permutations; the dense one is `folder / "dense"`."""

    def write(folder: Path, name: str) -> Path:
        shutil.copytree(third_party / "models" / name, folder / "dense")
        source = ModelSource(str(folder / "dense"), device="cpu")
        stories = read_documents(TextSource(files=str(third_party / "text/tinystories_sample/stories_clean.jsonl")))
        tokens = tokenize(list(stories.values())[:40], load_tokenizer(source))
        samples = draw_windows(tokens, 16, min(64, context_length(load_config(source))), seed=0)
        return prune_checkpoint(folder, samples.tokens, "2:4", PruningMethod("wanda", "cp"))

    return write


@pytest.fixture
def write_folded(write_masked) -> Callable[..., Path]:
    """`write_folded(folder, family, **options)`: what `write_masked` writes under the foldable layout, folded."""

    def write(folder: Path, family: str, **options) -> Path:
        write_folded_checkpoint(write_masked(folder, family, layout="foldable", **options), folder / "folded")
        return folder / "folded"

    return write


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    """Change a JSON file in place; a manifest lies then, but is not damaged."""
    record = json.loads(path.read_text())
    change(record)
    if "checksum" in record:
        record["checksum"] = fingerprint([{name: value for name, value in record.items() if name != "checksum"}])
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
