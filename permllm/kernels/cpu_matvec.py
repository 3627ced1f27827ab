"""Packed N:M weights times a few tokens on a CPU, for decoding, where reading the weight is what takes time.

For many tokens `expand` makes the weight dense. `cpu_matvec.c` is compiled on first use and kept in the user's cache. Where it
cannot be, PyTorch computes the same.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from permllm.sparsity.packed import PackedWeight

logger = logging.getLogger(__name__)

SOURCES = tuple(Path(__file__).with_name(name) for name in ("cpu_matvec.c", "cpu_matvec_rows.h", "cpu_expand_rows.h"))
COMPILERS = ("cc", "gcc", "clang")  # tried after $CC
FLAGS = ("-O2", "-std=gnu11", "-fPIC", "-shared", "-w")
TYPES = {torch.float32: 0, torch.bfloat16: 1}  # enum work in cpu_matvec.c
EXPANDED_TYPES = {torch.float32: 2, torch.bfloat16: 3, torch.float16: 3}  # the same
REFERENCE = "reference"  # the name of PyTorch among the instruction sets


class KernelUnavailableError(RuntimeError):
    """The kernel cannot be compiled or loaded here; the message says what is missing."""


def why_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the kernel cannot run on such tensors here, or None if it can. Compiles it on first use, which takes seconds."""
    if device.type != "cpu":
        return f"the CPU kernel needs tensors on the CPU, not on {device.type}"
    if dtype not in TYPES:
        return f"the CPU kernel runs float32 and bfloat16, not {dtype}"
    return _library()[1]


@functools.cache
def instruction_sets(dtype: torch.dtype) -> tuple[str, ...]:
    """Return what can multiply here with weights of a type, in the order of preference.

    Of `avx512_bf16` (bfloat16 only), `avx512`, `avx2` and `portable` those that the processor has, if the kernel is available;
    then `reference`, which is `reference_matvec`. `portable` is slower than a dense product in PyTorch.
    """
    return _variants(TYPES.get(dtype))


@functools.cache
def expanding_instruction_sets(dtype: torch.dtype) -> tuple[str, ...]:
    """Return what can make a packed weight of a type dense here, in the order of preference.

    Of `avx512_vbmi2` (16-bit types only), `avx512` (float32 only), `avx2` and `portable` those that the processor has, if the
    kernel is available; then `reference`, which is `PackedWeight.dense`.
    """
    return _variants(EXPANDED_TYPES.get(dtype))


def _variants(work: int | None) -> tuple[str, ...]:
    """Return the instruction sets that do a work of the C kernel, and PyTorch."""
    library = None if work is None else _library()[0]
    names = []
    while library is not None and (name := library.variant_name(work, len(names))) is not None:
        names.append(name.decode())
    return (*names, REFERENCE)


def matvec(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, instruction_set: str | None = None) -> Tensor:
    """Multiply activations with a packed weight, reading the weight once for eight tokens. There are no gradients.

    Sums are in float32 and results are rounded to the nearest; `avx512_bf16` takes denormal numbers for zero. It runs on
    `torch.get_num_threads()` threads of PyTorch's own OpenMP pool, or on one thread if the process has no OpenMP.

    Args:
        x: (..., in), float32 or bfloat16, on the CPU.
        weight: of x's type.
        bias: (out,), of x's type.
        instruction_set: one of `instruction_sets`; the first if None. Where the kernel is unavailable that is PyTorch, after
            a warning in the log.

    Returns:
        (..., out), of x's type.

    Raises:
        ValueError: if types, devices or shapes do not fit each other, a gradient is asked for, or the instruction set is not
            available.
    """
    _check(x, weight.values, weight.in_channels, bias)
    instruction_set = _choose(instruction_set, instruction_sets(x.dtype), x.dtype)
    if instruction_set == REFERENCE or 0 in (x.numel(), weight.values.numel()):
        return reference_matvec(x, weight, bias)
    return _run(x, weight.values, weight.bits, bias, instruction_set)


def dense_matvec(x: Tensor, weight: Tensor, bias: Tensor | None = None, instruction_set: str | None = None) -> Tensor:
    """Multiply with a dense weight, (out, in), by the same loop as `matvec`: their difference is what the packing gains."""
    _check(x, weight, weight.shape[-1], bias)
    instruction_set = _choose(instruction_set, instruction_sets(x.dtype), x.dtype)
    if instruction_set == REFERENCE or 0 in (x.numel(), weight.numel()):
        return _linear(x, weight, bias)
    return _run(x, weight, None, bias, instruction_set)


def reference_matvec(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Compute what `matvec` means: unpack the weight, which is slow, multiply in float32, round."""
    return _linear(x, weight.dense(), bias)


def expand(weight: PackedWeight, instruction_set: str | None = None) -> Tensor:
    """Return `weight.dense()`, bit for bit but without gradients, as fast as memory is written. Threads are those of `matvec`.

    Args:
        weight: on the CPU; types other than float32, bfloat16 and float16 run in PyTorch.
        instruction_set: one of `expanding_instruction_sets`; the first if None.

    Raises:
        ValueError: if the weight is not on the CPU, a gradient is asked for, or the instruction set is not available.
    """
    values, bits = weight.values.contiguous(), weight.bits.contiguous()
    if not (values.is_cpu and bits.is_cpu):
        raise ValueError(f"the CPU kernel expands weights on the CPU, not values on {values.device} and bits on {bits.device}")
    _check_gradients({"weight": values})
    instruction_set = _choose(instruction_set, expanding_instruction_sets(values.dtype), values.dtype)
    if instruction_set == REFERENCE or values.numel() == 0:
        return weight.dense()
    dense = values.new_empty(weight.shape)
    sizes = (*weight.shape, values.shape[1])
    work, pointers = EXPANDED_TYPES[values.dtype], (values.data_ptr(), bits.data_ptr(), dense.data_ptr())
    if _library()[0].expand(instruction_set.encode(), work, _parallel(), torch.get_num_threads(), *pointers, *sizes):
        raise RuntimeError(f"the CPU kernel has no {instruction_set} for {values.dtype}")
    return dense


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def _check(x: Tensor, weight: Tensor, in_channels: int, bias: Tensor | None) -> None:
    """Refuse what the kernel would misread."""
    tensors = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    if x.dtype not in TYPES or any(tensor.dtype != x.dtype or not tensor.is_cpu for tensor in tensors.values()):
        given = ", ".join(f"{name} {tensor.dtype} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"the CPU kernel needs tensors on the CPU that are all float32 or all bfloat16, not {given}")
    if weight.dim() != 2 or x.shape[-1:] != (in_channels,):
        raise ValueError(f"a weight (out, {in_channels}) needs activations (..., {in_channels}), not {tuple(x.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"a weight of {len(weight)} output channels needs a bias ({len(weight)},), not {tuple(bias.shape)}")
    _check_gradients(tensors)


def _check_gradients(tensors: dict[str, Tensor]) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values()):
        raise ValueError("the CPU kernel has no gradients; call it under torch.inference_mode() or torch.no_grad()")


def _choose(instruction_set: str | None, available: tuple[str, ...], dtype: torch.dtype) -> str:
    if instruction_set is not None and instruction_set not in available:
        raise ValueError(f"instruction set {instruction_set!r} is not available for {dtype} here; choose from {', '.join(available)}")
    return instruction_set or available[0]


def _run(x: Tensor, values: Tensor, bits: Tensor | None, bias: Tensor | None, instruction_set: str) -> Tensor:
    """Call the kernel, which wants contiguous tensors. Written for speed: in a small layer this takes longer than the product."""
    library, _ = _library()
    x, values = x.contiguous(), values.contiguous()
    bits = None if bits is None else bits.contiguous()
    bias = None if bias is None else bias.contiguous()
    out_channels, row_values = values.shape
    *batch, in_channels = x.shape
    y = x.new_empty((*batch, out_channels))
    failed = library.matvec(
        instruction_set.encode(),
        TYPES[x.dtype],
        _parallel(),
        torch.get_num_threads(),
        x.data_ptr(),
        values.data_ptr(),
        None if bits is None else bits.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.numel() // in_channels,
        out_channels,
        in_channels,
        row_values,
    )
    if failed:
        raise RuntimeError(f"the CPU kernel has no {instruction_set} for {x.dtype}")
    return y


@functools.cache
def _parallel() -> int | None:
    """Return the address of GOMP_parallel in the OpenMP runtime that PyTorch has loaded: a second one would fight with it."""
    function = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    return None if function is None else ctypes.cast(function, ctypes.c_void_p).value


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str | None]:
    """Return the compiled kernel, or None and why there is none, which is also logged, once."""
    try:
        return _load(_compiled()), None
    except (KernelUnavailableError, OSError) as error:
        reason = f"the CPU kernel for packed weights is not available: {error}"
        logger.warning("%s; PyTorch computes the products instead, more slowly than with dense weights", reason)
        return None, reason


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    number, pointer, size = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
    library.variant_name.argtypes, library.variant_name.restype = [number, number], ctypes.c_char_p
    library.matvec.argtypes = [ctypes.c_char_p, number, pointer, number, *[pointer] * 5, *[size] * 4]
    library.expand.argtypes = [ctypes.c_char_p, number, pointer, number, *[pointer] * 3, *[size] * 3]
    return library


def _compiled() -> Path:
    """Return the shared library in the user's cache, compiled if this source, compiler and machine are new to it.

    Raises:
        KernelUnavailableError: if there is no compiler or all fail.
        OSError: if the cache cannot be written.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "permllm"
    failures = []
    for compiler in _compilers():
        version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
        made_from = [*(source.read_text() for source in SOURCES), *compiler, version, *FLAGS, platform.machine()]
        path = cache / f"cpu_matvec-{hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]}.so"
        if path.exists():
            return path
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:  # on the same file system, and no other process's
            partial = Path(folder) / path.name
            finished = subprocess.run([*compiler, *FLAGS, str(SOURCES[0]), "-o", str(partial)], capture_output=True, text=True, check=False)
            if finished.returncode == 0:
                os.replace(partial, path)
                return path
        failures.append(f"{shlex.join(compiler)} failed: {finished.stderr.strip()[-400:]}")
    raise KernelUnavailableError("; ".join(failures) or f"no C compiler ($CC, {', '.join(COMPILERS)}) is on the PATH, install gcc or clang")


def _compilers() -> list[list[str]]:
    """Return the commands of the compilers that exist, $CC first."""
    commands = [shlex.split(os.environ.get("CC", "")), *([name] for name in COMPILERS)]
    return [[path, *command[1:]] for command in commands if command and (path := shutil.which(command[0]))]
