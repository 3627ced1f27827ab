"""What a pruned checkpoint says of itself: the record beside its tensors of the orders in which they are N:M."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from permllm.artifacts import read_manifest, read_tensors
from permllm.assembly.checkpoint import HASHES, KIND, MASKS, PERMUTATIONS, RECORD_FOLDER
from permllm.assembly.folding import Folding, fold
from permllm.models.adapter import Heads, ModelAdapter
from permllm.models.families import adapter_of
from permllm.models.loading import ModelSource, load_skeleton
from permllm.models.parameter_names import parameters_filled
from permllm.permutation.permutation import Permutation
from permllm.pruning.permutations import LayerPermutations
from permllm.pruning.storage import ROWS
from permllm.sparsity.pattern import NMPattern

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MASKED, FOLDED = "masked", "folded"
FOREIGN_ENTRIES = ("sparsity_config", "quantization_config", "compression_config")


@dataclass(frozen=True)
class PruningRecord:
    """What the folder `permllm/` beside a pruned checkpoint says.

    Attributes:
        orders: of every linear group, by decoder layer: those that its masks were chosen in.
        form: `masked`, the weights lie in their original order; or `folded`, they lie in `orders`. The manifest's
            entry of that name; masked where there is none.
        rows: of transposable masks, the orders of the output channels that they were chosen in, by `<layer>.<path>`; none is the order
            as it is.
        hashes: the fingerprint of every tensor, by its name in the checkpoint; empty if none were recorded.
        manifest: all that it says.
    """

    pattern: NMPattern
    orders: tuple[LayerPermutations, ...]
    form: str = MASKED
    hashes: Mapping[str, str] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, Permutation] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "PruningRecord":
        """Read the record of a checkpoint's folder.

        Raises:
            ValueError: if there is none, or it is not complete.
        """
        if not (folder / RECORD_FOLDER).is_dir():
            raise ValueError(
                f"{folder} has no record {RECORD_FOLDER}/ of its channel orders: `permllm assemble` writes it; "
                "if the weights are N:M in the order in which they lie, name the pattern"
            )
        manifest = read_manifest(folder / RECORD_FOLDER, KIND)
        tensors = read_tensors(folder / RECORD_FOLDER / PERMUTATIONS)
        try:
            orders = tuple({name: Permutation(tensors[f"{index}.{name}"].long()) for name in layer} for index, layer in enumerate(manifest["groups"]))
        except KeyError as error:
            raise ValueError(f"the record {folder / RECORD_FOLDER} is damaged: it lacks {error}; run the assemble stage again") from error
        hashes = folder / RECORD_FOLDER / HASHES
        return cls(
            NMPattern.parse(manifest["pattern"]),
            orders,
            manifest.get("form", MASKED),
            json.loads(hashes.read_text()) if hashes.is_file() else {},
            manifest,
            {name.removesuffix(ROWS): Permutation(order.long()) for name, order in tensors.items() if name.endswith(ROWS)},
        )

    @classmethod
    def in_place(cls, pattern: NMPattern, adapter: ModelAdapter, model: "PreTrainedModel") -> "PruningRecord":
        """Return the record of a model whose weights are N:M as they lie."""
        widths = adapter.widths(model)
        layers = range(len(adapter.layers(model)))
        groups = adapter.linear_groups.items()
        return cls(
            pattern, tuple({name: Permutation.identity(widths[adapter.path(index, group.readers[0])]) for name, group in groups} for index in layers)
        )

    @property
    def is_transposable(self) -> bool:
        """Whether the masks are N:M along the output channels too."""
        return self.manifest.get("method_settings", {}).get("transposable", False)

    def stored_orders(self) -> tuple[LayerPermutations, ...]:
        """Return the orders in which the tensors, as they lie, are N:M."""
        if self.form == MASKED:
            return self.orders
        return tuple({name: Permutation.identity(len(order)) for name, order in layer.items()} for layer in self.orders)

    def check(self, adapter: ModelAdapter, model: "PreTrainedModel") -> None:
        """Refuse a record that is not of a model.

        Raises:
            ValueError: naming every linear group whose order is missing, unknown or of another width.
        """
        widths = adapter.widths(model)
        needed = {
            (index, name): widths[adapter.path(index, group.readers[0])]
            for index in range(len(adapter.layers(model)))
            for name, group in adapter.linear_groups.items()
        }
        found = {(index, name): len(order) for index, layer in enumerate(self.orders) for name, order in layer.items()}
        misfits = [
            f"{adapter.layer_path(index)} {name} has {found.get((index, name), 'no')} channels, not {needed.get((index, name), 'any')}"
            for index, name in sorted(found.keys() | needed.keys())
            if found.get((index, name)) != needed.get((index, name))
        ]
        if misfits:
            raise ValueError(f"the record is of another model than {type(model).__name__}: {'; '.join(misfits)}")


@dataclass(frozen=True)
class PrunedCheckpoint:
    """A pruned checkpoint, masked, folded or packed, but for its tensors.

    Attributes:
        model: without weights, on the meta device.
        parameters: which parameter each tensor fills; None for tensors that the model does not read.
    """

    model: "PreTrainedModel"
    adapter: ModelAdapter
    record: PruningRecord
    parameters: dict[str, str | None]

    @classmethod
    def open(cls, folder: Path, tensors: Collection[str], pattern: NMPattern | None = None) -> "PrunedCheckpoint":
        """Read what lies beside the tensors.

        Args:
            tensors: their names.
            pattern: of a checkpoint without a record, whose weights are N:M as they lie.

        Raises:
            ValueError: if there is neither a record nor a pattern, they contradict each other, or tensors, record
                and configuration do not fit each other.
        """
        model = load_skeleton(ModelSource(str(folder)))
        adapter = adapter_of(model)
        has_record = (folder / RECORD_FOLDER).is_dir()
        record = PruningRecord.in_place(pattern, adapter, model) if pattern and not has_record else PruningRecord.read(folder)
        if pattern and pattern != record.pattern:
            raise ValueError(f"{folder} is recorded as {record.pattern}, not {pattern}")
        record.check(adapter, model)
        record.pattern.check_widths(adapter.widths(model))
        return cls(model, adapter, record, parameters_filled(model, tensors))

    def targets(self) -> dict[str, tuple[int, str, str]]:
        """Return decoder layer, linear group and path below the layer of every pruned tensor, by the tensor's name."""
        return target_places(self.adapter, len(self.record.orders), self.parameters)

    def folding(self, orders: Sequence[LayerPermutations]) -> Folding:
        """Return which of some orders can be folded into the model's weights, and what has to be gathered."""
        parameters = [name for name in self.parameters.values() if name is not None]
        return fold(self.adapter, Heads.of(self.model.config), orders, parameters)


def target_places(adapter: ModelAdapter, layers: int, parameters: Mapping[str, str | None]) -> dict[str, tuple[int, str, str]]:
    """Return decoder layer, linear group and path below the layer of every pruned tensor, by the tensor's name."""
    places = {
        f"{adapter.path(index, path)}.weight": (index, name, path)
        for index in range(layers)
        for name, group in adapter.linear_groups.items()
        for path in group.readers
    }
    return {tensor: places[parameter] for tensor, parameter in parameters.items() if parameter in places}


def read_masks(folder: Path) -> dict[str, Tensor]:
    """Return the packed masks of a checkpoint's record by `<layer>.<path>`; none if it has no record of them."""
    path = folder / RECORD_FOLDER / MASKS
    return read_tensors(path) if path.is_file() else {}


def foreign_entries(folder: Path) -> list[str]:
    """Return the entries of `config.json` that stop other loaders: a claim of sparsity or quantization."""
    config = json.loads((folder / "config.json").read_text())
    return [name for name in FOREIGN_ENTRIES if name in config]
