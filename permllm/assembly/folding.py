"""Fold channel orders into the neighbouring weights, so that nothing has to be permuted at run time.

An order of a linear's input channels costs nothing where what writes them can write them in that order: the rows of
gate and up (fc1) for down (fc2); inside heads the rows of v for o; and for the linears that read the residual stream
everything that touches it, if they all share one order. What cannot be folded stays a gather.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from permllm.models.adapter import Heads, ModelAdapter
from permllm.permutation.permutation import Permutation
from permllm.pruning.permutations import LayerPermutations


@dataclass(frozen=True)
class Folding:
    """In which order every parameter of a model is stored, and what still has to be gathered.

    Attributes:
        rows, columns: by parameter name; the orders of its first and of its last dimension.
        gathers: by decoder layer, the linear groups whose input has to be permuted at run time, and how.
    """

    rows: dict[str, Permutation] = field(default_factory=dict)
    columns: dict[str, Permutation] = field(default_factory=dict)
    gathers: tuple[LayerPermutations, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left for the run time: the folded model is one of the stock architecture."""
        return not any(self.gathers)

    def apply(self, parameter: str, tensor: Tensor) -> Tensor:
        """Return a parameter as the folded model stores it.

        Raises:
            ValueError: if it has another width than its order.
        """
        for dim, orders in ((0, self.rows), (-1, self.columns)):
            order = orders.get(parameter)
            if order is None:
                continue
            if tensor.shape[dim] != len(order):
                raise ValueError(f"{parameter} of shape {tuple(tensor.shape)} cannot be folded: {len(order)} channels are needed in dimension {dim}")
            tensor = order.apply(tensor, dim)
        return tensor


def fold(adapter: ModelAdapter, heads: Heads, layers: Sequence[LayerPermutations], parameters: Mapping[str, object] | Sequence[str]) -> Folding:
    """Decide where the channel orders of a pruned model go.

    Args:
        layers: the order of every linear group of every decoder layer.
        parameters: the names of the model's parameters; of tied ones one name is enough.

    A gather remains where the residual stream has no shared order, or an order leaves the heads.
    """
    names, rows, columns = set(parameters), {}, {}
    gathers: list[LayerPermutations] = [{} for _ in layers]
    readers = [name for name, group in adapter.linear_groups.items() if not group.writers]
    shared = _shared([layer[name] for layer in layers for name in readers])
    for index, layer in enumerate(layers):
        for name, group in adapter.linear_groups.items():
            columns |= {adapter.path(index, f"{path}.weight"): layer[name] for path in group.readers}
            if name in readers:
                written = {} if shared is not None else None
            elif name == adapter.attention.group:
                written = _head_orders(adapter, heads, layer[name])
            else:
                written = dict.fromkeys(group.writers, layer[name])
            if written is not None:
                rows |= {adapter.path(index, f"{path}.{kind}"): order for path, order in written.items() for kind in ("weight", "bias")}
            elif layer[name] != Permutation.identity(len(layer[name])):
                gathers[index][name] = layer[name]
    if shared is not None:
        residual = adapter.residual
        rows |= dict.fromkeys(residual.rows, shared)
        columns |= {name: shared for name in residual.columns if residual.replaces.get(name) not in names}
        for index in range(len(layers)):
            written = [f"{module}.{kind}" for module in (*residual.norms, *residual.writers) for kind in ("weight", "bias")]
            rows |= {adapter.path(index, name): shared for name in written}
    return Folding(
        {name: order for name, order in rows.items() if name in names},
        {name: order for name, order in columns.items() if name in names},
        tuple(gathers),
    )


def fold_model(model: nn.Module, folding: Folding) -> None:
    """Store the parameters of a loaded model as folded, in place. The caller gathers what is left."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.data = folding.apply(name, parameter.data)


def _shared(orders: Sequence[Permutation]) -> Permutation | None:
    return orders[0] if all(order == orders[0] for order in orders[1:]) else None


def _head_orders(adapter: ModelAdapter, heads: Heads, order: Permutation) -> dict[str, Permutation] | None:
    """Return the rows of query, key and value that write the heads' channels in an order; None if none do.

    Channels stay in their head, whole key-value heads may change places with their query heads, and the query heads
    of one key-value head share the order inside it: they read the same values. Inside a query or key head nothing
    moves, as rotary embeddings tie a channel to its frequency.
    """
    blocks = order.order.view(heads.query, -1)
    size, sharing = blocks.shape[1], heads.query // heads.key_value
    source, inner = blocks[:, 0] // size, blocks % size
    by_key_value = (source // sharing).view(-1, sharing)
    stays = (blocks // size == source[:, None]).all() and (by_key_value == by_key_value[:, :1]).all()
    if not stays or (inner.view(-1, sharing, size) != inner.view(-1, sharing, size)[:, :1]).any():
        return None
    as_it_is, key_value = torch.arange(size, device=source.device), by_key_value[:, :1] * size
    return {
        adapter.attention.query: Permutation((source[:, None] * size + as_it_is).flatten()),
        adapter.attention.key: Permutation((key_value + as_it_is).flatten()),
        adapter.attention.value: Permutation((key_value + inner[::sharing]).flatten()),
    }
