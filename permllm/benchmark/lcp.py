"""Time and memory of one training step of learned permutations, against a plain step and against the paper's algebra.

`python -m permllm.benchmark.lcp` measures on one random model and one batch, in one run:

- plain: forward and backward through the decoder layers, weight gradients included, as any mask learner needs them;
- paper: dense (in, in) permutation matrices, multiplied by score and mask, and a solver call for every block;
- ours: the same method as `permllm.lcp` does it. Both include Sinkhorn, the assignment and the optimiser's step;
- guided: a step of `recipe: best`, and apart from it, because it comes once an epoch, its round of moves.

The variants take turns, so that a machine that slows down slows all of them; every variant's memory is the peak of
a process of its own.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from permllm.artifacts import versions, write_json
from permllm.calibration.capture import run_layer
from permllm.calibration.statistics import ActivationStats
from permllm.lcp.group_permutations import GroupPermutation, LearnedGroups
from permllm.lcp.guided import GuidedGroups
from permllm.lcp.masked_linear import MaskedLinear, MaskRule, mask_layer, mask_rule
from permllm.lcp.objective import relative_error
from permllm.lcp.recipes import LearnConfig
from permllm.lookup import lookup
from permllm.memory import peak_host_bytes
from permllm.models.adapter import Heads
from permllm.models.families import adapter_of
from permllm.permutation.permutation import Permutation
from permllm.permutation.sinkhorn import sinkhorn
from permllm.pruning.layerwise import model_weights
from permllm.pruning.layout import SharedOrder, group_widths, shared_orders
from permllm.pruning.metrics import Score
from permllm.sparsity.mask import nm_mask
from permllm.sparsity.pattern import NMPattern

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedModel

PATTERN = NMPattern(2, 4)
VARIANTS = ("plain", "paper", "ours", "guided")
RESULTS = Path("data/benchmarks/lcp.json")


@dataclass(frozen=True)
class Shape:
    """A LLaMA and a batch: the sizes that decide time and memory.

    Attributes:
        batch, length: sequences of a step, and their tokens.
        recompute: whether every decoder layer is run again for its backward pass.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    batch: int
    length: int
    dtype: torch.dtype
    recompute: bool = False


SHAPES = {
    "small": Shape(1024, 2816, 4, 16, 8, 512, torch.float32),
    "7b-scaled": Shape(512, 1408, 32, 8, 2, 128, torch.bfloat16, recompute=True),  # an eighth as wide: its memory per weight, on any machine
    "7b": Shape(4096, 11008, 32, 32, 16, 1024, torch.bfloat16, recompute=True),
}
PAPER_STEPS = 50 * 128 // 16  # epochs, sequences, batch


@dataclass(frozen=True)
class Bench:
    """A random model, and a step of one variant on one batch.

    Attributes:
        round: what comes once an epoch; None for nothing.
    """

    model: "PreTrainedModel"
    step: Callable[[], None]
    round: Callable[[], Any] | None = None


class DenseLinear(nn.Module):
    """The paper's algebra: W * M with M = M^ P^T and S^ = S P, all P (in, in)."""

    def __init__(self, original: nn.Linear, score: Tensor, logits: nn.Parameter) -> None:
        super().__init__()
        self.original, self.score, self.logits = original, score, logits

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the masked weight; (..., in) to (..., out)."""
        soft = sinkhorn(self.logits, 1.0, 5)
        hard = torch.stack([self._harden(block) for block in soft.detach()])  # a copy and a solver call for every block
        matrix = torch.block_diag(*(hard + soft - soft.detach()))
        permuted = self.score @ matrix
        relaxed = permuted.unflatten(-1, (-1, PATTERN.group)).softmax(-1).flatten(-2)
        mask = (nm_mask(permuted, PATTERN).float() + relaxed - relaxed.detach()) @ matrix.t()
        return torch.nn.functional.linear(x, self.original.weight * mask.to(x.dtype))

    @staticmethod
    def _harden(block: Tensor) -> Tensor:
        _, columns = linear_sum_assignment(block.cpu().numpy(), maximize=True)
        return torch.eye(len(block), device=block.device)[torch.from_numpy(columns).to(block.device)]


def build(shape: Shape, device: torch.device, variant: str) -> Bench:
    """Make a random model and one variant's step on it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads, vocab_size=256, max_position_embeddings=shape.length, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(shape.dtype)
        try:
            model = LlamaForCausalLM(config).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(default)
        layers = adapter_of(model).layers(model)
        hidden = torch.randn(shape.batch, shape.length, shape.hidden, dtype=shape.dtype)
        target = torch.randn(shape.batch, shape.length, shape.hidden, dtype=shape.dtype)
        position = model.model.rotary_emb(hidden, torch.arange(shape.length)[None])
    keywords = {"attention_mask": None, "position_embeddings": position}

    def backward() -> None:
        state = hidden
        for layer in layers:
            state = checkpoint(run_layer, layer, state, keywords, use_reentrant=False) if shape.recompute else run_layer(layer, state, keywords)
        relative_error(state, target).backward()

    return STEPS[variant](model, backward)


def _plain(model: "PreTrainedModel", backward: Callable[[], None]) -> Bench:
    weights = [linear.weight.requires_grad_() for layer in adapter_of(model).layers(model) for linear in adapter_of(model).linears(layer).values()]

    def step() -> None:
        for weight in weights:
            weight.grad = None
        backward()

    return Bench(model, step)


def _paper(model: "PreTrainedModel", backward: Callable[[], None]) -> Bench:
    adapter = adapter_of(model)
    logits = []
    for layer in adapter.layers(model):
        for group in adapter.linear_groups.values():
            linears = [layer.get_submodule(path) for path in group.readers]
            blocks = linears[0].in_features // 64
            logits.append(nn.Parameter(torch.rand(blocks, 64, 64, device=model.device) * 2 - 1))
            for path, linear in zip(group.readers, linears, strict=True):
                layer.set_submodule(path, DenseLinear(linear, linear.weight.float().abs(), logits[-1]))
    optimizer = torch.optim.AdamW(logits, 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        backward()
        optimizer.step()

    return Bench(model, step)


def _ours(model: "PreTrainedModel", backward: Callable[[], None]) -> Bench:
    config = LearnConfig(logits="identity", mask_temperature=0.3, learning_rate=1e-3)
    groups = LearnedGroups(_starts(model), _shared(model), PATTERN, config, torch.Generator(), model.device)
    _mask(model, groups.layers, config)
    optimizer = torch.optim.AdamW(groups.parameters(), config.learning_rate)

    def step() -> None:
        groups.update(1.0)
        backward()
        groups.pull_back()
        optimizer.step()
        optimizer.zero_grad()

    return Bench(model, step)


def _guided(model: "PreTrainedModel", backward: Callable[[], None]) -> Bench:
    config = LearnConfig(optimizer="guided")
    groups = GuidedGroups(_starts(model), _shared(model), PATTERN, config, model.device)
    linears = _mask(model, groups.layers, config)
    flat = [linear for layer in linears for group in layer.values() for linear in group]
    curvature = {linear: torch.ones(linear.original.out_features, device=model.device) for linear in flat}
    for linear in flat:
        linear.collect_gradient()

    def move() -> None:
        statistics = (
            {name: ActivationStats(torch.eye(group[0].original.in_features, device=model.device), 1) for name, group in layer.items()}
            for layer in linears
        )
        groups.regroup(linears, statistics, curvature, config.moves, torch.Generator())

    return Bench(model, backward, move)


def _starts(model: "PreTrainedModel") -> list[dict[str, Permutation]]:
    adapter = adapter_of(model)
    return [
        {name: Permutation.identity(layer.get_submodule(group.readers[0]).in_features) for name, group in adapter.linear_groups.items()}
        for layer in adapter.layers(model)
    ]


def _shared(model: "PreTrainedModel") -> list[SharedOrder]:
    adapter = adapter_of(model)
    return shared_orders("free", adapter, group_widths(model_weights(model, adapter), adapter), Heads.of(model.config), PATTERN)


def _mask(model: "PreTrainedModel", permutations: Sequence[dict[str, GroupPermutation]], config: LearnConfig) -> list[dict[str, list[MaskedLinear]]]:
    """Put masked linears, scored by magnitude, in the place of all targets."""
    adapter = adapter_of(model)

    def rule_of(name: str, weight: Tensor) -> MaskRule:
        return mask_rule(weight, Score(torch.ones(weight.shape[1], device=weight.device)), PATTERN, config.mask_temperature)

    return [mask_layer(layer, adapter, groups, rule_of) for layer, groups in zip(adapter.layers(model), permutations, strict=True)]


STEPS = {"plain": _plain, "paper": _paper, "ours": _ours, "guided": _guided}


def time_steps(shape: Shape, device: torch.device, variants: Sequence[str], steps: int) -> dict[str, list[float]]:
    """Return the milliseconds of every step, by variant, and of `round`.

    The variants take turns. Before a step is timed the same variant makes one that is not: what another variant left in
    caches and in the allocator is not its doing, and training repeats one kind of step.
    """
    benches = {variant: build(shape, device, variant) for variant in variants}
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(steps):
        for variant, bench in benches.items():
            bench.step()
            times[variant].append(_milliseconds(bench.step, device))
    times["round"] = [_milliseconds(bench.round, device) for bench in benches.values() if bench.round]
    return times


def _milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    run()
    _wait(device)
    return (time.perf_counter() - started) * 1e3


def peak_memory(shape: Shape, device: torch.device, variant: str) -> dict[str, int]:
    """Return the bytes of the frozen weights and the peak of two steps of one variant. Call it in a process of its own."""
    bench = build(shape, device, variant)
    weights = sum(linear.weight.nbytes for linear in _linears(bench.model))
    for _ in range(2):
        bench.step()
    _wait(device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_host_bytes()
    return {"weight_bytes": weights, "peak_bytes": peak}


def _linears(model: "PreTrainedModel") -> list[nn.Linear]:
    return [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profile_steps(shape: Shape, device: torch.device, steps: int = 3) -> list[dict[str, Any]]:
    """Return where the time of our steps goes: the operations that take most of it, as shares."""
    bench = build(shape, device, "ours")
    bench.step()
    with torch.profiler.profile() as profile:
        for _ in range(steps):
            bench.step()
        _wait(device)
    attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(profile.key_averages(), key=lambda event: getattr(event, attribute), reverse=True)
    total = sum(getattr(event, attribute) for event in events)
    return [{"operation": event.key, "share": round(getattr(event, attribute) / total, 4)} for event in events[:12]]


def measure(name: str, device: torch.device, variants: Sequence[str], steps: int) -> dict[str, Any]:
    """Measure one shape: times, memory and profile, as a row of the results."""
    shape = lookup(SHAPES, name, "shape")
    memory = {variant: _in_own_process(name, device, variant) for variant in variants if variant != "paper"}
    times = time_steps(shape, device, variants, steps)
    row: dict[str, Any] = {"shape": name, **{key: str(value) for key, value in vars(shape).items()}, "device": _device_name(device)}
    row |= {"threads": torch.get_num_threads(), "steps": steps}
    row |= {f"{name}_ms": round(median(of), 1) for name, of in times.items() if of}
    if "plain" in times:
        row["ratio_ours_plain"] = round(_median_ratio(times["ours"], times["plain"]), 4)
        extra = memory["ours"]["peak_bytes"] - memory["plain"]["peak_bytes"]
        row |= {"extra_memory_bytes": extra, "extra_memory_fraction": round(extra / memory["ours"]["weight_bytes"], 4)}
    if "paper" in times:
        row["overhead_ratio"] = round((row["paper_ms"] - row["plain_ms"]) / (row["ours_ms"] - row["plain_ms"]), 2)
    row["ours_peak_bytes"] = memory["ours"]["peak_bytes"]
    if name == "7b":  # the paper's model and batch
        row["paper_budget_minutes"] = round(row["ours_ms"] * PAPER_STEPS / 6e4, 2)
    return {**row, "profile": profile_steps(shape, device)}


def _median_ratio(times: Sequence[float], others: Sequence[float]) -> float:
    return median(time / other for time, other in zip(times, others, strict=True))


def _in_own_process(name: str, device: torch.device, variant: str) -> dict[str, int]:
    command = [sys.executable, "-m", "permllm.benchmark.lcp", "--shape", name, "--device", str(device), "--memory-of", variant]
    # large tensors are handed back to the system at once, so that the peak is that of live tensors
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": "0"}
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and add the row to the results in place of an older one of the same shape and device."""
    parser = argparse.ArgumentParser(prog="python -m permllm.benchmark.lcp", description="Time and memory of one training step.")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of every variant")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    chosen = parser.parse_args(argv)
    if chosen.memory_of:
        print(json.dumps(peak_memory(SHAPES[chosen.shape], torch.device(chosen.device), chosen.memory_of)))
        return
    row = measure(chosen.shape, torch.device(chosen.device), chosen.variants, chosen.steps)
    row["command"] = " ".join(["python -m permllm.benchmark.lcp", *(sys.argv[1:] if argv is None else argv)])
    rows = json.loads(chosen.results.read_text()) if chosen.results.exists() else []
    rows = [other for other in rows if (other["shape"], other["device"]) != (row["shape"], row["device"])]
    write_json(chosen.results, [*rows, {**row, "versions": versions()}])
    print(json.dumps(row, indent=2))


if __name__ == "__main__":
    main()
