"""Which parameter of a model a tensor of a checkpoint fills: checkpoints leave out prefixes, and hold buffers of old versions."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = (r"rotary_emb\.inv_freq$", r"position_ids$")  # models compute them by themselves, whatever the checkpoint says


def parameters_filled(model: "PreTrainedModel", names: Collection[str], shapes: Mapping[str, Sequence[int]] | None = None) -> dict[str, str | None]:
    """Return the full name of the parameter that each tensor fills; None for tensors that the model does not read.

    Args:
        model: its shapes are enough (the meta device).
        names: of the tensors in the checkpoint.
        shapes: theirs by name, if they are to be checked.

    Raises:
        ValueError: naming every tensor that has no place in the model or another shape, and every parameter that none fills.
    """
    places, ignored = model.state_dict(keep_vars=True), (*IGNORED, *(model._keys_to_ignore_on_load_unexpected or ()))
    filled: dict[str, str | None] = {}
    problems = []
    for name in names:
        place = next((place for place in (name, f"{model.base_model_prefix}.{name}") if place in places), None)
        if place is None and not any(re.search(pattern, name) for pattern in ignored):
            problems.append(f"{name} has no place in the model")
        if place is not None and place in filled.values():
            problems.append(f"{name} fills {place}, as another tensor does")
        if place is not None and shapes is not None and tuple(shapes[name]) != tuple(places[place].shape):
            problems.append(f"{name} has shape {tuple(shapes[name])}, not {tuple(places[place].shape)}")
        filled[name] = place
    present = {id(places[place]) for place in filled.values() if place is not None}
    needed = dict([*model.named_parameters(), *model.named_buffers()])  # of tied parameters one name, and any of them will do
    problems += [f"{name} is missing" for name in sorted(set(needed) & set(places)) if id(places[name]) not in present]
    if problems:
        raise ValueError(f"the tensors do not fit {type(model).__name__}: {'; '.join(problems)}; fetch or write the checkpoint again")
    return filled
