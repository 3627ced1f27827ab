"""The figures of the report, as PNG: perplexities, learning curves, masks side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from permllm.artifacts import replacing
from permllm.report.summary import DENSE, Row

DPI = 120
BLUE, ORANGE, GREY, LIGHT = "#2a6f97", "#e07a1f", "#6b7280", "#e5e7eb"


def perplexity_figure(rows: Sequence[Row]) -> Figure:
    """Draw the perplexity of every method of one model, a panel per sparsity, with the dense model as a line."""
    sparsities = list(dict.fromkeys(row.sparsity for row in rows))
    figure = Figure(figsize=(4.6 * len(sparsities), 3.6), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(sparsities), squeeze=False, sharey=True)[0]
    for axes, sparsity in zip(panels, sparsities, strict=True):
        dense = next(row.perplexity for row in rows if row.sparsity == sparsity and row.method == DENSE)
        pruned = [row for row in rows if row.sparsity == sparsity and row.method != DENSE]
        bars = axes.barh(
            [row.method for row in pruned],
            [row.perplexity for row in pruned],
            color=[BLUE if "permllm" in row.method else "#a9c5d6" for row in pruned],
        )
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
        axes.axvline(dense, color=ORANGE, linewidth=1.2)
        axes.set_xlim(left=dense * 0.9, right=max(row.perplexity for row in pruned) * 1.08)
        axes.set(title=f"{rows[0].model}, {sparsity} (line: dense, {dense:.1f})", xlabel="perplexity (the axis starts near dense)")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()  # shared by all panels; the first method on top
    return figure


def ablation_figure(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw how much of the gap every recipe and every changed switch closes: the mean over seeds, and each seed as a dot.

    Args:
        records: rows of the study, see `permllm.ablation`.
    """
    panels: dict[str, dict[str, list[float]]] = {}
    for record in records:
        around = f", around {record['around']}" if record["around"] else ""
        title = f"{record['model']}, {record['sparsity']}, {record['score']}{around}"
        name = (record["change"] or f"({record['around']})") if record["around"] else record["recipe"]
        name += f", {record['layout']}" if record["layout"] != "free" else ""
        panels.setdefault(title, {}).setdefault(name, []).append(100 * record["gap_closed"])
    heights = [len(rows) for rows in panels.values()]
    figure = Figure(figsize=(9, 0.28 * sum(heights) + 0.7 * len(panels) + 0.4), dpi=DPI, layout="constrained")
    axes_of_panels = figure.subplots(len(panels), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, (title, rows) in zip(axes_of_panels, panels.items(), strict=True):
        means = {name: sum(closed) / len(closed) for name, closed in rows.items()}
        colors = [
            BLUE if name.split(",")[0] in ("best", "(best)") else ORANGE if name.split(",")[0] in ("paper", "(paper)") else "#a9c5d6"
            for name in means
        ]
        axes.barh(list(means), list(means.values()), color=colors)
        for name, closed in rows.items():
            axes.plot(closed, [name] * len(closed), ".", color=GREY, markersize=4)
        axes.axvline(0, color=GREY, linewidth=0.8)
        axes.set_title(title, fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("% of the perplexity gap between Wanda and dense that is closed (bar: mean, dots: seeds)", fontsize=8)
    return figure


def objectives_figure(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw how much of the gap each permutation closes under each weight update: the mean over seeds, and each seed as a dot.

    Args:
        records: rows of the study, see `permllm.objectives`.
    """
    panels: dict[str, dict[str, dict[str, list[float]]]] = {}
    for record in records:
        name = record["objective"] + (f", {record['layout']}" if record["layout"] != "free" else "")
        panel = panels.setdefault(f"{record['model']}, {record['sparsity']}", {})
        panel.setdefault(f"update: {record['update']}", {}).setdefault(name, []).append(100 * record["gap_closed"])
    columns = max(len(panel) for panel in panels.values())
    rows = max(len(names) for panel in panels.values() for names in panel.values())
    figure = Figure(figsize=(3.1 * columns + 1.6, (0.28 * rows + 0.9) * len(panels)), dpi=DPI, layout="constrained")
    grid = figure.subplots(len(panels), columns, squeeze=False, sharey="row")
    for line, (title, panel) in zip(grid, panels.items(), strict=True):
        for axes in line[len(panel) :]:
            axes.set_axis_off()
        for axes, (update, permutations) in zip(line, panel.items(), strict=False):
            for name, closed in permutations.items():
                axes.barh(name, sum(closed) / len(closed), color=BLUE if "lcp" in name else "#a9c5d6")
                axes.plot(closed, [name] * len(closed), ".", color=GREY, markersize=4)
            axes.set_title(f"{title}, {update}", fontsize=8, loc="left")
            axes.tick_params(labelsize=7)
            axes.spines[["top", "right"]].set_visible(False)
        line[0].invert_yaxis()
    figure.supxlabel("% of the perplexity gap between Wanda and dense that is closed (bar: mean, dots: seeds)", fontsize=8)
    return figure


def speed_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the speed-up over the fastest dense product by the number of tokens, a panel per shape; at 1 nothing is gained.

    Args:
        rows: records of `permllm.benchmark.linears` of one device.
    """
    kernels = ("packed", "packed+gather", "semi_structured", "semi_structured+gather", "masked")
    drawn = [row for row in rows if row["kernel"] in kernels and row["ms"] is not None]
    shapes = list(dict.fromkeys((row["out"], row["in"]) for row in drawn))
    figure = Figure(figsize=(4.2 * len(shapes), 3.6), dpi=DPI, layout="constrained")
    for axes, shape in zip(figure.subplots(1, len(shapes), squeeze=False, sharey=True)[0], shapes, strict=True):
        part = [row for row in drawn if (row["out"], row["in"]) == shape]
        for kernel, pattern in dict.fromkeys((row["kernel"], row["pattern"]) for row in part):
            points = [(row["tokens"], row["speedup"]) for row in part if (row["kernel"], row["pattern"]) == (kernel, pattern)]
            color = GREY if kernel == "masked" else BLUE if pattern == "2:4" else ORANGE
            label = "zeros in a dense weight" if kernel == "masked" else f"{kernel}, {pattern}"
            axes.plot(*zip(*points, strict=True), "o--" if "gather" in kernel else "o-", color=color, label=label, linewidth=1.2, markersize=3)
        axes.axhline(1, color=GREY, linewidth=0.8)
        axes.set(title=f"{shape[0]} x {shape[1]}", xlabel="tokens", xscale="log")
        axes.grid(color=LIGHT, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel(f"speed-up over dense ({drawn[0]['device']}, {drawn[0]['dtype']})", fontsize=8)
    handles = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
    figure.axes[0].legend(handles.values(), handles.keys(), frameon=False, fontsize=7)
    return figure


def learning_figure(histories: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> Figure:
    """Draw the held-out (solid) and training (dotted) loss over the epochs; a dot marks the permutations kept.

    Args:
        histories: records of `EpochRecord`, by the name of the curve.
    """
    figure = Figure(figsize=(8, 3.8), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    colors = [BLUE, ORANGE, GREY, "#7b5ea7", "#3a8f5c", "#b23a48", "#c9a227", "#17a2b8"]
    for (name, history), color in zip(histories.items(), colors * len(histories), strict=False):
        epochs = [record["epoch"] for record in history]
        held_out = [record["held_out_loss"] for record in history]
        axes.plot(epochs, held_out, color=color, linewidth=1.4, label=name)
        axes.plot(epochs[1:], [record["training_loss"] for record in history[1:]], color=color, linewidth=1, linestyle=":")
        best = min(history, key=lambda record: record["held_out_loss"])
        axes.plot(best["epoch"], best["held_out_loss"], "o", color=color, markersize=5)
    axes.set(title=title, xlabel="epoch", ylabel="loss (of the recipe's own objective)", yscale="log")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(color=LIGHT, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def mask_figure(masks: Mapping[str, Tensor], title: str, size: int = 64) -> Figure:
    """Draw the first `size` rows and channels of masks side by side, kept weights dark.

    Args:
        masks: (out, in) bool in the original channel order, by method.
    """
    figure = Figure(figsize=(2.6 * len(masks), 3.1), dpi=DPI, layout="constrained")
    for axes, (method, mask) in zip(figure.subplots(1, len(masks), squeeze=False)[0], masks.items(), strict=True):
        axes.imshow(mask[:size, :size].numpy(), cmap="Blues", vmin=-0.15, vmax=1.2, interpolation="nearest")
        axes.set(title=method, xticks=[], yticks=[])
    figure.supxlabel(f"{title}: kept weights dark, {size} input channels across", fontsize=9)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, without the date that would make equal figures differ."""
    with replacing(path) as partial:
        figure.savefig(partial, format="png", metadata={"Software": None})
