"""Models whose parts are there when they are needed: all the time, or one decoder layer after another.

A streamed model is a skeleton on the meta device and the files of its checkpoint. Its decoder layers, and what lies before
and behind them, have their weights only inside of the contexts below; the modules themselves stay the same.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from threading import Thread
from typing import TYPE_CHECKING, Protocol, Self

import torch
from torch import Tensor, nn

from permllm.models.adapter import ModelAdapter, is_finite
from permllm.models.checkpoint_files import CheckpointFiles
from permllm.models.families import adapter_of
from permllm.models.loading import DTYPES, ModelSource, compute_buffers, load_skeleton, resolve_device
from permllm.models.parameter_names import parameters_filled

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedModel


class LayeredModel(Protocol):
    """A model that is run layer by layer.

    Attributes:
        model: its modules; with weights inside of the contexts only.
        device: where they compute.
    """

    model: "PreTrainedModel"
    adapter: ModelAdapter
    device: torch.device

    def __len__(self) -> int:
        """Return the number of decoder layers."""

    def stem(self) -> AbstractContextManager[None]:
        """Have what comes before the decoder layers: embeddings."""

    def layer(self, index: int) -> AbstractContextManager[nn.Module]:
        """Have a decoder layer."""

    def head(self) -> AbstractContextManager[None]:
        """Have what follows the decoder layers: the final norm and the head."""


@dataclass(frozen=True)
class LoadedModel:
    """A model that is in memory as a whole."""

    model: "PreTrainedModel"
    adapter: ModelAdapter

    @classmethod
    def of(cls, model: "PreTrainedModel") -> Self:
        """Take a loaded model of a supported family.

        Raises:
            ValueError: if the family is not supported.
        """
        return cls(model, adapter_of(model))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def __len__(self) -> int:
        return len(self.adapter.layers(self.model))

    def stem(self) -> AbstractContextManager[None]:
        """Do nothing."""
        return nullcontext()

    def layer(self, index: int) -> AbstractContextManager[nn.Module]:
        """Return a decoder layer."""
        return nullcontext(self.adapter.layers(self.model)[index])

    def head(self) -> AbstractContextManager[None]:
        """Do nothing."""
        return nullcontext()


@dataclass(frozen=True)
class StreamedModel:
    """A model that reads its weights from a checkpoint when they are needed, and forgets them.

    While a layer is there, a thread has the system read the next one into its file cache, which is no memory of the process.

    Attributes:
        files: the checkpoint.
        stored: what the checkpoint calls each parameter, by its full name; tied parameters may lack an entry.
        dtype: of the weights while they are there.
        change: applied to every parameter as it is read, given its full name.
    """

    model: "PreTrainedModel"
    adapter: ModelAdapter
    files: CheckpointFiles
    stored: dict[str, str]
    dtype: torch.dtype
    device: torch.device
    change: Callable[[str, Tensor], Tensor] | None = None

    @classmethod
    def open(cls, source: ModelSource) -> Self:
        """Open a checkpoint, after proving that every weight is there, fits and is finite. Reads it once, tensor by tensor.

        Raises:
            ValueError: as `load_model`, naming all that is wrong.
        """
        device, model, files = resolve_device(source.device), load_skeleton(source), CheckpointFiles.find(source.folder())
        filled = parameters_filled(model, files.names(), files.shapes)
        stored = {parameter: name for name, parameter in filled.items() if parameter is not None}
        model.config.use_cache = False
        compute_buffers(model, device)
        streamed = cls(model.requires_grad_(False).eval(), adapter_of(model), files, stored, DTYPES[source.dtype], device)
        broken = [name.removesuffix(".weight") for name in stored if not is_finite(streamed.read(name))]
        if broken:
            raise ValueError(f"weights hold NaN or infinity in {', '.join(broken)}; the checkpoint is damaged, fetch it again")
        return streamed

    def __len__(self) -> int:
        return len(self.adapter.layers(self.model))

    def read(self, name: str) -> Tensor:
        """Return a parameter from the checkpoint, in the dtype of the weights."""
        tensor = self.files.tensor(self.stored[name])
        tensor = tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)
        return tensor if self.change is None else self.change(name, tensor)

    def stem(self) -> AbstractContextManager[None]:
        """Have what lies outside of the decoder layers, but for the head."""
        return self._present(self._outside(leave_out=self.model.get_output_embeddings()))

    def head(self) -> AbstractContextManager[None]:
        """Have what lies outside of the decoder layers, but for the input embeddings."""
        return self._present(self._outside(leave_out=self.model.get_input_embeddings()))

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Have a decoder layer, while the next one comes into the file cache."""
        following = [self.stored[name] for name in self._of_layer(index + 1) if name in self.stored]
        with self._present(self._of_layer(index)):
            ahead = Thread(target=self.files.warm, args=(following,), daemon=True)
            ahead.start()
            try:
                yield self.adapter.layers(self.model)[index]
            finally:
                ahead.join()

    def _of_layer(self, index: int) -> list[str]:
        prefix = f"{self.adapter.layer_path(index)}."
        return [name for name in self.model.state_dict() if name.startswith(prefix)]

    def _outside(self, leave_out: nn.Module) -> list[str]:
        layers, omitted = f"{self.adapter.decoder_layers}.", {id(module) for module in leave_out.modules()}
        return [
            name
            for name in self.model.state_dict()
            if not name.startswith(layers) and id(self.model.get_submodule(name.rpartition(".")[0])) not in omitted
        ]

    @contextmanager
    def _present(self, names: Iterable[str]) -> Iterator[None]:
        """Give parameters their values; tied ones, of which the checkpoint has one, share them."""
        absent = {}
        values: dict[str, Tensor] = {}
        try:
            for name in names:
                owner, attribute = self._place(name)
                source = self._source(name)
                if source not in values:
                    values[source] = self.read(source)
                absent[name] = getattr(owner, attribute)
                _assign(owner, attribute, values[source])
            values.clear()
            yield
        finally:
            for name, tensor in absent.items():
                owner, attribute = self._place(name)
                _assign(owner, attribute, tensor)

    def _place(self, name: str) -> tuple[nn.Module, str]:
        module, _, attribute = name.rpartition(".")
        return self.model.get_submodule(module), attribute

    def _source(self, name: str) -> str:
        """Return the parameter that the checkpoint has: the name itself, or one that it is tied to."""
        if name in self.stored:
            return name
        pairs = self.model.all_tied_weights_keys.items()
        tied = {other for pair in pairs if name in pair for other in pair}
        tied |= {target for target, source in pairs if source in tied}
        return next(other for other in tied if other in self.stored)


def _assign(owner: nn.Module, attribute: str, tensor: Tensor) -> None:
    if attribute in owner._parameters and not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=False)
    setattr(owner, attribute, tensor)
