"""Measure the most memory that each stage holds, on a random LLaMA: `python -m flows.memory`.

Every stage is a process of its own; the system tells its peak. This process stays small while they run: a child begins
with the peak of its parent.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

RESULT = Path("data/benchmarks/memory.json")
MODEL, PATTERN = "random", "2:4"
STAGES = (
    ("calibrate", None),
    ("prune", "wanda"),
    ("prune", "sparsegpt"),
    ("assemble", "wanda"),
    ("assemble", "sparsegpt"),
    ("prune", "wanda-sequential"),
    ("evaluate", "wanda"),
)
METHODS = {"wanda": {"score": "wanda"}, "sparsegpt": {"update": "sparsegpt"}, "wanda-sequential": {"score": "wanda"}}


def parameters(sequences: int, length: int, *, sequential: bool, texts: Path) -> dict[str, Any]:
    """Return params.yaml for the random model."""
    model = {
        "source": "model",
        "dtype": "bfloat16",
        "device": "cpu",
        "calibrate": {"text": {"files": f"{texts}/*.txt"}, "sequences": sequences, "length": length, "held_out": 0, "batch_size": 1},
        "prune": {"sequential": sequential},
        "evaluate": {"perplexity": {"text": {"files": f"{texts}/a_02.txt"}, "length": length}, "zero_shot": {"tasks": {}}},
    }
    run = {"models": [MODEL], "patterns": [PATTERN], "one_shot": list(METHODS), "learned": [], "methods": list(METHODS)}
    return {"run": run, "methods": METHODS, "models": {MODEL: model}}


def measured(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, float]:
    """Run a command to its end, and return the most bytes it held, and its seconds.

    Raises:
        RuntimeError: if it fails.
    """
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")
    return usage.ru_maxrss * (1024 if sys.platform == "linux" else 1), time.perf_counter() - started


def measure(folder: Path, shape: str, sequences: int, length: int) -> Iterator[dict[str, Any]]:
    """Write a random model into a folder, run the stages there, and yield a row for each."""
    root = Path.cwd()
    environment = os.environ | {"PYTHONPATH": str(root)}
    python = [sys.executable, "-m"]
    tokenizer = str(root / "data/models/llama-5m")
    measured([*python, "permllm.benchmark.memory", "model", "--shape", shape, "--tokenizer", tokenizer], folder, environment)
    count = sum(_elements(path) for path in (folder / "model").glob("*.safetensors"))
    for stage, method in STAGES:
        settings = parameters(sequences, length, sequential=method == "wanda-sequential", texts=root / "data/prose")
        (folder / "params.yaml").write_text(json.dumps(settings))
        chosen = ["--pattern", PATTERN, "--method", method] if method else []
        peak, seconds = measured([*python, f"flows.{stage}", "--model", MODEL, *chosen], folder, environment)
        yield {"stage": stage, "method": method, "parameters": count, "peak_rss_bytes": peak, "seconds": round(seconds, 1)}


def _elements(path: Path) -> int:
    """Return how many bfloat16 entries a safetensors file has, from its header: the library is not imported here."""
    with path.open("rb") as file:
        return (path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")) // 2


def predict(shape: str, sequences: int, length: int) -> Iterator[tuple[str, float]]:
    """Yield what docs/memory.md's formulas say of a shape: stage and method, and GB apart from what Python and its libraries take."""
    import torch

    from permllm.benchmark.memory import SHAPES
    from permllm.calibration.samples import CalibrateConfig
    from permllm.calibration.texts import TextSource
    from permllm.footprint import ModelSize, assemble_needs, calibrate_needs, prune_needs
    from permllm.models.families import adapter_for
    from permllm.pruning.methods import PruningMethod

    shapes = {name: tensor for shard in SHAPES[shape].shards() for name, tensor in shard.items()}
    size = ModelSize.of(shapes, adapter_for("LlamaForCausalLM"), torch.bfloat16)
    config = CalibrateConfig(TextSource(files="none"), sequences, length, held_out=0)
    wanda, sparsegpt = PruningMethod("wanda"), PruningMethod(update="sparsegpt")
    stages = {
        "calibrate": calibrate_needs(size, config, "memory"),
        "calibrate, hidden_states: disk": calibrate_needs(size, config, "disk"),
        "prune wanda": prune_needs(size, wanda, False, config, "memory"),
        "prune sparsegpt": prune_needs(size, sparsegpt, False, config, "memory"),
        "prune wanda, sequential": prune_needs(size, wanda, True, config, "memory"),
        "prune sparsegpt, sequential": prune_needs(size, sparsegpt, True, config, "memory"),
        "assemble wanda": assemble_needs(size, None),
        "assemble sparsegpt": assemble_needs(size, "sparsegpt"),
    }
    for name, needs in stages.items():
        yield name, sum(need.nbytes for part in needs for need in part) / 1e9


def table(sequences: int = 128, length: int = 2048) -> str:
    """Return the extrapolated table of docs/memory.md."""
    shapes = ("1.1b", "7b", "13b", "70b")
    columns = [dict(predict(shape, sequences, length)) for shape in shapes]
    lines = [f"| stage | {' | '.join(shapes)} |", f"| --- |{' ---: |' * len(shapes)}"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(f'{column[name]:.1f}' for column in columns)} |" for name in columns[0])])


def main(argv: list[str] | None = None) -> None:
    """Measure the stages and write the rows; or print the extrapolated table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--shape", default="1.1b", help="see permllm/benchmark/memory.py")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="print the extrapolated table in GB, and measure nothing")
    chosen = parser.parse_args(argv)
    if chosen.table:
        print(table())
        return
    rows = []
    with TemporaryDirectory(prefix="permllm-memory-", dir=os.environ.get("TMPDIR")) as folder:
        for row in measure(Path(folder), chosen.shape, chosen.sequences, chosen.length):
            print(json.dumps(row), flush=True)
            rows.append(row)
            chosen.result.parent.mkdir(parents=True, exist_ok=True)
            chosen.result.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
