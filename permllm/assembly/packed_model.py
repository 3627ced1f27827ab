"""Load a packed checkpoint as a model of transformers that computes with the packed weights."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from torch import Tensor, nn

from permllm.assembly.packed_format import PackedCheckpoint, PackedFormatError
from permllm.kernels.gathering_norm import GatheringNorm
from permllm.kernels.packed_linear import PackedLinear
from permllm.lookup import lookup
from permllm.models.adapter import ModelAdapter
from permllm.models.families import adapter_of
from permllm.models.loading import DTYPES, ModelSource, compute_buffers, load_skeleton, resolve_device
from permllm.models.parameter_names import parameters_filled
from permllm.permutation.permutation import Permutation
from permllm.sparsity.packed import PackedWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GENERATION_CONFIG = "generation_config.json"


def load(path: str | Path, device: str = "cpu", dtype: torch.dtype | str | None = None) -> "PreTrainedModel":
    """Load a packed checkpoint for inference, with the interface of a stock model: call it, or `generate`.

    Args:
        path: the folder that `permllm pack` wrote.
        device: `auto` (the first GPU, else the CPU), `cpu`, `cuda`, `cuda:1`, ...
        dtype: of weights and activations; None for the type that the configuration names.

    Raises:
        ValueError: if the folder is no packed checkpoint, it is damaged, or does not fit its configuration.

    Example:
        >>> model = load("packed")  # doctest: +SKIP
        >>> model.generate(tokens, max_new_tokens=20)  # doctest: +SKIP
    """
    folder, target_device = Path(path), resolve_device(device)
    packed = PackedCheckpoint.open(folder)
    model = load_skeleton(ModelSource(str(folder)))
    adapter = adapter_of(model)
    _check(packed, model, adapter)
    chosen = _choose_dtype(packed, model, dtype)
    gathers = _gathers_of_linears(packed, model, adapter)
    for file in packed.weight_files:
        for name, tensor in packed.stored(file):
            parameter = packed.manifest.tensors[name].parameter
            if isinstance(tensor, PackedWeight):
                linear = parameter.removesuffix(".weight")
                weight = PackedWeight(tensor.values.to(chosen), tensor.bits, tensor.pattern, tensor.in_channels)
                _replace_linear(model, linear, weight, gathers.get(linear))
            elif parameter is not None:
                _assign(model, parameter, tensor.to(chosen) if tensor.is_floating_point() else tensor)
    model.tie_weights()
    _wrap_norms(packed, model, adapter)
    compute_buffers(model)
    _check_complete(model)
    if (folder / GENERATION_CONFIG).is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    model.config.dtype = chosen
    model.save_pretrained = _refuse_to_save
    return model.requires_grad_(False).eval().to(target_device)


def _refuse_to_save(*_: object, **__: object) -> None:
    """Stand in for `save_pretrained`, which would write parts of packed weights under a configuration that does not know them."""
    raise ValueError("a packed model is not saved as a stock checkpoint; copy its folder, or give the checkpoint back with `permllm unpack`")


def _check(packed: PackedCheckpoint, model: "PreTrainedModel", adapter: ModelAdapter) -> None:
    """Refuse a packed checkpoint that does not fit the model of its configuration, with all that is wrong."""
    manifest, layers = packed.manifest, adapter.layers(model)
    if manifest.architecture != type(model).__name__:
        raise PackedFormatError(f"{packed.folder} holds a {manifest.architecture}, but its config.json names {type(model).__name__}")
    parameters_filled(model, manifest.tensors)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {stored.parameter: stored for stored in manifest.tensors.values() if stored.parameter is not None}
    problems = [f"{name} has shape {stored.shape}, not {shapes.get(name)}" for name, stored in found.items() if stored.shape != shapes.get(name)]
    targets = {f"{path}.weight" for path in adapter.paths(len(layers))}
    are_packed = {name for name, stored in found.items() if stored.values is not None}
    problems += [f"{name} should be packed" for name in sorted(targets - are_packed)]
    problems += [f"{name} should not be packed" for name in sorted(are_packed - targets)]
    if len(manifest.gathers) != len(layers):
        problems.append(f"it has gathers for {len(manifest.gathers)} decoder layers, not {len(layers)}")
    if problems:
        raise PackedFormatError(f"{packed.folder} does not fit its config.json: {'; '.join(problems)}; pack the checkpoint again")


def _choose_dtype(packed: PackedCheckpoint, model: "PreTrainedModel", dtype: torch.dtype | str | None) -> torch.dtype:
    """Return the type that was asked for, or that of the configuration, or that of the packed weights."""
    if isinstance(dtype, str):
        return lookup(DTYPES, dtype, "dtype")
    stored = next(stored.dtype for stored in packed.manifest.tensors.values() if stored.values is not None)
    return dtype or model.config.dtype or getattr(torch, stored)


def _gathers_of_linears(packed: PackedCheckpoint, model: "PreTrainedModel", adapter: ModelAdapter) -> dict[str, Permutation]:
    """Return the orders that linears have to gather themselves, by their full path."""
    return {
        adapter.path(index, path): packed.orders[order]
        for index, (layer, gathers) in enumerate(zip(adapter.layers(model), packed.manifest.gathers, strict=True))
        for group, order in gathers.items()
        if adapter.gathering_norm(layer, group) is None
        for path in adapter.linear_groups[group].readers
    }


def _replace_linear(model: nn.Module, path: str, weight: PackedWeight, permutation: Permutation | None) -> None:
    """Put a packed linear in the place of a stock one. A bias that is loaded before or after stays."""
    packed = PackedLinear(weight, permutation=permutation)
    packed.bias = model.get_submodule(path).bias
    model.set_submodule(path, packed)


def _assign(model: nn.Module, parameter: str, tensor: Tensor) -> None:
    module, _, name = parameter.rpartition(".")
    owner = model.get_submodule(module)
    setattr(owner, name, nn.Parameter(tensor, requires_grad=False) if name in owner._parameters else tensor)


def _wrap_norms(packed: PackedCheckpoint, model: "PreTrainedModel", adapter: ModelAdapter) -> None:
    for layer, gathers in zip(adapter.layers(model), packed.manifest.gathers, strict=True):
        for group, order in gathers.items():
            norm = adapter.gathering_norm(layer, group)
            if norm is not None:
                layer.set_submodule(norm, GatheringNorm(layer.get_submodule(norm), packed.orders[order]))


def _check_complete(model: "PreTrainedModel") -> None:
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise PackedFormatError(f"no values for {', '.join(left)}: this version of permllm cannot load a packed {type(model).__name__}")
