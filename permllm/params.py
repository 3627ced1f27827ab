"""params.yaml as frozen dataclasses: one per stage, each defined beside its code, gathered and checked here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from permllm.ablation import AblationConfig, NamedRows, SwitchRows
from permllm.artifacts import read_yaml
from permllm.benchmark.linears import BenchmarkConfig
from permllm.calibration.capture import HIDDEN_STATES, HiddenStates
from permllm.calibration.samples import CalibrateConfig
from permllm.calibration.texts import TextSource
from permllm.evaluation.evaluate import EvaluateConfig, PerplexityConfig, ZeroShotConfig
from permllm.lcp.distributed import check_processes
from permllm.lcp.recipes import LearnConfig, with_recipe
from permllm.lookup import lookup
from permllm.models.adapter import Heads
from permllm.models.families import adapter_of
from permllm.models.loading import ModelSource, check_length, load_skeleton
from permllm.objectives import ObjectiveRows, ObjectivesConfig
from permllm.pruning.layerwise import PruneConfig, model_weights
from permllm.pruning.layout import group_widths, shared_orders
from permllm.pruning.methods import PruningMethod
from permllm.report.summary import DENSE as DENSE
from permllm.sparsity.pattern import NMPattern

Config = TypeVar("Config")


@dataclass(frozen=True)
class RunParams:
    """The matrix of the pipeline: every combination of models, patterns and methods.

    Attributes:
        one_shot, learned: methods of the stages `prune` and `learn`.
        methods: both, in the order of the report.
    """

    models: tuple[str, ...]
    patterns: tuple[str, ...]
    one_shot: tuple[str, ...]
    learned: tuple[str, ...]
    methods: tuple[str, ...]


@dataclass(frozen=True)
class MethodParams:
    """A pruning method; `learn` overrides settings of the model's budget."""

    score: str = "wanda"
    permutation: str = "identity"
    layout: str = "free"
    update: str | None = None
    seed: int = 0
    transposable: bool = False
    learn: Mapping[str, Any] = field(default_factory=dict)

    def pruning(self) -> PruningMethod:
        """Return the choices as the library takes them."""
        return PruningMethod(self.score, self.permutation, self.update, self.seed, self.layout, self.transposable)


@dataclass(frozen=True)
class ModelParams:
    """A model, how it is held, and its budget: the settings of every stage.

    Attributes:
        hidden_states: where those of all sequences are kept while a model is run layer by layer: in `memory`, in a file
            on `disk`, or on the `device`. No result depends on it.
        processes: how many learn permutations together, on a GPU each; results are the same but for rounding.
    """

    source: str
    calibrate: CalibrateConfig
    evaluate: EvaluateConfig
    dtype: str = "float32"
    device: str = "auto"
    hidden_states: str = "memory"
    processes: int = 1
    revision: str | None = None
    trust_remote_code: bool = False
    prune: PruneConfig = PruneConfig()
    learn: Mapping[str, Any] = field(default_factory=dict)
    benchmark: BenchmarkConfig = BenchmarkConfig()

    def __post_init__(self) -> None:
        self.keep_hidden()
        if self.processes < 1:
            raise ValueError(f"processes is {self.processes}, but at least 1 has to learn")

    def keep_hidden(self) -> HiddenStates:
        """Return what keeps the hidden states.

        Raises:
            ValueError: if `hidden_states` is unknown.
        """
        return lookup(HIDDEN_STATES, self.hidden_states, "hidden_states")

    def model_source(self) -> ModelSource:
        """Return where the model comes from."""
        return ModelSource(self.source, self.dtype, self.device, self.revision, self.trust_remote_code)


@dataclass(frozen=True)
class Params:
    """All of params.yaml. `budgets` only holds the anchors that models refer to."""

    run: RunParams
    methods: Mapping[str, MethodParams]
    models: Mapping[str, ModelParams]
    ablation: AblationConfig = AblationConfig(seeds=())
    objectives: ObjectivesConfig = ObjectivesConfig()
    budgets: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = [problem for model in self.models for problem in _problems(lambda model=model: self.models[model].model_source())]
        problems += [problem for name in self.methods for problem in _problems(lambda name=name: self.methods[name].pruning())]
        problems += [problem for model in self.run.models for problem in _problems(lambda model=model: self.model(model))]
        problems += [problem for pattern in self.run.patterns for problem in _problems(lambda pattern=pattern: NMPattern.parse(pattern))]
        for name in dict.fromkeys((*self.run.one_shot, *self.run.learned, *self.run.methods)):
            problems += _problems(lambda name=name: self.method(name))
        if not problems:
            problems = self._run_problems()
        if problems:
            raise ValueError("; ".join(dict.fromkeys(problems)))

    def _run_problems(self) -> list[str]:
        wrong = [
            f"method {name} of run.one_shot learns its permutations: move it to run.learned"
            for name in self.run.one_shot
            if self.method(name).pruning().is_learned
        ]
        wrong += [
            f"method {name} of run.learned has no permutation lcp: move it to run.one_shot"
            for name in self.run.learned
            if not self.method(name).pruning().is_learned
        ]
        if sorted(self.run.methods) != sorted((*self.run.one_shot, *self.run.learned)):
            wrong.append("run.methods must list what run.one_shot and run.learned list together")
        for model in self.run.models:
            for name in self.run.learned:
                wrong += [
                    f"learn settings of {model} and {name}: {problem}"
                    for problem in _problems(lambda model=model, name=name: self.learn(model, name))
                ]
        return wrong

    @classmethod
    def read(cls, path: Path = Path("params.yaml")) -> Self:
        """Read and check a parameter file.

        Raises:
            ValueError: naming every unknown key, wrong value and unknown name at once.
        """
        return cls.parse(read_yaml(path), str(path))

    @classmethod
    def parse(cls, record: Any, origin: str = "params") -> Self:
        """Check a parameter record; see `read`."""
        for config in (cls, *SECTIONS):
            config.__pydantic_config__ = ConfigDict(extra="forbid")
        return _checked(cls, record, origin)

    def model(self, name: str) -> ModelParams:
        """Return the settings of a model."""
        return lookup(self.models, name, "model")

    def method(self, name: str) -> MethodParams:
        """Return the settings of a method."""
        return lookup(self.methods, name, "method")

    def learn(self, model: str, method: str) -> LearnConfig:
        """Return the learning settings: the recipe's, then the model's, then the method's.

        Raises:
            ValueError: if a setting is unknown or makes no sense.
        """
        settings = with_recipe({**self.model(model).learn, "layout": self.method(method).layout, **self.method(method).learn})
        config = _checked(LearnConfig, settings, f"learn of {model} and {method}")
        available = self.model(model).calibrate.sequences - self.model(model).calibrate.held_out
        if config.sequences is not None and config.sequences > available:
            raise ValueError(f"sequences is {config.sequences}, but the calibration has {available} that are not held out")
        check_processes(self.model(model).processes, config.batch_size)
        return config

    def check_model(self, name: str) -> None:
        """Check everything that a run of a model will need, before the first stage starts.

        Raises:
            ValueError: listing every pattern and block size that does not fit a layer, sequences that are too long,
                and text that is missing.
        """
        params = self.model(name)
        skeleton = load_skeleton(params.model_source())
        adapter, heads = adapter_of(skeleton), Heads.of(skeleton.config)
        widths, outputs = adapter.widths(skeleton), adapter.output_widths(skeleton)
        groups = group_widths(model_weights(skeleton, adapter), adapter)
        checks = [lambda pattern=pattern: NMPattern.parse(pattern).check_widths(widths) for pattern in self.run.patterns]
        checks += [
            lambda method=method, pattern=pattern: self.method(method).pruning().check_outputs(outputs, NMPattern.parse(pattern))
            for method in self.run.methods
            for pattern in self.run.patterns
        ]
        checks += [
            lambda method=method, pattern=pattern: self.learn(name, method).check_widths(widths, NMPattern.parse(pattern))
            for method in self.run.learned
            for pattern in self.run.patterns
        ]
        checks += [
            lambda layout=layout, pattern=pattern: shared_orders(layout, adapter, groups, heads, NMPattern.parse(pattern))
            for layout in {self.method(method).layout for method in self.run.methods}
            for pattern in self.run.patterns
        ]
        checks += [
            lambda: check_length(params.calibrate.length, skeleton.config, "calibrate.length"),
            lambda: check_length(params.evaluate.perplexity.length, skeleton.config, "evaluate.perplexity.length"),
            params.calibrate.text.paths,
            params.evaluate.check,
        ]
        problems = [problem for check in checks for problem in _problems(check)]
        if problems:
            raise ValueError(f"model {name}: {'; '.join(dict.fromkeys(problems))}")


SECTIONS = (
    AblationConfig, NamedRows, SwitchRows, ObjectivesConfig, ObjectiveRows,
    RunParams, MethodParams, ModelParams, CalibrateConfig, PruneConfig, BenchmarkConfig, EvaluateConfig, PerplexityConfig, ZeroShotConfig, TextSource,
)  # fmt: skip


def _checked(config: type[Config], record: Any, origin: str) -> Config:
    """Make a dataclass of a record, its types checked; all offenders are named at once."""
    try:
        return TypeAdapter(config).validate_python(record)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, problem['loc'])) or 'it'}: {problem['msg'].removeprefix('Value error, ')}" for problem in error.errors()]
        raise ValueError(f"{origin} cannot be used: {'; '.join(problems)}") from error


def _problems(check: Any) -> list[str]:
    """Return what a check complains about, as a list of at most one."""
    try:
        check()
    except ValueError as error:
        return [str(error)]
    return []
