"""Command `kernels`: what sparse linears and a packed model gain on this machine; results in data/benchmarks."""

import json
import logging
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from flows.command import run_command
from permllm.artifacts import versions, write_json, write_text
from permllm.assembly.packed import write_packed
from permllm.assembly.packed_model import load
from permllm.benchmark.decoding import DENSE, PACKED, DecodingConfig, measure_decoding, peak_bytes, random_sparse_model
from permllm.benchmark.linears import BenchmarkConfig, device_name, measure_linears
from permllm.models.loading import DTYPES, ModelSource, load_model, resolve_device
from permllm.report.figures import save_figure, speed_figure
from permllm.report.summary import latency_table
from permllm.sparsity.pattern import NMPattern

logger = logging.getLogger("permllm")
RESULTS = Path("data/benchmarks")
LLAMA_8B = ["4096x4096", "14336x4096", "4096x14336"]  # out x in: q and o, gate and up, down


def kernels(
    shapes: list[str],
    patterns: list[str],
    tokens: list[int],
    seconds: float,
    dtype: str,
    device: str,
    no_compile: bool,
    no_model: bool,
    results: Path,
) -> dict[str, Any]:
    """Measure what sparse linears and a packed model gain on this machine; earlier rows of the same device are replaced."""
    chosen, config = resolve_device(device), BenchmarkConfig(tuple(tokens), seconds, compile=not no_compile)
    sizes = {tuple(map(int, shape.split("x"))): 1 for shape in shapes}
    made_by = {"command": " ".join(["python -m flows.kernels", *sys.argv[1:]]), "versions": versions()}
    rows: list[dict[str, Any]] = []
    for pattern in patterns:
        for row in measure_linears(sizes, NMPattern.parse(pattern), DTYPES[dtype], chosen, config):
            rows.append({**row, **made_by})
            logger.info("%s %dx%d %s, %d tokens: %s", row["kernel"], row["out"], row["in"], pattern, row["tokens"], row["ms"] or row["unavailable"])
        if not no_model:
            rows += [{**row, **made_by} for row in _whole_model(pattern, dtype, chosen)]
    path = results / "kernels.json"
    others = json.loads(path.read_text()) if path.exists() else []
    rows = [*(row for row in others if row["device"] != device_name(chosen)), *rows]
    write_json(path, rows)
    linears = [row for row in rows if "kernel" in row]
    write_text(results / "kernels.md", latency_table(linears))
    save_figure(speed_figure([row for row in linears if row["device"] == device_name(chosen)]), results / "kernels.png")
    return {"rows": len(rows), "results": str(path)}


def _whole_model(pattern: str, dtype: str, device: torch.device) -> list[dict[str, Any]]:
    """Write a random model with N:M weights, pack it, and let both checkpoints generate."""
    with TemporaryDirectory() as folder:
        masked, packed = Path(folder, "masked"), Path(folder, "packed")
        name = random_sparse_model(masked, NMPattern.parse(pattern), DTYPES[dtype])
        write_packed(masked, packed, NMPattern.parse(pattern))
        models = {DENSE: load_model(ModelSource(str(masked), dtype, str(device))), PACKED: load(packed, str(device))}
        rows = measure_decoding(models, name, pattern, DecodingConfig())
        peaks = {f"{prefix}peak_bytes": peak_bytes(path, str(device), dtype) for prefix, path in (("", packed), ("dense_", masked))}
        return [{**row, **peaks} for row in rows]


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    arguments = {
        "--shapes": {"nargs": "+", "default": LLAMA_8B, "metavar": "OUTxIN"},
        "--patterns": {"nargs": "+", "default": ["2:4", "4:8"]},
        "--tokens": {"nargs": "+", "type": int, "default": [1, 4, 8, 16, 128, 1024, 4096]},
        "--seconds": {"type": float, "default": 1.0, "help": "measured per kernel and token count"},
        "--dtype": {"choices": sorted(DTYPES), "default": "bfloat16"},
        "--device": {"default": "auto"},
        "--no-compile": {"action": "store_true", "help": "do not compile the dense product"},
        "--no-model": {"action": "store_true", "help": "linears only"},
        "--results": {"type": Path, "default": RESULTS},
    }
    run_command("kernels", kernels, arguments, argv)


if __name__ == "__main__":
    main()
