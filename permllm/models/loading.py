"""Pretrained models and tokenizers, from the hub or from a local directory, checked before anything long begins."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers  # imports its parts when they are named; stages that need no model start three seconds sooner
from huggingface_hub import snapshot_download

from permllm.lookup import lookup
from permllm.models.adapter import ModelAdapter, check_finite
from permllm.models.checkpoint_files import CheckpointFiles
from permllm.models.families import adapter_for, adapter_of

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, and how it is held.

    Attributes:
        source: a local directory, or the name of a hub repository.
        dtype: of the weights in memory: `float32`, `float16` or `bfloat16`.
        device: `auto` (the first GPU, else the CPU), `cpu`, `cuda`, `cuda:1`, ...
        revision: of the hub repository: a branch, a tag or a commit.
        trust_remote_code: run model code that comes with the checkpoint.
    """

    source: str
    dtype: str = "float32"
    device: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        lookup(DTYPES, self.dtype, "dtype")

    def folder(self) -> Path:
        """Return the local directory; a hub repository is downloaded into the hub's cache first.

        Raises:
            ValueError: if it is neither a directory nor a repository that can be reached.
        """
        local = Path(self.source)
        if local.is_dir():
            return local
        if self.source.startswith((".", "/", "~")) or self.source.count("/") != 1:
            raise ValueError(f"model {self.source!r} is not a directory; give a local directory or a hub repository like facebook/opt-125m")
        try:
            folder = Path(snapshot_download(self.source, revision=self.revision, allow_patterns=[*SMALL_FILES, "*.safetensors"]))
            if not any(folder.glob("*.safetensors")):
                folder = Path(snapshot_download(self.source, revision=self.revision, allow_patterns=[*SMALL_FILES, "*.bin"]))
            return folder
        except Exception as error:  # the hub client raises a dozen classes for "not reachable" and "not there"
            raise ValueError(
                f"model {self.source!r} is neither a local directory nor a hub repository that can be downloaded ({error}); "
                "download it on a machine with network and give its directory"
            ) from error


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`.

    Raises:
        ValueError: if it does not exist on this machine; only `auto` chooses by itself.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}: choose auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not on this machine, which has {torch.cuda.device_count()} CUDA devices; choose auto or cpu")
    return device


def load_adapter(source: ModelSource) -> ModelAdapter:
    """Return the adapter of the architecture that a model's `config.json` names.

    Raises:
        ValueError: if there is no configuration, or the architecture is not supported.
    """
    path = source.folder() / "config.json"
    try:
        architectures = json.loads(path.read_text()).get("architectures")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); a model directory in the format of transformers is needed") from error
    return adapter_for((architectures or ["(none)"])[0])


def load_config(source: ModelSource) -> "transformers.PretrainedConfig":
    """Return a model's configuration, without its weights.

    Raises:
        ValueError: if the directory has no readable configuration or the architecture is not supported.
    """
    folder = source.folder()
    load_adapter(source)
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} has no model configuration that can be read ({error})") from error


def load_skeleton(source: ModelSource) -> "transformers.PreTrainedModel":
    """Return the model without its weights (on the meta device), to check settings against its shapes.

    Raises:
        ValueError: as `load_config`, or if the model has other linears than its family.
    """
    config = load_config(source)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)
    adapter_of(model)
    return model


def load_model(source: ModelSource) -> "transformers.PreTrainedModel":
    """Return the model for inference, without a cache, every weight from the checkpoint and finite.

    Raises:
        ValueError: if the architecture is not supported, a tensor is missing, has another shape than the
            configuration says, or holds NaN or infinity.
    """
    device = resolve_device(source.device)
    config = load_config(source)
    folder = source.folder()
    CheckpointFiles.find(folder)
    try:
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=DTYPES[source.dtype], local_files_only=True, trust_remote_code=source.trust_remote_code,
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    except OSError as error:
        raise ValueError(f"the weights in {folder} cannot be read ({error}); fetch the checkpoint again") from error
    problems = [f"{name} is missing" for name in sorted(loading["missing_keys"])]
    problems += [f"{name} has shape {tuple(found)}, not {tuple(needed)}" for name, found, needed in sorted(loading["mismatched_keys"])]
    problems += [f"{name} has no place in the model" for name in sorted(loading["unexpected_keys"])]
    if problems:
        raise ValueError(f"the checkpoint {folder} does not fit its configuration: {'; '.join(problems)}")
    model.config.use_cache = False
    adapter_of(model)
    check_finite(model)
    return model.requires_grad_(False).eval().to(device)


def compute_buffers(model: "transformers.PreTrainedModel", device: torch.device | str = "cpu") -> None:
    """Fill the buffers that no checkpoint holds, such as the frequencies of rotary embeddings, as the model itself does.

    Raises:
        ValueError: naming those that the model does not know how to compute.
    """
    stored, left = set(model.state_dict()), []
    for path, module in model.named_modules():
        names = [name for name, buffer in module.named_buffers(path, recurse=False) if buffer.is_meta and name not in stored]
        attributes = {name: name.rpartition(".")[2] for name in names}
        for attribute in attributes.values():
            setattr(module, attribute, torch.full_like(getattr(module, attribute), torch.nan, dtype=torch.float32, device="cpu"))
        if names:
            model._init_weights(module)
        left += [name for name, attribute in attributes.items() if getattr(module, attribute).isnan().any()]
        for attribute in attributes.values():
            setattr(module, attribute, getattr(module, attribute).to(device))
    if left:
        raise ValueError(f"no values for {', '.join(left)}: this version of permllm cannot compute them for a {type(model).__name__}")


def load_tokenizer(source: ModelSource) -> "transformers.PreTrainedTokenizerBase":
    """Return the model's tokenizer.

    Raises:
        ValueError: if the directory has none.
    """
    folder = source.folder()
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} has no tokenizer that can be read ({error})") from error


def context_length(config: "transformers.PretrainedConfig") -> int:
    """Return the most tokens that the model was made for."""
    return config.max_position_embeddings


def check_length(length: int, config: "transformers.PretrainedConfig", setting: str) -> None:
    """Refuse sequences longer than the model's context.

    Raises:
        ValueError: naming the setting.
    """
    if not 2 <= length <= context_length(config):
        raise ValueError(f"{setting} is {length} tokens, but sequences of this model hold 2 to {context_length(config)}; change {setting}")
