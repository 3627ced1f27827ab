"""Latency and memory of every distinct linear shape of a model: dense against what this machine can run sparse."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.benchmark import Timer

from permllm.kernels.channel_gather import gather_channels, multiply_by_matrix
from permllm.kernels.semi_structured import pack_semi_structured, why_unavailable
from permllm.permutation.permutation import Permutation
from permllm.sparsity.mask import nm_mask
from permllm.sparsity.pattern import NMPattern


@dataclass(frozen=True)
class BenchmarkConfig:
    """Settings of the benchmark.

    Attributes:
        tokens: batch sizes in tokens, 1 for decoding, 2048 for a prompt.
        seconds: measured per row, after a warm-up of the same code.

    Raises:
        ValueError: if there is nothing to measure.
    """

    tokens: tuple[int, ...] = (1, 16, 128, 2048)
    seconds: float = 0.2

    def __post_init__(self) -> None:
        if not self.tokens or min(self.tokens) < 1 or not self.seconds > 0:
            raise ValueError(f"benchmark needs token counts of 1 or more and seconds above 0, not {self.tokens} and {self.seconds}")


@dataclass(frozen=True)
class LatencyRow:
    """One measurement.

    Attributes:
        kernel: `dense`, `masked` (zeros in a dense weight), `gather` and `permutation_matrix` (the permutation
            alone), or `semi_structured` (2:4 on sparse tensor cores, permutation included).
        linears: how many linears of the model have this shape.
        memory_bytes: what the kernel keeps in memory: weight, order or matrix.
        latency_ms, lower_ms, upper_ms: median and quartiles; None if unavailable.
        speedup: latency of `dense` by latency of this; None for the permutation alone.
        unavailable: why this machine cannot run the kernel; None if it can.
    """

    kernel: str
    out_channels: int
    in_channels: int
    linears: int
    tokens: int
    memory_bytes: int | None = None
    latency_ms: float | None = None
    lower_ms: float | None = None
    upper_ms: float | None = None
    speedup: float | None = None
    unavailable: str | None = None


def measure_linears(
    shapes: Mapping[tuple[int, int], int], pattern: NMPattern, dtype: torch.dtype, device: torch.device, config: BenchmarkConfig
) -> Iterator[dict]:
    """Measure every shape at every token count, on random weights and activations.

    Args:
        shapes: (out, in) of the linears, and how many there are of each.

    Yields:
        A record of a `LatencyRow` per kernel.
    """
    for (out_channels, in_channels), linears in shapes.items():
        generator = torch.Generator().manual_seed(0)
        permutation = Permutation(torch.randperm(in_channels, generator=generator).to(device))
        weight = torch.randn(out_channels, in_channels, generator=generator).to(device, dtype)
        masked = weight * nm_mask(weight.abs(), pattern)
        kernels = _kernels(weight, masked, permutation)
        reason = why_unavailable(device, dtype, pattern, out_channels, in_channels)
        if reason is None:
            packed = pack_semi_structured(masked)
            kernels["semi_structured"] = (
                lambda x, packed=packed, order=permutation: linear(gather_channels(x, order), packed),
                masked.nbytes * 9 // 16,
            )
        for tokens in config.tokens:
            x = torch.randn(tokens, in_channels, generator=generator).to(device, dtype)
            row = {"out_channels": out_channels, "in_channels": in_channels, "linears": linears, "tokens": tokens}
            dense_ms = None
            for kernel, (run, memory_bytes) in kernels.items():
                lower, median, upper = _quartiles_ms(lambda run=run, x=x: run(x), config.seconds)
                dense_ms = dense_ms or median
                speedup = None if kernel in ("gather", "permutation_matrix") else dense_ms / median
                yield asdict(LatencyRow(kernel, **row, memory_bytes=memory_bytes, latency_ms=median, lower_ms=lower, upper_ms=upper, speedup=speedup))
            if reason is not None:
                yield asdict(LatencyRow("semi_structured", **row, unavailable=reason))


def _kernels(weight: Tensor, masked: Tensor, permutation: Permutation) -> dict[str, tuple[Callable[[Tensor], Tensor], int]]:
    """What runs on any machine, and the bytes it keeps; `dense` first, the others are compared with it."""
    matrix = permutation.matrix(weight.dtype)
    return {
        "dense": (lambda x: linear(x, weight), weight.nbytes),
        "masked": (lambda x: linear(x, masked), masked.nbytes),
        "gather": (lambda x: gather_channels(x, permutation), permutation.order.nbytes),
        "permutation_matrix": (lambda x: multiply_by_matrix(x, matrix), matrix.nbytes),
    }


def _quartiles_ms(run: Callable[[], Tensor], seconds: float) -> tuple[float, float, float]:
    """Time a function after a warm-up; the timer synchronises with a GPU."""
    with torch.inference_mode():
        timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        timer.timeit(3)
        times = timer.blocked_autorange(min_run_time=seconds).times
    return tuple((torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)) * 1e3).tolist())
