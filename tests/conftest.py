"""Shared by all tests: one tiny random model per family, tiny checkpoints with a tokenizer, and where real data lies."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # for tests/kernels; read when triton is imported, which transformers does

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from permllm.calibration.samples import CalibrateConfig, tokenize
from permllm.calibration.texts import TextSource, read_documents
from permllm.models.adapter import ModelAdapter
from permllm.models.families import adapter_of
from permllm.models.loading import ModelSource, load_model, load_tokenizer
from permllm.subject import Subject

torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parents[1]
VOCABULARY = ["<unk>", "<eos>", *(chr(code) for code in range(32, 127))]  # 97 entries: printable ASCII, a character each

SHARED = {"vocab_size": len(VOCABULARY), "hidden_size": 32, "max_position_embeddings": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
SHARED |= {"bos_token_id": 1, "eos_token_id": 1}
GATED = {**SHARED, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False}
FEED_FORWARD = {**SHARED, "ffn_dim": 48, "dropout": 0.0, "pad_token_id": 0}

FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, GATED),
    "mistral": (MistralForCausalLM, MistralConfig, {**GATED, "sliding_window": 8}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, GATED),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, GATED),
    "opt": (OPTForCausalLM, OPTConfig, {**FEED_FORWARD, "word_embed_proj_dim": 32}),
    "opt_post_norm": (OPTForCausalLM, OPTConfig, {**FEED_FORWARD, "word_embed_proj_dim": 24, "do_layer_norm_before": False}),
}


def build(family: str, seed: int = 0, **settings: object) -> PreTrainedModel:
    """Build a model whose every parameter, biases and norms included, differs from its default."""
    architecture, config, defaults = FAMILIES[family]
    model = architecture(config(**{**defaults, **settings}, architectures=[architecture.__name__], use_cache=False))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm_weight = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if is_norm_weight else 0.2 * noise)
    return model.requires_grad_(False).eval()


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Each row of the family table, by name."""
    return request.param


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """`tiny_model(family, seed=0, **config)`: a fresh random model for inference."""
    return build


@pytest.fixture
def model(family: str) -> PreTrainedModel:
    """A tiny model of every family in turn."""
    return build(family)


@pytest.fixture
def adapter(model: PreTrainedModel) -> ModelAdapter:
    """The adapter of `model`."""
    return adapter_of(model)


@pytest.fixture
def llama() -> PreTrainedModel:
    """A tiny LLaMA, where the family does not matter."""
    return build("llama")


@pytest.fixture(scope="session")
def draw_tokens() -> Callable[..., Tensor]:
    """`draw_tokens(sequences, length, seed=0)`: (sequences, length) random token numbers."""

    def draw(sequences: int, length: int, seed: int = 0) -> Tensor:
        return torch.randint(len(VOCABULARY), (sequences, length), generator=torch.Generator().manual_seed(seed))

    return draw


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of printable ASCII, one token a character."""
    tokenizer = Tokenizer(WordLevel({token: number for number, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


@pytest.fixture
def tiny_checkpoint(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """`tiny_checkpoint(folder, family, **save_pretrained options)`: a model and its tokenizer in a directory."""

    def save(folder: Path, family: str, **options: object) -> Path:
        checkpoint = folder / family
        build(family).save_pretrained(checkpoint, **options)
        tiny_tokenizer.save_pretrained(checkpoint)
        return checkpoint

    return save


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the working tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def third_party() -> Path:
    """Checkpoints and texts by others, which are not part of the project."""
    folder = Path(os.environ.get("PERMLLM_THIRD_PARTY", REPOSITORY.parent / "shared" / "data" / "third_party"))
    if not folder.is_dir():
        pytest.skip(f"no third-party data at {folder}; set PERMLLM_THIRD_PARTY to the folder that holds it")
    return folder


@pytest.fixture
def third_party_subject(third_party: Path) -> Callable[[str], Subject]:
    """`third_party_subject(name)`: a checkpoint by others, calibrated on the first half of the stories and judged on the second."""

    def make(name: str) -> Subject:
        source, length = ModelSource(str(third_party / "models" / name), device="cpu"), 128
        text = TextSource(files=str(third_party / "text/tinystories_sample/stories_clean.jsonl"))
        stories, tokenizer = list(read_documents(text).values()), load_tokenizer(source)
        calibration, judged = (tokenize(part, tokenizer) for part in (stories[: len(stories) // 2], stories[len(stories) // 2 :]))
        config = CalibrateConfig(text, sequences=192, length=length, held_out=12, batch_size=16)
        return Subject.calibrated(load_model(source), calibration, config, 0, judged[: 200 * length], length)

    return make


@pytest.fixture(scope="session")
def shipped_model() -> Path:
    """The checkpoint that the default run prunes."""
    folder = REPOSITORY / "data" / "models" / "llama-5m"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"no checkpoint at {folder}; fetch it with `git lfs pull` or `dvc pull`")
    return folder
