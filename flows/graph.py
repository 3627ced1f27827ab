"""The graph of stages, read from DVC: dvc.yaml stays the only place that says what depends on what."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from flows.mend import mend
from flows.paths import Setting
from permllm.artifacts import read_yaml
from permllm.lookup import lookup

AXES = ("model", "pattern", "method")
Names = Sequence[str] | None


@dataclass(frozen=True)
class Stage:
    """A stage of dvc.yaml; one for every combination where it has a matrix.

    Attributes:
        address: what DVC calls it, e.g. `prune@llama-5m-2:4-wanda`.
        setting: its combination.
        depends_on: addresses.
    """

    address: str
    setting: Setting
    depends_on: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The word before the `@`."""
        return self.address.partition("@")[0]

    def is_left_out(self, chosen: Mapping[str, Names]) -> bool:
        """Return whether a choice of models, patterns or methods is one of others."""
        return any(names and getattr(self.setting, axis) not in (None, *names) for axis, names in chosen.items())

    def is_named(self, targets: Names) -> bool:
        """Return whether one of the targets is this stage, or all of its name."""
        return bool({self.address, self.name} & set(targets or ()))


Stages = Mapping[str, Stage]  # by address, every stage after the stages that it depends on


def read_stages(root: Path = Path()) -> Stages:
    """Read all stages of `dvc.yaml` in `root`, after mending what a killed dvc left; studies in other files are not part of the pipeline.

    Raises:
        ValueError: if `dvc.lock` cannot be mended.
    """
    from dvc.repo import Repo  # takes most of a second

    mend(root)
    with Repo(str(root)) as repo:
        graph = repo.index.graph  # an edge points from a stage to one that it depends on
        # without a command: a file that DVC tracks
        nodes = {node.addressing: node for node in graph if node.cmd and node.path_in_repo == "dvc.yaml"}
        needs = {
            address: sorted(other.addressing for other in graph.successors(nodes[address]) if other.addressing in nodes) for address in sorted(nodes)
        }
        order = TopologicalSorter(needs).static_order()
        return {address: Stage(address, _setting(nodes[address]), tuple(needs[address])) for address in order}


def read_records(root: Path = Path()) -> Mapping[str, Any]:
    """Read from `dvc.lock` what DVC recorded of every stage that has run.

    Raises:
        ValueError: if the file is cut off.
    """
    lock = root / "dvc.lock"
    record = read_yaml(lock) if lock.exists() else {"stages": {}}
    if not isinstance(record, Mapping) or not isinstance(record.get("stages"), Mapping):
        raise ValueError(f"{lock} is cut off; `make mend` puts it back")
    return record["stages"]


def parts(stages: Stages) -> Mapping[str, tuple[str, ...]]:
    """Divide stages into what workers do at one go: targets, each with the targets that have to end before.

    A part is the last stage of a setting with all that only this setting needs. A stage that several settings need is a part of
    its own, so that no two workers do it at once. What compares settings, such as `report`, is in none.
    """
    of_settings = {address: stage for address, stage in stages.items() if stage.setting != Setting()}
    needed = {other for stage in of_settings.values() for other in stage.depends_on}
    last = [address for address in of_settings if address not in needed]
    uses = Counter(address for end in last for address in needs_of(stages, end))
    targets = [address for address in of_settings if address in last or uses[address] > 1]
    return {target: tuple(other for other in targets if other != target and other in needs_of(stages, target)) for target in targets}


def _setting(node: Any) -> Setting:
    """Return the matrix item of DVC's stage: its address joins the values with dashes, which names contain too."""
    name, _, key = node.addressing.partition("@")
    item = node.dvcfile.resolver.definitions[name].normalized_iterable[key] if key else {}
    return Setting(**{axis: str(value) for axis, value in item.items()})


def needs_of(stages: Stages, address: str) -> set[str]:
    """Return a stage and all that it depends on, directly or not."""
    return {address}.union(*(needs_of(stages, other) for other in stages[address].depends_on))


def select(stages: Stages, models: Names = None, patterns: Names = None, methods: Names = None, targets: Names = None) -> Stages:
    """Choose stages, with all that they depend on.

    A choice of models, patterns or methods leaves out the stages of all others, and what cannot do without those:
    `report` compares all settings, so it is left out with the first of them.

    Args:
        targets: stages by address, or by name for all of that name that the other choices leave.

    Raises:
        ValueError: naming every unknown name with the choices, or every target that the other choices leave nothing of.
    """
    chosen = dict(zip(AXES, (models, patterns, methods), strict=True))
    problems = [problem for axis, names in chosen.items() for name in names or () for problem in _unknown(_values(stages, axis), name, axis)]
    problems += [problem for target in targets or () for problem in _unknown(_targets(stages, target), target, "target")]
    if problems:
        raise ValueError("; ".join(problems))
    left_out = {address for address, stage in stages.items() if stage.is_left_out(chosen)}
    possible = {address: needs for address in stages if not (needs := needs_of(stages, address)) & left_out}
    empty = [target for target in targets or () if not any(stages[address].is_named([target]) for address in possible)]
    if empty:
        raise ValueError(f"nothing is left of {', '.join(empty)}: it needs settings that the choice of models, patterns or methods leaves out")
    wanted = set().union(*(needs for address, needs in possible.items() if not targets or stages[address].is_named(targets)))
    return {address: stage for address, stage in stages.items() if address in wanted}


def _values(stages: Stages, axis: str) -> set[str]:
    return {getattr(stage.setting, axis) for stage in stages.values()} - {None}


def _targets(stages: Stages, target: str) -> set[str]:
    """Return names of stages, or the addresses of one of them where the target looks like an address."""
    names = {stage.name for stage in stages.values()}
    name, at, _ = target.partition("@")
    return {address for address, stage in stages.items() if stage.name == name} if at and name in names else names


def _unknown(choices: Iterable[str], name: str, what: str) -> list[str]:
    try:
        lookup(dict.fromkeys(choices), name, what)
    except ValueError as error:
        return [str(error)]
    return []
