"""Latency of linear shapes: dense, packed, on sparse tensor cores, and what the permutation of the input costs.

Every kernel is timed on weights that it has not touched for a while: copies take turns until they exceed the caches.
The kernels take turns too, so that a machine that slows down slows all of them. What they compute is compared with the
masked dense product first.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from permllm.kernels import cpu_matvec, gpu_matvec
from permllm.kernels.channel_gather import gather_channels, multiply_by_matrix
from permllm.kernels.packed_linear import CPU_MATVEC, MOST_DECODED_TOKENS, PackedLinear
from permllm.kernels.semi_structured import pack_semi_structured, why_unavailable
from permllm.permutation.permutation import Permutation
from permllm.sparsity.mask import nm_mask
from permllm.sparsity.packed import PackedWeight, pack_weight
from permllm.sparsity.pattern import NMPattern

ROTATED_BYTES = 2**28  # of the copies of a weight that take turns: several times the caches of today's processors
MOST_COPIES = 64
LEAST_ROUNDS = 5
LARGEST_MATRIX = 2**27  # bytes of a permutation matrix that is still measured
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}  # of the largest output


@dataclass(frozen=True)
class BenchmarkConfig:
    """Settings of the benchmark.

    Attributes:
        tokens: batch sizes in tokens, 1 for decoding, 2048 for a prompt.
        seconds: measured per kernel and batch size, after a warm-up of the same code.
        compile: also measure the dense product compiled with frozen weights, for the few tokens of decoding, where it
            is faster; takes a compiler and many seconds.

    Raises:
        ValueError: if there is nothing to measure.
    """

    tokens: tuple[int, ...] = (1, 16, 128, 2048)
    seconds: float = 0.2
    compile: bool = False

    def __post_init__(self) -> None:
        if not self.tokens or min(self.tokens) < 1 or not self.seconds > 0:
            raise ValueError(f"benchmark needs token counts of 1 or more and seconds above 0, not {self.tokens} and {self.seconds}")


@dataclass(frozen=True)
class Kernel:
    """Something that can be timed.

    Attributes:
        run: (copy, activations) -> outputs.
        memory_bytes: what it keeps in memory.
        permutes: whether the permutation of the input is part of it.
        calls: products that one call of `run` makes.
    """

    run: Callable[[int, Tensor], Any]
    memory_bytes: int
    permutes: bool = False
    calls: int = 1


@dataclass(frozen=True)
class Row:
    """One measurement, per product.

    Attributes:
        kernel: `dense`, `dense_compiled`, `dense_matvec` (the packed kernel's loop on the dense weight), `masked` (zeros in
            a dense weight), `packed` (as `PackedLinear` does it) and `packed+gather`, `semi_structured` and `semi_structured+gather` (2:4 on sparse
            tensor cores); `gather` and `permutation_matrix` are the permutation alone.
        runs: which code really ran.
        linears: how many linears of the model have this shape.
        ms, lower_ms, upper_ms: median and quartiles; None if unavailable.
        dense_ms: of the fastest dense product of PyTorch, compiled or not, in the same run.
        speedup: dense_ms by ms; None for the permutation alone.
        permutation_ms: of the gather alone, where it is part of the kernel.
        error: largest difference from the masked dense product in float32, by its largest output.
        unavailable: why this machine cannot run the kernel; None if it can.
    """

    kernel: str
    out: int
    in_: int
    linears: int
    tokens: int
    pattern: str
    dtype: str
    device: str
    runs: str | None = None
    memory_bytes: int | None = None
    ms: float | None = None
    lower_ms: float | None = None
    upper_ms: float | None = None
    dense_ms: float | None = None
    speedup: float | None = None
    permutation_ms: float | None = None
    error: float | None = None
    unavailable: str | None = None

    def record(self) -> dict[str, Any]:
        """Return it as a plain record."""
        return {name.rstrip("_"): round(value, 6) if isinstance(value, float) else value for name, value in asdict(self).items()}


@torch.inference_mode()
def measure_linears(
    shapes: Mapping[tuple[int, int], int], pattern: NMPattern, dtype: torch.dtype, device: torch.device, config: BenchmarkConfig
) -> Iterator[dict[str, Any]]:
    """Measure every shape at every token count, on random weights and activations.

    Args:
        shapes: (out, in) of the linears, and how many there are of each.

    Yields:
        The record of a `Row` per kernel.

    Raises:
        ArithmeticError: if a kernel does not compute the masked dense product.
    """
    for (out_channels, in_channels), linears in shapes.items():
        bench = _Bench(out_channels, in_channels, pattern, dtype, device)
        for tokens in config.tokens:
            shared = (out_channels, in_channels, linears, tokens, str(pattern), str(dtype).removeprefix("torch."), device_name(device))
            yield from (row.record() for row in bench.measure(tokens, config, shared))


class _Bench:
    """The weights of one shape, in as many copies as exceed the caches."""

    def __init__(self, out_channels: int, in_channels: int, pattern: NMPattern, dtype: torch.dtype, device: torch.device) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.pattern, self.dtype, self.device = pattern, dtype, device
        weight = torch.randn(out_channels, in_channels, generator=self.generator).to(dtype)
        masked = weight.masked_fill(~nm_mask(weight.float().abs(), pattern), 0.0)
        self.copies = min(max(-(-ROTATED_BYTES // weight.nbytes), 2), MOST_COPIES)
        self.permutation = Permutation(torch.randperm(in_channels, generator=self.generator).to(device))
        self.dense, self.masked, packed = weight.to(device), masked.to(device), pack_weight(masked, pattern).to(device)
        self.weights = [self.dense.clone() for _ in range(self.copies)]
        self.zeroed = [self.masked.clone() for _ in range(self.copies)]
        self.packed = [PackedLinear(PackedWeight(packed.values.clone(), packed.bits.clone(), pattern, in_channels)) for _ in range(self.copies)]
        reason = cpu_matvec.why_unavailable(device, dtype) if device.type == "cpu" else gpu_matvec.why_unavailable(packed, device)
        self.why_not = {"packed": reason, "semi_structured": why_unavailable(device, dtype, pattern, out_channels, in_channels)}
        self.semi_structured = [] if self.why_not["semi_structured"] else [pack_semi_structured(self.masked.clone()) for _ in range(self.copies)]

    def measure(self, tokens: int, config: BenchmarkConfig, shared: tuple) -> Iterator[Row]:
        x = torch.randn(tokens, self.permutation.order.numel(), generator=self.generator).to(self.device, self.dtype)
        kernels = self._kernels(tokens)
        if config.compile and tokens <= MOST_DECODED_TOKENS:
            kernels["dense_compiled"] = self._compiled(x)
        errors = {name: self._check(name, kernel, x) for name, kernel in kernels.items()}
        times = _time({name: partial(kernel.run, x=x) for name, kernel in kernels.items()}, self.copies, self.device, config.seconds)
        times = {name: [ms / kernels[name].calls for ms in measured] for name, measured in times.items()}
        medians = {name: quantiles(measured, n=4) for name, measured in times.items()}
        dense_ms = min(medians[name][1] for name in ("dense", "dense_compiled") if name in medians)
        for name, kernel in kernels.items():
            lower, ms, upper = medians[name]
            speedup = None if name in ("gather", "permutation_matrix") else dense_ms / ms
            permutation_ms = medians["gather"][1] if kernel.permutes else None
            yield Row(name, *shared, self._runs(name, tokens), kernel.memory_bytes, ms, lower, upper, dense_ms, speedup, permutation_ms, errors[name])
        for name, reason in self.why_not.items():
            if reason is not None:
                yield Row(name, *shared, unavailable=reason)

    def _kernels(self, tokens: int) -> dict[str, Kernel]:
        gather, order = partial(gather_channels, permutation=self.permutation), self.permutation.order.nbytes
        kernels = {
            "dense": Kernel(lambda copy, x: linear(x, self.weights[copy]), self.dense.nbytes),
            "masked": Kernel(lambda copy, x: linear(x, self.zeroed[copy]), self.masked.nbytes),
            "gather": Kernel(lambda copy, x: gather(x), order, permutes=True),
        }
        channels = len(self.permutation)
        if channels**2 * self.dense.element_size() <= LARGEST_MATRIX:
            matrix = self.permutation.matrix(self.dtype)
            kernels["permutation_matrix"] = Kernel(lambda copy, x: multiply_by_matrix(x, matrix), matrix.nbytes, permutes=True)
        products: dict[str, tuple[Callable[[int, Tensor], Tensor], int]] = {}
        if self.why_not["packed"] is None:
            products["packed"] = (lambda copy, x: self.packed[copy](x)), self.packed[0].packed.nbytes
            if self.device.type == "cpu" and tokens <= MOST_DECODED_TOKENS:
                kernels["dense_matvec"] = Kernel(lambda copy, x: cpu_matvec.dense_matvec(x, self.weights[copy]), self.dense.nbytes)
        if self.semi_structured:
            products["semi_structured"] = (lambda copy, x: linear(x, self.semi_structured[copy])), self.masked.nbytes * 9 // 16
        for name, (run, memory_bytes) in products.items():
            kernels[name] = Kernel(run, memory_bytes)
            kernels[f"{name}+gather"] = Kernel(lambda copy, x, run=run: run(copy, gather(x)), memory_bytes + order, permutes=True)
        return kernels

    def _compiled(self, x: Tensor) -> Kernel:
        """Compile the products with all copies as one graph: with frozen weights, each copy would need a graph of its own."""
        import torch._inductor.config as inductor

        chain = _Chain(self.weights).eval()
        with inductor.patch(freezing=True):
            compiled = torch.compile(chain)
            compiled(x)
        return Kernel(lambda copy, x: compiled(x), self.dense.nbytes, calls=self.copies)

    def _check(self, name: str, kernel: Kernel, x: Tensor) -> float | None:
        """Compare a kernel with its meaning in float32.

        Raises:
            ArithmeticError: if it computes something else.
        """
        if name in ("gather", "permutation_matrix"):
            return None
        weight = self.dense if name.startswith("dense") else self.masked
        given = self.permutation.apply(x) if kernel.permutes else x
        expected, found = linear(given.float(), weight.float()), kernel.run(0, x)
        found = found[0] if isinstance(found, Sequence) else found
        error = float((found.float() - expected).abs().max() / expected.abs().max())
        if not error <= TOLERANCE[self.dtype]:
            raise ArithmeticError(f"{name} of shape {tuple(weight.shape)} and {len(x)} tokens is off by {error:.2g} of its largest output")
        return error

    def _runs(self, name: str, tokens: int) -> str:
        if name.startswith("packed"):
            kernel = self.packed[0].kernel(tokens)
            return f"{kernel}, {cpu_matvec.instruction_sets(self.dtype)[0]}" if kernel == CPU_MATVEC else kernel
        if name == "dense_matvec":
            return f"{CPU_MATVEC}, {cpu_matvec.instruction_sets(self.dtype)[0]}"
        if name.startswith("semi_structured"):
            return type(self.semi_structured[0]).__name__
        return "torch.compile, frozen weights" if name == "dense_compiled" else "PyTorch"


class _Chain(nn.Module):
    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(weight, requires_grad=False) for weight in weights])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [linear(x, weight) for weight in self.weights]


def _time(runs: Mapping[str, Callable[[int], Any]], copies: int, device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Return milliseconds by name; the functions take turns, and each goes through the copies in its own time.

    On a GPU a measurement spans a turn through all copies, so that launching is not what is measured.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    spent, turn = dict.fromkeys(runs, 0.0), 0
    for run in runs.values():
        run(0)
    calls = copies if device.type == "cuda" else 1
    while turn < LEAST_ROUNDS or min(spent.values()) < seconds:
        for name, run in runs.items():
            if turn >= LEAST_ROUNDS and spent[name] >= seconds:
                continue
            milliseconds = _elapsed_ms(run, range(turn * calls, (turn + 1) * calls), copies, device)
            times[name].append(milliseconds / calls)
            spent[name] += milliseconds / 1e3
        turn += 1
    return times


def _elapsed_ms(run: Callable[[int], Any], calls: range, copies: int, device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        for call in calls:
            run(call % copies)
        return (time.perf_counter() - started) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for call in calls:
        run(call % copies)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def device_name(device: torch.device) -> str:
    """Return what results say of the machine."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
