"""Where a model family keeps its decoder layers, and which of its linears read the same tensor."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self

from torch import Tensor, nn


@dataclass(frozen=True)
class LinearGroup:
    """Linear layers that read the same tensor, and so must share one permutation.

    Attributes:
        readers: paths below the decoder layer, e.g. `("mlp.gate_proj", "mlp.up_proj")`.
        writers: linears whose output channels may be reordered instead of the activations, because only
            per-channel operations lie in between. Empty if the group reads the residual stream.
        norm: path of the norm whose output the readers alone read in layers with norms first: a gather at run time can
            be part of it. None if they read no norm.
    """

    readers: tuple[str, ...]
    writers: tuple[str, ...] = ()
    norm: str | None = None


@dataclass(frozen=True)
class Attention:
    """The linears of the attention, by path below the decoder layer. Heads are runs of channels.

    Attributes:
        group: name of the linear group that reads the heads' outputs.
    """

    query: str
    key: str
    value: str
    group: str


@dataclass(frozen=True)
class Heads:
    """How attention divides its channels: `query` heads, of which equal runs share one of the `key_value` heads."""

    query: int
    key_value: int

    @classmethod
    def of(cls, config: object) -> Self:
        """Read them from a model's configuration."""
        return cls(config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


@dataclass(frozen=True)
class Residual:
    """Where the channels of the residual stream appear, besides the columns of the linears that read it.

    Attributes:
        columns: parameters of the model that have them along the last dimension: embeddings, final norms, the head.
        rows: parameters that have them along the first dimension.
        replaces: if a parameter of `rows` or `columns` (the value) is there, the channels of the key's last dimension
            are others: a projection lies between.
        norms: modules of every decoder layer whose weight and bias have them.
        writers: linears of every decoder layer that write to it: rows and bias.
    """

    columns: tuple[str, ...]
    norms: tuple[str, ...]
    writers: tuple[str, ...]
    rows: tuple[str, ...] = ()
    replaces: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelAdapter:
    """What the rest of the library needs to know about a model family.

    Attributes:
        decoder_layers: path of the list of decoder layers below the causal language model.
        linear_groups: the linears to prune, by the name of their group.
        attention, residual: where heads and the residual stream are, for folding.
        checkpoint_prefixes: what checkpoints write for the start of `decoder_layers` besides that path itself.
        norm_first: attribute of a decoder layer that says whether its norms come before what they feed; None for always.
    """

    decoder_layers: str
    linear_groups: dict[str, LinearGroup]
    attention: Attention
    residual: Residual
    checkpoint_prefixes: tuple[str, ...] = ()
    norm_first: str | None = None

    def layers(self, model: nn.Module) -> nn.ModuleList:
        """Return the decoder layers of a model."""
        return model.get_submodule(self.decoder_layers)

    def linears(self, layer: nn.Module) -> dict[str, nn.Linear]:
        """Return the target linears of one decoder layer, by their path below it."""
        return {path: layer.get_submodule(path) for group in self.linear_groups.values() for path in group.readers}

    def layer_path(self, layer_index: int) -> str:
        """Return the full path of a decoder layer, e.g. `model.layers.3`."""
        return f"{self.decoder_layers}.{layer_index}"

    def path(self, layer_index: int, linear: str) -> str:
        """Return the full path of a linear, e.g. `model.layers.3.mlp.down_proj`."""
        return f"{self.layer_path(layer_index)}.{linear}"

    def paths(self, layer_count: int) -> Iterator[str]:
        """Yield the full path of every target linear of a model."""
        for index in range(layer_count):
            for group in self.linear_groups.values():
                for linear in group.readers:
                    yield self.path(index, linear)

    def gathering_norm(self, layer: nn.Module, group: str) -> str | None:
        """Return the path of the norm that can gather for a group at run time, or None if the linears have to."""
        is_first = self.norm_first is None or getattr(layer, self.norm_first)
        return self.linear_groups[group].norm if is_first else None

    def tensor_names(self, layer_count: int, present: Collection[str]) -> dict[str, str]:
        """Return what a checkpoint calls the weight of every target linear, by the linear's full path.

        Args:
            present: the names of the checkpoint's tensors.

        Raises:
            ValueError: naming every target that is not among them.
        """
        starts = (self.decoder_layers, *self.checkpoint_prefixes)
        start = next((start for start in starts if any(name.startswith(f"{start}.0.") for name in present)), starts[0])
        names = {path: f"{start}{path.removeprefix(self.decoder_layers)}.weight" for path in self.paths(layer_count)}
        missing = sorted(set(names.values()) - set(present))
        if missing:
            raise ValueError(f"the checkpoint lacks {', '.join(missing)}")
        return names

    def widths(self, model: nn.Module) -> dict[str, int]:
        """Return the input channels of every target linear, by full path."""
        return {path: linear.in_features for path, linear in self._targets(model)}

    def output_widths(self, model: nn.Module) -> dict[str, int]:
        """Return the output channels of every target linear, by full path."""
        return {path: linear.out_features for path, linear in self._targets(model)}

    def _targets(self, model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
        for index, layer in enumerate(self.layers(model)):
            for path, linear in self.linears(layer).items():
                yield self.path(index, path), linear

    def audit(self, model: nn.Module) -> None:
        """Prove that the targets are all there is to prune in every decoder layer.

        Raises:
            ValueError: naming every target that is missing or not a linear, every linear that is no target, and
                every weight of three dimensions (mixture of experts), which this version does not prune.
        """
        problems = []
        targets = {path for group in self.linear_groups.values() for path in group.readers}
        for index, layer in enumerate(self.layers(model)):
            found = {path for path, module in layer.named_modules() if isinstance(module, nn.Linear)}
            problems += [f"{self.path(index, path)} is missing or not a linear layer" for path in sorted(targets - found)]
            problems += [f"{self.path(index, path)} is a linear layer that no group covers" for path in sorted(found - targets)]
            problems += [
                f"{self.path(index, name)} has shape {tuple(parameter.shape)}: mixture-of-experts weights are not supported"
                for name, parameter in layer.named_parameters()
                if parameter.dim() > 2
            ]
        if problems:
            raise ValueError(f"{type(model).__name__} does not match its family: {'; '.join(problems)}")


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite, in one pass without a copy of the tensor's size."""
    low, high = tensor.detach().aminmax()  # both are NaN if any entry is
    return bool(low.isfinite() and high.isfinite())


def check_finite(model: nn.Module) -> None:
    """Refuse a model whose parameters hold NaN or infinity.

    Raises:
        ValueError: naming all of them.
    """
    broken = [name.removesuffix(".weight") for name, parameter in model.named_parameters() if not is_finite(parameter)]
    if broken:
        raise ValueError(f"weights hold NaN or infinity in {', '.join(broken)}; the checkpoint is damaged, fetch it again")
