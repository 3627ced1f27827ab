"""A masked checkpoint on disk of any family: pruned with permutations, written with its record."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from permllm.assembly.checkpoint import write_masked_checkpoint
from permllm.calibration.capture import dense_statistics
from permllm.models.adapter import Heads
from permllm.models.checkpoint_files import CheckpointFiles
from permllm.models.families import adapter_of
from permllm.pruning.layerwise import model_weights, prune_in_parallel
from permllm.pruning.layout import find_permutations
from permllm.pruning.methods import PruningMethod
from permllm.pruning.storage import load_pruning, save_pruning
from permllm.sparsity.pattern import NMPattern


@pytest.fixture
def write_masked(tiny_model, tiny_tokenizer, draw_tokens) -> Callable[..., Path]:
    """`write_masked(folder, family, pattern="2:4", dtype=..., permutation="cp", shard="5GB", **config)`.

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
