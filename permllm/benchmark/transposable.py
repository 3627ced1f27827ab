"""Quality and time of transposable masks, against the exact optimum of every block.

`python -m permllm.benchmark.transposable` compares the kept score of random blocks, and of |W| of a model's linears, with
the linear program's, whose solutions are masks; and times a 4096 x 4096 weight. The reference's time is that of the
linear programs of a sample of its blocks, extrapolated to all of them.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
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
SAMPLE = 100  # blocks that the reference is timed on


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


def measure(pattern: NMPattern, model: str, count: int, sample: int, width: int) -> dict[str, Any]:
    """Measure one pattern, as a row of the results."""
    found = {"random": gaps(random_blocks(count, pattern.group), pattern), "real": gaps(real_blocks(model, count, pattern.group), pattern)}
    weight = torch.randn(width, width, generator=torch.Generator().manual_seed(1)).abs()
    transposable_mask(weight[: 16 * pattern.group], pattern)
    started = time.perf_counter()
    transposable_mask(weight, pattern)
    seconds = time.perf_counter() - started
    blocks = random_blocks(sample, pattern.group)
    started = time.perf_counter()
    for block in blocks:
        exact_mask(block, pattern)
    reference = (time.perf_counter() - started) / sample * (width // pattern.group) ** 2
    every = torch.cat(list(found.values()))
    row: dict[str, Any] = {"pattern": str(pattern), "mean_gap": round(float(every.mean()), 6), "max_gap": round(float(every.max()), 6)}
    for name, values in found.items():
        row |= {f"{name}_mean_gap": round(float(values.mean()), 6), f"{name}_max_gap": round(float(values.max()), 6), f"{name}_blocks": len(values)}
    row |= {"width": width, "seconds": round(seconds, 2), "reference_seconds": round(reference, 1)}
    row["reference"] = f"scipy linprog (HiGHS), one block at a time, {sample} blocks extrapolated to {(width // pattern.group) ** 2}"
    return {
        **row,
        "ratio": round(reference / seconds, 1),
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
    parser.add_argument("--sample", type=int, default=SAMPLE, help="blocks that the reference is timed on")
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
