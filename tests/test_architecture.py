"""Imports point downwards only, and each tool is known to the few files that are meant to know it."""

import ast
from pathlib import Path

import pytest

FLOORS = [  # from the bottom up
    ("permllm.lookup", "permllm.batches", "permllm.artifacts", "permllm.tensor_files", "permllm.scratch", "permllm.memory", "permllm.sparsity"),
    ("permllm.permutation",),
    ("permllm.kernels", "permllm.models"),
    ("permllm.calibration",),
    ("permllm.pruning",),
    ("permllm.lcp",),
    ("permllm.assembly",),
    ("permllm.benchmark", "permllm.evaluation", "permllm.report"),
    ("permllm.subject", "permllm.footprint"),
    ("permllm.ablation", "permllm.objectives"),
    ("permllm.params",),
    ("permllm", "permllm.api"),
    ("flows",),
    ("flows.cli",),
]
LEVELS = {part: level for level, parts in enumerate(FLOORS) for part in parts}
NEIGHBOURS = {  # who may know whom on one floor
    ("permllm.artifacts", "permllm.lookup"),
    ("permllm.tensor_files", "permllm.artifacts"),
    ("permllm.scratch", "permllm.artifacts"),
    ("permllm.sparsity", "permllm.lookup"),
    ("permllm", "permllm.api"),
}
STAGES = ("calibrate", "prune", "learn", "reconstruct", "assemble", "benchmark", "evaluate", "report", "ablation", "objectives")
ORCHESTRATORS = {"prefect", "mlflow"}


def part_of(module: str) -> str:
    """Return the entry of the floor plan that a module belongs to: `permllm.models.adapter` to `permllm.models`."""
    if module.split(".")[0] == "flows":
        return "flows.cli" if module == "flows.cli" else "flows"
    return ".".join(module.split(".")[:2])


def find_modules(root: Path) -> dict[str, Path]:
    """Return the files below `permllm/` and `flows/` by module name."""
    modules = {}
    for package in ("permllm", "flows"):
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def imported_modules(module: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Return what a file imports, anywhere in it; `from a import b` gives `a.b` if that is a module, else `a`."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            found.update(f"{origin}.{alias.name}" if f"{origin}.{alias.name}" in known else origin for alias in node.names)
    return found


def upward_imports(root: Path) -> list[str]:
    """List the imports that do not point to a lower floor, and the modules that stand on none."""
    problems = []
    modules = find_modules(root)
    for module, path in modules.items():
        here = part_of(module)
        if here not in LEVELS:
            problems.append(f"{module} is on no floor")
            continue
        for target in sorted(imported_modules(module, path, modules)):
            there = part_of(target)
            if target.split(".")[0] not in ("permllm", "flows") or there == here:
                continue
            if there not in LEVELS:
                problems.append(f"{module} imports {target}, which is on no floor")
            elif not (LEVELS[there] < LEVELS[here] or (here, there) in NEIGHBOURS):
                problems.append(f"{module} imports {target}")
    return problems


def tool_imports(root: Path) -> list[str]:
    """List the imports of DVC, Prefect and MLflow where they must not be known, through other flow modules too."""
    modules = find_modules(root)
    imports = {module: imported_modules(module, path, modules) for module, path in modules.items()}
    problems = []
    for module in modules:
        if module.split(".")[0] == "permllm":
            forbidden = {"dvc", *ORCHESTRATORS}
        elif module in {f"flows.{stage}" for stage in STAGES}:
            forbidden = ORCHESTRATORS
        else:
            continue
        reached, waiting = set(), [module]
        while waiting:
            current = waiting.pop()
            for target in imports[current] - reached:
                reached.add(target)
                waiting += [target] if target in imports else []
        problems += [f"{module} reaches {target}" for target in sorted(reached) if target.split(".")[0] in forbidden]
    return problems


def test_imports_point_to_lower_floors_only(repository):
    assert upward_imports(repository) == []


def test_the_library_knows_no_pipeline_tool_and_stages_know_no_orchestrator(repository):
    assert tool_imports(repository) == []


def test_every_module_of_the_library_is_checked(repository):
    assert set(find_modules(repository)) > {"permllm", "permllm.lcp.trainer", "permllm.sparsity.mask"}


@pytest.mark.parametrize(
    ("name", "source", "problem"),
    [
        ("permllm/sparsity/mask.py", "from permllm.permutation.heuristic import x", "permllm.sparsity.mask imports permllm.permutation.heuristic"),
        ("permllm/sparsity/mask.py", "from permllm import pruning", "permllm.sparsity.mask imports permllm.pruning"),
        ("permllm/sparsity/mask.py", "from ..lcp import trainer", "permllm.sparsity.mask imports permllm.lcp"),
        ("permllm/sparsity/mask.py", "def f():\n    import permllm.lcp.trainer", "permllm.sparsity.mask imports permllm.lcp.trainer"),
        ("permllm/sparsity/mask.py", "from permllm.artifacts import x", "permllm.sparsity.mask imports permllm.artifacts"),
        ("permllm/kernels/gather.py", "import permllm.models.loading", "permllm.kernels.gather imports permllm.models.loading"),
        ("permllm/evaluation/x.py", "from permllm.benchmark import linears", "permllm.evaluation.x imports permllm.benchmark"),
        ("permllm/pruning/x.py", "import permllm", "permllm.pruning.x imports permllm"),
        ("permllm/pruning/x.py", "from flows import prune", "permllm.pruning.x imports flows"),
        ("flows/prune.py", "from flows.cli import main", "flows.prune imports flows.cli"),
        ("permllm/helpers.py", "", "permllm.helpers is on no floor"),
    ],
)
def test_an_import_that_points_up_or_sideways_is_found(tmp_path, name, source, problem):
    write_tree(tmp_path, {"permllm/pruning/__init__.py": "", "flows/__init__.py": "", name: source})
    assert upward_imports(tmp_path) == [problem]


def test_imports_that_point_down_or_stay_at_home_are_allowed(tmp_path):
    allowed = {
        "permllm/sparsity/mask.py": "from permllm.sparsity.pattern import x\nfrom permllm.lookup import y\nimport torch",
        "permllm/sparsity/pattern.py": "from . import mask",
        "permllm/lcp/trainer.py": "from permllm.pruning import methods",
        "permllm/__init__.py": "from permllm.api import prune",
        "permllm/api.py": "from permllm.params import x",
        "flows/pipeline.py": "import flows.track, permllm, prefect",
        "flows/track.py": "import mlflow, dvc",
        "flows/cli.py": "from flows import pipeline",
    }
    write_tree(tmp_path, allowed)
    assert upward_imports(tmp_path) == []
    assert tool_imports(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "source", "problem"),
    [
        ("permllm/pruning/x.py", "import dvc.api", "permllm.pruning.x reaches dvc.api"),
        ("permllm/pruning/x.py", "from prefect import task", "permllm.pruning.x reaches prefect"),
        ("flows/learn.py", "def run():\n    import mlflow", "flows.learn reaches mlflow"),
        ("flows/report.py", "from flows.track import log", "flows.report reaches mlflow"),
    ],
)
def test_a_tool_where_it_must_not_be_known_is_found(tmp_path, name, source, problem):
    write_tree(tmp_path, {"flows/track.py": "import mlflow", name: source})
    assert tool_imports(tmp_path) == [problem]


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name, source in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source)
