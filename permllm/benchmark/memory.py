"""A random LLaMA of any size, written shard by shard, so that what a stage holds in memory can be measured on it."""

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from permllm.artifacts import write_json
from permllm.models.checkpoint_files import SAFETENSORS_INDEX
from permllm.tensor_files import TensorSpec, write_tensors_in_turn

LAYERS_PER_SHARD = 4
WEIGHT_SCALE = 0.02  # of the published models at their start
TOKENIZER_FILES = "*token*"


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a LLaMA."""

    channels: int
    layers: int
    intermediate: int
    heads: int
    key_value_heads: int
    vocabulary: int = 32000

    def config(self) -> dict[str, object]:
        """Return its configuration, as config.json has it."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": self.channels,
            "num_hidden_layers": self.layers, "intermediate_size": self.intermediate, "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads, "vocab_size": self.vocabulary, "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        }  # fmt: skip

    def shards(self) -> list[dict[str, tuple[int, ...]]]:
        """Return the shapes of the tensors of every shard."""
        key_value = self.channels // self.heads * self.key_value_heads
        linears = {
            "self_attn.q_proj": (self.channels, self.channels), "self_attn.k_proj": (key_value, self.channels),
            "self_attn.v_proj": (key_value, self.channels), "self_attn.o_proj": (self.channels, self.channels),
            "mlp.gate_proj": (self.intermediate, self.channels), "mlp.up_proj": (self.intermediate, self.channels),
            "mlp.down_proj": (self.channels, self.intermediate), "input_layernorm": (self.channels,), "post_attention_layernorm": (self.channels,),
        }  # fmt: skip
        shards = [{"model.embed_tokens.weight": (self.vocabulary, self.channels)}]
        for first in range(0, self.layers, LAYERS_PER_SHARD):
            part = range(first, min(first + LAYERS_PER_SHARD, self.layers))
            shards.append({f"model.layers.{index}.{path}.weight": shape for index in part for path, shape in linears.items()})
        return [*shards, {"model.norm.weight": (self.channels,), "lm_head.weight": (self.vocabulary, self.channels)}]

    def parameters(self) -> int:
        """Return how many parameters it has."""
        return sum(torch.Size(shape).numel() for shard in self.shards() for shape in shard.values())


SHAPES = {
    "tiny": LlamaShape(32, 5, 48, 4, 2, 4096),
    "1.1b": LlamaShape(2048, 22, 5632, 32, 4),  # TinyLlama
    "7b": LlamaShape(4096, 32, 11008, 32, 32),
    "13b": LlamaShape(5120, 40, 13824, 40, 40),
    "70b": LlamaShape(8192, 80, 28672, 64, 8),
}


def write_random_llama(folder: Path, shape: LlamaShape, tokenizer: Path, seed: int = 0) -> None:
    """Write a checkpoint of random bfloat16 weights, a tensor in memory at a time.

    Args:
        tokenizer: a folder whose tokenizer it gets; of no larger vocabulary.
    """
    generator = torch.Generator().manual_seed(seed)

    def weight(name: str, size: tuple[int, ...]) -> Tensor:
        if len(size) == 1:
            return torch.ones(size, dtype=torch.bfloat16)
        return torch.empty(size, dtype=torch.bfloat16).normal_(0, WEIGHT_SCALE, generator=generator)

    folder.mkdir(parents=True, exist_ok=True)
    for path in tokenizer.glob(TOKENIZER_FILES):
        shutil.copyfile(path, folder / path.name)
    write_json(folder / "config.json", shape.config())
    weight_map, shards = {}, shape.shards()
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        specs = {tensor: TensorSpec(torch.bfloat16, size) for tensor, size in shard.items()}
        write_tensors_in_turn(folder / name, specs, lambda tensor, shard=shard: weight(tensor, shard[tensor]), {"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    write_json(folder / SAFETENSORS_INDEX, {"metadata": {"total_size": 2 * shape.parameters()}, "weight_map": weight_map})


def main(argv: list[str] | None = None) -> None:
    """Write a checkpoint."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--tokenizer", type=Path, default=Path("data/models/llama-5m"))
    chosen = parser.parse_args(argv)
    write_random_llama(chosen.folder, SHAPES[chosen.shape], chosen.tokenizer)


if __name__ == "__main__":
    main()
