"""Compare pruning methods: one row per model, sparsity and method, as records and as a Markdown table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

BASELINE = "wanda"
DENSE = "dense"


@dataclass(frozen=True)
class Row:
    """What is known of one setting.

    Attributes:
        sparsity: the N:M pattern; the dense model is a row of every pattern it is compared in.
        gap_closed: how much of the perplexity that Wanda loses the method wins back, (wanda - method) / (wanda - dense).
        zero_shot: accuracy 0..1 by task.
        seconds: of all stages that made this row.
        stage_seconds: the same by stage.
        bytes: of the checkpoint's weight files.
        retained_score: share of the pruning metric's total that the masks keep; None for the dense model.
        update: how the kept weights got new values; None where they are those of the dense model.
        output_error: ||(W - pruned) X||^2 / ||W X||^2 on the calibration tokens, mean over the linear groups.
    """

    model: str
    sparsity: str
    method: str
    perplexity: float
    gap_closed: float | None
    zero_shot: Mapping[str, float]
    seconds: float
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    bytes: int = 0
    retained_score: float | None = None
    output_error: float | None = None
    update: str | None = None


def summarize(
    model: str, sparsity: str, metrics: Mapping[str, Mapping[str, Mapping[str, Any]]], updates: Mapping[str, str | None] | None = None
) -> list[Row]:
    """Make the rows of one model and pattern.

    Args:
        metrics: by method (`dense` first), then by stage, what the stages measured.
        updates: by method, how it gives the kept weights new values.
    """
    perplexities = {method: stages["evaluate"]["perplexity"] for method, stages in metrics.items()}
    return [
        _row(model, sparsity, method, stages, gap_closed(perplexities, method), (updates or {}).get(method)) for method, stages in metrics.items()
    ]


def gap_closed(perplexities: Mapping[str, float], method: str) -> float | None:
    """Return (wanda - method) / (wanda - dense) of perplexities, None without those two or without a gap.

    >>> gap_closed({"dense": 5.0, "wanda": 12.0, "permllm": 9.2}, "permllm")
    0.4
    """
    if not {BASELINE, DENSE} <= perplexities.keys() or perplexities[BASELINE] == perplexities[DENSE]:
        return None
    gap = perplexities[BASELINE] - perplexities[DENSE]
    return round((perplexities[BASELINE] - perplexities[method]) / gap, 4)


def _row(model: str, sparsity: str, method: str, stages: Mapping[str, Mapping[str, Any]], closed: float | None, update: str | None) -> Row:
    evaluated = stages["evaluate"]
    pruned = stages.get("prune") or stages.get("reconstruct") or {}
    seconds = {stage: round(record["seconds"], 2) for stage, record in stages.items()}
    return Row(
        model=model,
        sparsity=sparsity,
        method=method,
        perplexity=round(evaluated["perplexity"], 4),
        gap_closed=closed,
        zero_shot={task: round(result["acc"], 4) for task, result in evaluated["zero_shot"].items()},
        seconds=round(sum(seconds.values()), 2),
        stage_seconds=seconds,
        bytes=evaluated["bytes"],
        retained_score=pruned.get("retained_score"),
        output_error=pruned.get("output_error"),
        update=update,
    )


def records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows as plain records, for JSON."""
    return [asdict(row) for row in rows]


def markdown_table(rows: Sequence[Row], free: Mapping[str, str] | None = None) -> str:
    """Lay the rows out as one Markdown table per model and sparsity.

    Args:
        free: by method of the layout `foldable`, the same method under `free`; their difference follows the table.
    """
    tables = []
    for model, sparsity in dict.fromkeys((row.model, row.sparsity) for row in rows):
        part = [row for row in rows if (row.model, row.sparsity) == (model, sparsity)]
        tasks = list(dict.fromkeys(task for row in part for task in row.zero_shot))
        head = ["method", "new weights", "perplexity", "gap closed", *tasks, "output error", "seconds"]
        lines = [head, ["---", *["---:"] * (len(head) - 1)], *[_cells(row, tasks) for row in part]]
        tables.append("\n".join([f"**{model}, {sparsity}**", "", *(f"| {' | '.join(line)} |" for line in lines), *_folding_costs(part, free or {})]))
    return "\n\n".join(tables) + "\n"


def _folding_costs(rows: Sequence[Row], free: Mapping[str, str]) -> list[str]:
    """Say what the layout `foldable` costs, a line per method."""
    by_method = {row.method: row for row in rows}
    lines = []
    for method, other in free.items():
        folded, unbound = by_method[method], by_method[other]
        points = "" if folded.gap_closed is None else f", {100 * (unbound.gap_closed - folded.gap_closed):.0f} points of the gap less"
        lines.append(f"Foldable against free orders, {other}: {folded.perplexity - unbound.perplexity:+.2f} perplexity{points}.")
    return ["", *lines] if lines else []


def _cells(row: Row, tasks: Sequence[str]) -> list[str]:
    accuracies = [f"{row.zero_shot[task]:.1%}" if task in row.zero_shot else "" for task in tasks]
    closed = "" if row.gap_closed is None else f"{row.gap_closed:.0%}"
    error = "" if row.output_error is None else f"{row.output_error:.3f}"
    return [row.method, row.update or "", f"{row.perplexity:.2f}", closed, *accuracies, error, f"{row.seconds:.0f}"]


def latency_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay measured linears out as one Markdown table per device and pattern: dense, sparse, permutation and speed-up.

    Args:
        rows: records of `permllm.benchmark.linears`.

    Source: the layout of PermLLM (NeurIPS 2025), table 3.
    """
    measured = [row for row in rows if row["ms"] is not None]
    tables = []
    for device, dtype, pattern in dict.fromkeys((row["device"], row["dtype"], row["pattern"]) for row in measured):
        lines = [
            ["linear (out x in)", "tokens", "dense ms", "sparse ms", "with permutation ms", "permutation ms", "speed-up", "same kernel dense ms"]
        ]
        lines.append(["---", *["---:"] * (len(lines[0]) - 1)])
        part = [row for row in measured if (row["device"], row["dtype"], row["pattern"]) == (device, dtype, pattern)]
        for out, width, tokens in dict.fromkeys((row["out"], row["in"], row["tokens"]) for row in part):
            found = {row["kernel"]: row for row in part if (row["out"], row["in"], row["tokens"]) == (out, width, tokens)}
            lines += [_latency_cells(out, width, tokens, found, sparse) for sparse in ("packed", "semi_structured") if sparse in found]
        if len(lines) > 2:
            tables.append("\n".join([f"**{device}, {dtype}, {pattern}**", "", *(f"| {' | '.join(line)} |" for line in lines)]))
    return "\n\n".join(tables) + "\n"


def _latency_cells(out: int, width: int, tokens: int, found: Mapping[str, Mapping[str, Any]], sparse: str) -> list[str]:
    permuted, same = found[f"{sparse}+gather"], found.get("dense_matvec")
    milliseconds = [permuted["dense_ms"], found[sparse]["ms"], permuted["ms"], permuted["permutation_ms"]]
    return [
        f"{out} x {width}", str(tokens), *(f"{ms:.3f}" for ms in milliseconds), f"{permuted['speedup']:.2f}x",
        f"{same['ms']:.3f}" if same and sparse == "packed" else "",
    ]  # fmt: skip
