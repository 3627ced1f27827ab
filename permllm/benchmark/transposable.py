"""Quality and time of transposable masks, against the exact optimum of every block.

`python -m permllm.benchmark.transposable` compares the kept score of random blocks, and of |W| of a model's linears, with
the linear program's, whose solutions are masks; and times a 4096 x 4096 weight. A reference's time is that of a sample of
its blocks, one after the other, extrapolated to all of them: linear programs, and minimum cost flows where OR-tools is
installed (`pip install --no-deps ortools`: its dependencies do not fit those of the project, and it takes none of them here).
"""

import argparse
import importlib.util
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.sparse import csr_array, eye_array, kron, vstack
from torch import Tensor

from permllm.artifacts import versions, write_json
from permllm.models.checkpoint_files import CheckpointFiles
from permllm.sparsity.pattern import NMPattern
from permllm.sparsity.transposable import transposable_mask

PATTERNS = ("2:4", "4:8", "8:16")
RESULTS = Path("data/benchmarks/transposable.json")
MODEL = "data/models/llama-5m"
BLOCKS = 1000  # whose quality is measured, random ones and real ones
SAMPLE = 100  # blocks that a reference is timed on
FLOW_SCALE = 1e6  # scores as integer costs


def exact_mask(score: Tensor, pattern: NMPattern) -> Tensor:
    """Return the best transposable mask of one block, (M, M) bool: the linear program's solutions are integral."""
    solution = linprog(
        -score.double().flatten().numpy(),
        A_eq=_sums(pattern.group),
        b_eq=np.full(2 * pattern.group, float(pattern.kept)),
        bounds=(0, 1),
        method="highs",
    )
    if solution.status != 0:
        raise RuntimeError(f"the linear program of a {pattern} block was not solved: {solution.message}")
    return torch.from_numpy(solution.x.reshape(score.shape) > 0.5)


def flow_mask(score: Tensor, pattern: NMPattern) -> Tensor:
    """Return the best transposable mask of one block, (M, M) bool, as a minimum cost flow from its rows to its columns.

    Raises:
        ImportError: without OR-tools.
    """
    from ortools.graph.python.min_cost_flow import SimpleMinCostFlow

    size, flow = pattern.group, SimpleMinCostFlow()
    rows, columns = np.arange(size).repeat(size), size + np.tile(np.arange(size), size)
    costs = -np.rint(score.double().flatten().numpy() * FLOW_SCALE).astype(np.int64)
    arcs = flow.add_arcs_with_capacity_and_unit_cost(rows, columns, np.ones_like(costs), costs)
    flow.set_nodes_supplies(np.arange(2 * size), np.repeat([pattern.kept, -pattern.kept], size))
    if flow.solve() != flow.OPTIMAL:
        raise RuntimeError(f"the flow of a {pattern} block was not solved")
    return torch.from_numpy(flow.flows(arcs).reshape(size, size) > 0)


def _sums(size: int) -> csr_array:
    """Return the sums over rows, then over columns, of a flattened (size, size) block, as a matrix."""
    ones, each = np.ones((1, size)), eye_array(size)
    return csr_array(vstack([kron(each, ones), kron(ones, each)]))


def gaps(blocks: Tensor, pattern: NMPattern) -> Tensor:
    """Return by which share the score that our masks keep is below the most that any transposable mask keeps, (blocks,)."""
    ours = transposable_mask(blocks.flatten(0, 1), pattern).view(blocks.shape)
    best = torch.stack([exact_mask(block, pattern) for block in blocks])
    kept, most = ((blocks.double() * mask).sum((1, 2)) for mask in (ours, best))
    return 1 - kept / most


def random_blocks(count: int, size: int) -> Tensor:
    """Draw sizes of normal weights, (count, size, size)."""
    return torch.randn(count, size, size, generator=torch.Generator().manual_seed(0)).abs()


def real_blocks(model: str, count: int, size: int) -> Tensor:
    """Draw blocks of |W| from the linears of a model's decoder layers, (count, size, size)."""
    files = CheckpointFiles.find(Path(model))
    names = sorted(name for name in files.names() if "proj" in name and name.endswith("weight"))
    blocks = [
        weight.float().abs().unflatten(1, (-1, size)).unflatten(0, (-1, size)).transpose(1, 2).flatten(0, 1) for weight in files.read(names).values()
    ]
    every = torch.cat(blocks)
    return every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[:count]]


def _seconds_per_block(solve: Callable[[Tensor, NMPattern], Tensor], pattern: NMPattern, sample: int) -> float:
    blocks = random_blocks(sample + 1, pattern.group)
    solve(blocks[-1], pattern)  # imports
    started = time.perf_counter()
    for block in blocks[:-1]:
        solve(block, pattern)
    return (time.perf_counter() - started) / sample


def measure(pattern: NMPattern, model: str, count: int, sample: int, width: int) -> dict[str, Any]:
    """Measure one pattern, as a row of the results."""
    found = {"random": gaps(random_blocks(count, pattern.group), pattern), "real": gaps(real_blocks(model, count, pattern.group), pattern)}
    weight = torch.randn(width, width, generator=torch.Generator().manual_seed(1)).abs()
    transposable_mask(weight[: 16 * pattern.group], pattern)
    started = time.perf_counter()
    transposable_mask(weight, pattern)
    seconds = time.perf_counter() - started
    references = {"reference": (exact_mask, "scipy linprog (HiGHS)")}
    if importlib.util.find_spec("ortools"):
        references["network_flow"] = flow_mask, f"OR-tools {version('ortools')}, SimpleMinCostFlow"
    every = torch.cat(list(found.values()))
    row: dict[str, Any] = {"pattern": str(pattern), "mean_gap": round(float(every.mean()), 6), "max_gap": round(float(every.max()), 6)}
    for name, values in found.items():
        row |= {f"{name}_mean_gap": round(float(values.mean()), 6), f"{name}_max_gap": round(float(values.max()), 6), f"{name}_blocks": len(values)}
    row |= {"width": width, "seconds": round(seconds, 2)}
    count = (width // pattern.group) ** 2
    for name, (solve, title) in references.items():
        taken = _seconds_per_block(solve, pattern, sample) * count
        row |= {f"{name}_seconds": round(taken, 1), f"{name}_ratio": round(taken / seconds, 1)}
        row[name] = f"{title}, one block at a time, {sample} blocks extrapolated to {count}"
    return {
        **row,
        "model": model,
        "device": f"cpu ({platform.machine()})",
        "threads": torch.get_num_threads(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write one row per pattern."""
    parser = argparse.ArgumentParser(prog="python -m permllm.benchmark.transposable", description="Quality and time of transposable masks.")
    parser.add_argument("--patterns", nargs="+", default=PATTERNS)
    parser.add_argument("--model", default=MODEL, help="folder of a checkpoint that real blocks come from")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="random and real blocks whose quality is measured")
    parser.add_argument("--sample", type=int, default=SAMPLE, help="blocks that a reference is timed on")
    parser.add_argument("--width", type=int, default=4096, help="of the square weight that is timed")
    parser.add_argument("--results", type=Path, default=RESULTS)
    chosen = parser.parse_args(argv)
    command = " ".join(["python -m permllm.benchmark.transposable", *(sys.argv[1:] if argv is None else argv)])
    patterns = [NMPattern.parse(text) for text in chosen.patterns]
    rows = [{**measure(pattern, chosen.model, chosen.blocks, chosen.sample, chosen.width), "command": command} for pattern in patterns]
    write_json(chosen.results, [{**row, "versions": versions()} for row in rows])
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
