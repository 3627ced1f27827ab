"""Tokens per second of whole models, dense against packed: the prompt in one pass, and decoding token by token."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from permllm.assembly.packed_format import MANIFEST
from permllm.assembly.packed_model import load
from permllm.benchmark.linears import device_name
from permllm.memory import peak_host_bytes
from permllm.models.families import adapter_of
from permllm.models.loading import ModelSource, load_model, resolve_device
from permllm.sparsity.mask import nm_mask
from permllm.sparsity.pattern import NMPattern

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedModel

DENSE, PACKED = "dense", "packed"


@dataclass(frozen=True)
class DecodingConfig:
    """What is generated: `new_tokens` after a prompt of `prompt_tokens`, `rounds` times by every model in turn."""

    prompt_tokens: int = 128
    new_tokens: int = 32
    rounds: int = 3


@torch.inference_mode()
def measure_decoding(models: Mapping[str, "PreTrainedModel"], name: str, pattern: str, config: DecodingConfig) -> list[dict[str, Any]]:
    """Measure prefill and decoding at batch 1, greedily.

    Args:
        models: `dense` (masked weights, so that all say the same) and `packed`, on the same device.
        name: of the model, for the rows.

    Returns:
        Rows `device, model, pattern, dtype, phase, tokens_per_s, dense_tokens_per_s, speedup, weight_bytes, dense_weight_bytes,
        same_text`: whether both generate the same tokens.
    """
    dense = models[DENSE]
    prompt = torch.randint(dense.config.vocab_size, (1, config.prompt_tokens), generator=torch.Generator().manual_seed(0)).to(dense.device)
    seconds: dict[str, dict[str, list[float]]] = {which: {"prefill": [], "decode": []} for which in models}
    texts: dict[str, Tensor] = {}
    for turn in range(config.rounds + 1):
        for which, model in models.items():
            prefill, _ = _seconds(lambda model=model: _generate(model, prompt, 1), dense.device)
            whole, texts[which] = _seconds(lambda model=model: _generate(model, prompt, config.new_tokens + 1), dense.device)
            if turn:  # the first turn warms up
                seconds[which]["prefill"].append(prefill)
                seconds[which]["decode"].append(whole - prefill)
    tokens = {"prefill": config.prompt_tokens, "decode": config.new_tokens}
    speeds = {which: {phase: tokens[phase] / median(times) for phase, times in of.items()} for which, of in seconds.items()}
    weights = {f"{prefix}weight_bytes": weight_bytes(models[which]) for prefix, which in (("", PACKED), ("dense_", DENSE))}
    return [
        {
            "device": device_name(dense.device), "model": name, "pattern": pattern, "dtype": str(dense.dtype).removeprefix("torch."), "phase": phase,
            "tokens_per_s": round(speeds[PACKED][phase], 2), "dense_tokens_per_s": round(speeds[DENSE][phase], 2),
            "speedup": round(speeds[PACKED][phase] / speeds[DENSE][phase], 4), **weights, "same_text": torch.equal(texts[PACKED], texts[DENSE]),
        }
        for phase in tokens
    ]  # fmt: skip


def weight_bytes(model: "PreTrainedModel") -> int:
    """Return the bytes of all parameters and buffers; of tied ones once."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


def peak_bytes(folder: Path, device: str, dtype: str) -> int:
    """Return the most memory that loading a checkpoint, masked or packed, and generating takes, in a process of its own."""
    command = [sys.executable, "-m", "permllm.benchmark.decoding", str(folder), device, dtype]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Load the checkpoint that the arguments name, generate, and print the peak."""
    folder, on, dtype = sys.argv[1:]
    device = resolve_device(on)
    model = load(folder, on) if (Path(folder) / MANIFEST).exists() else load_model(ModelSource(folder, dtype, on))
    with torch.inference_mode():
        _generate(model, torch.arange(64, device=device)[None], 4)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_host_bytes()
    print(json.dumps(peak))


def _generate(model: "PreTrainedModel", prompt: Tensor, tokens: int) -> Tensor:
    return model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, use_cache=True, pad_token_id=0)


def _seconds(run: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, result


def random_sparse_model(folder: Path, pattern: NMPattern, dtype: torch.dtype, layers: int = 12, hidden: int = 2048) -> str:
    """Write a LLaMA of random weights that are N:M as they lie, and return its name."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256, vocab_size=32000, max_position_embeddings=2048, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(dtype)
    adapter = adapter_of(model)
    for weight in (linear.weight for layer in adapter.layers(model) for linear in adapter.linears(layer).values()):
        weight.data.masked_fill_(~nm_mask(weight.data.float().abs(), pattern), 0.0)
    model.save_pretrained(folder)
    return f"random LLaMA, {layers} layers of width {hidden}"


if __name__ == "__main__":
    main()
