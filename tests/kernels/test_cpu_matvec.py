import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from permllm.kernels import cpu_matvec
from permllm.kernels.cpu_matvec import dense_matvec, expand, expanding_instruction_sets, instruction_sets, matvec, reference_matvec, why_unavailable
from permllm.sparsity.mask import nm_mask
from permllm.sparsity.packed import PackedWeight, pack_weight
from permllm.sparsity.pattern import NMPattern

PATTERNS = ["2:4", "4:8", "1:4", "3:5", "8:32", "1:2"]
IN_CHANNELS = [8, 12, 20, 172, 352, 1000, 4096]
VARIANTS = [
    (dtype, name)
    for dtype in (torch.float32, torch.bfloat16)
    for name in ("avx512_bf16", "avx512", "avx2", "portable", "reference")
    if (dtype, name) != (torch.float32, "avx512_bf16")
]
EXPANDING_VARIANTS = [
    (dtype, name)
    for dtype, first in ((torch.float32, "avx512"), (torch.bfloat16, "avx512_vbmi2"), (torch.float16, "avx512_vbmi2"))
    for name in (first, "avx2", "portable", "reference")
]
each_expanding_variant = pytest.mark.parametrize(
    ("dtype", "instruction_set"), EXPANDING_VARIANTS, ids=[f"{name}-{str(dtype)[6:]}" for dtype, name in EXPANDING_VARIANTS]
)
each_variant = pytest.mark.parametrize(("dtype", "instruction_set"), VARIANTS, ids=[f"{name}-{str(dtype)[6:]}" for dtype, name in VARIANTS])


def forget():
    cpu_matvec._library.cache_clear()
    instruction_sets.cache_clear()
    expanding_instruction_sets.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """The kernel compiled once, outside the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        forget()
        reason = why_unavailable(torch.device("cpu"), torch.float32)
        if reason is not None:
            pytest.skip(reason)
        yield Path(cpu_matvec._library()[0]._name)
    forget()


@pytest.fixture
def afresh(monkeypatch, tmp_path):
    """As in a new process: nothing loaded, an empty cache, and only the compilers put into the folder that is returned."""
    forget()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    yield tmp_path
    forget()


def skip_unless_available(dtype, instruction_set, available=instruction_sets):
    if instruction_set not in available(dtype):
        pytest.skip(f"this processor has no {instruction_set}")


def packed_weight(out_channels, in_channels, pattern="2:4", dtype=torch.float32):
    pattern = NMPattern.parse(pattern)
    weight = torch.randn(out_channels, in_channels).to(dtype)
    return pack_weight(weight.masked_fill(~nm_mask(weight.float().abs(), pattern), 0.0), pattern)


def bits_of(weight):
    return weight.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()])


def assert_product(y, x, weight, bias=None):
    """Within rounding to the type, and of float32 sums."""
    x, weight = x.double(), weight.double()
    exact = x @ weight.T + (0.0 if bias is None else bias.double())
    rounding = {torch.float32: 2**-24, torch.bfloat16: 2**-8}[y.dtype]
    assert ((y.double() - exact).abs() <= exact.abs() * rounding * 1.01 + (x.abs() @ weight.abs().T) * 1e-5 + 1e-30).all()


@each_variant
@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_multiplies_at_any_shape(pattern, dtype, instruction_set):
    skip_unless_available(dtype, instruction_set)
    torch.manual_seed(0)
    group = NMPattern.parse(pattern).group
    for in_channels in sorted({max(size // group, 1) * group for size in IN_CHANNELS}):
        for out_channels, tokens in [(1, 1), (7, 3), (37, 1), (130, 2)]:
            packed, x = packed_weight(out_channels, in_channels, pattern, dtype), torch.randn(tokens, in_channels).to(dtype)
            assert_product(matvec(x, packed, None, instruction_set), x, packed.dense())
            assert_product(dense_matvec(x, packed.dense(), None, instruction_set), x, packed.dense())


@each_variant
def test_it_multiplies_any_number_of_tokens_and_adds_a_bias(dtype, instruction_set):
    skip_unless_available(dtype, instruction_set)
    torch.manual_seed(0)
    packed, bias = packed_weight(75, 172, "2:4", dtype), torch.randn(75).to(dtype)
    for tokens in [*range(1, 10), 21]:
        x = torch.randn(tokens, 172).to(dtype)
        y = matvec(x, packed, bias, instruction_set)
        assert y.dtype == dtype
        assert_product(y, x, packed.dense(), bias)
        assert_product(dense_matvec(x, packed.dense(), bias, instruction_set), x, packed.dense(), bias)


@each_variant
def test_a_weight_of_zeros_leaves_the_bias(dtype, instruction_set):
    skip_unless_available(dtype, instruction_set)
    packed, bias = pack_weight(torch.zeros(9, 40, dtype=dtype), NMPattern(2, 4)), torch.randn(9).to(dtype)
    assert torch.equal(matvec(torch.randn(40).to(dtype), packed, bias, instruction_set), bias)


@each_variant
def test_shape_and_strides_of_the_activations_do_not_matter(dtype, instruction_set):
    skip_unless_available(dtype, instruction_set)
    packed, x = packed_weight(33, 40, "2:4", dtype), torch.randn(2, 3, 80).to(dtype)
    expected = matvec(x[..., ::2].reshape(6, 40).clone(), packed, None, instruction_set).view(2, 3, 33)
    torch.testing.assert_close(matvec(x[..., ::2], packed, None, instruction_set), expected)
    torch.testing.assert_close(matvec(x[1, 2, ::2], packed, None, instruction_set), expected[1, 2])
    assert matvec(x[:0, :, ::2], packed, None, instruction_set).shape == (0, 3, 33)


@each_variant
def test_threads_do_not_change_a_bit(dtype, instruction_set):
    skip_unless_available(dtype, instruction_set)
    packed, x = packed_weight(1003, 352, "4:8", dtype), torch.randn(3, 352).to(dtype)
    one = matvec(x, packed, None, instruction_set)
    torch.set_num_threads(2)
    try:
        assert torch.equal(matvec(x, packed, None, instruction_set), one) or instruction_set == "reference"
    finally:
        torch.set_num_threads(1)


def test_bfloat16_results_are_rounded_to_the_nearest_even():
    packed = pack_weight(torch.tensor([[1.0, 1.0, 0.0, 0.0]], dtype=torch.bfloat16), NMPattern(2, 4))
    x = torch.tensor([[1.0, 2**-8, 0, 0], [1.0, 3 * 2**-8, 0, 0], [1.0, 5 * 2**-9, 0, 0], [-(2.0**127), -(2.0**127), 0, 0]]).bfloat16()
    for instruction_set in instruction_sets(torch.bfloat16):
        assert matvec(x, packed, None, instruction_set).flatten().tolist() == [1.0, 1 + 2**-6, 1 + 2**-7, float("-inf")]


@each_expanding_variant
@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_expands_any_shape_bit_for_bit(pattern, dtype, instruction_set):
    skip_unless_available(dtype, instruction_set, expanding_instruction_sets)
    torch.manual_seed(0)
    group = NMPattern.parse(pattern).group
    for in_channels in sorted({max(size // group, 1) * group for size in IN_CHANNELS}):
        for out_channels in (1, 7, 130):
            packed = packed_weight(out_channels, in_channels, pattern, dtype)
            dense = expand(packed, instruction_set)
            assert dense.dtype == dtype and torch.equal(bits_of(dense), bits_of(packed.dense()))


@each_expanding_variant
def test_it_moves_every_word_even_signalling_nan(dtype, instruction_set):
    skip_unless_available(dtype, instruction_set, expanding_instruction_sets)
    packed = packed_weight(37, 344, "2:4", dtype)
    words = torch.randint(-(2**15), 2**15, (37, 172 * dtype.itemsize // 2), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    words[0] = torch.tensor([0, -0x8000, 0x7F81, 0x7C01]).to(torch.int16).repeat(words.shape[1] // 4)
    values = words.view(dtype)
    expected = PackedWeight(bits_of(values), packed.bits, packed.pattern, packed.in_channels).dense()
    assert torch.equal(bits_of(expand(PackedWeight(values, packed.bits, packed.pattern, packed.in_channels), instruction_set)), expected)


@each_expanding_variant
def test_threads_expand_every_row(dtype, instruction_set):
    skip_unless_available(dtype, instruction_set, expanding_instruction_sets)
    packed = packed_weight(1003, 352, "4:8", dtype)
    torch.set_num_threads(2)
    try:
        assert torch.equal(expand(packed, instruction_set), packed.dense())
    finally:
        torch.set_num_threads(1)


def test_strided_empty_and_double_weights_expand_too():
    packed = packed_weight(6, 16)
    strided = PackedWeight(packed.values.T.contiguous().T, packed.bits.T.contiguous().T, packed.pattern, packed.in_channels)
    assert torch.equal(expand(strided), packed.dense())
    assert expand(PackedWeight(packed.values[:0], packed.bits[:0], packed.pattern, 16)).shape == (0, 16)
    double = packed_weight(6, 16, dtype=torch.float64)
    assert torch.equal(expand(double), double.dense())
    assert expanding_instruction_sets(torch.float64) == ("reference",)


MEMORY_CHECK = """
import ctypes, mmap, sys, torch
from permllm.kernels import cpu_matvec
from permllm.kernels.cpu_matvec import dense_matvec, expanding_instruction_sets, instruction_sets, matvec
from permllm.sparsity.packed import PackedWeight
from permllm.sparsity.pattern import NMPattern

torch.set_num_threads(1)
kept_alive = []

def at_the_end_of_memory(tensor):
    size = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    area = mmap.mmap(-1, size + mmap.PAGESIZE)
    kept_alive.append(area)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + size), mmap.PAGESIZE, 0) == 0
    return torch.frombuffer(area, dtype=tensor.dtype, count=tensor.numel(), offset=size - tensor.nbytes).view(tensor.shape).copy_(tensor)

for dtype in (torch.float32, torch.bfloat16):
    for out_channels, in_channels in [(1, 4), (5, 12), (9, 20), (11, 172), (16, 64), (6, 1000)]:
        values = at_the_end_of_memory(torch.ones(out_channels, in_channels // 2, dtype=dtype))
        x = at_the_end_of_memory(torch.ones(3, in_channels, dtype=dtype))
        bias = at_the_end_of_memory(torch.ones(out_channels, dtype=dtype))
        dense = at_the_end_of_memory(torch.ones(out_channels, in_channels, dtype=dtype))
        for byte in (0x33, 0xFF):  # 2:4, and bits that promise twice the values that there are
            bits = at_the_end_of_memory(torch.full((out_channels, -(-in_channels // 8)), byte, dtype=torch.uint8))
            weight = PackedWeight(values, bits, NMPattern(2, 4), in_channels)
            for name in instruction_sets(dtype)[:-1]:
                y = matvec(x, weight, bias, name)
                assert byte == 0xFF or y.unique().tolist() == [torch.tensor(in_channels // 2 + 1.0).to(dtype)]
                dense_matvec(x, dense, bias, name)
            for name in expanding_instruction_sets(dtype)[:-1]:
                arguments = name.encode(), cpu_matvec.EXPANDED_TYPES[dtype], None, 1, values.data_ptr(), bits.data_ptr(), dense.data_ptr()
                assert cpu_matvec._library()[0].expand(*arguments, out_channels, in_channels, in_channels // 2) == 0
                assert byte == 0xFF or dense.unflatten(1, (-1, 4)).unique(dim=1).flatten().tolist() == [1.0, 1.0, 0.0, 0.0] * out_channels
"""


def test_no_byte_behind_a_buffer_is_read_even_if_the_bits_are_wrong(repository):
    finished = subprocess.run([sys.executable, "-c", MEMORY_CHECK], cwd=repository, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(1, 8, dtype=torch.float16), None, "all float32 or all bfloat16, not x torch.float16 on cpu"),
        (torch.zeros(1, 8, dtype=torch.bfloat16), None, "x torch.bfloat16 on cpu, weight torch.float32 on cpu"),
        (torch.zeros(1, 8, device="meta"), None, "x torch.float32 on meta"),
        (torch.zeros(1, 12), None, r"needs activations \(..., 8\), not \(1, 12\)"),
        (torch.zeros(()), None, r"not \(\)"),
        (torch.zeros(1, 8), torch.zeros(4), r"needs a bias \(3,\), not \(4,\)"),
        (torch.zeros(1, 8), torch.zeros(3, dtype=torch.bfloat16), "bias torch.bfloat16 on cpu"),
        (torch.zeros(1, 8, requires_grad=True), None, "has no gradients; call it under"),
    ],
)
def test_what_does_not_fit_is_refused(x, bias, message):
    for multiply, weight in [(matvec, packed_weight(3, 8)), (dense_matvec, torch.zeros(3, 8))]:
        with pytest.raises(ValueError, match=message):
            multiply(x, weight, bias)


def test_an_instruction_set_that_is_not_here_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"'sse9' is not available for torch.float32 here; choose from .*portable, reference"):
        matvec(torch.zeros(8), packed_weight(3, 8), None, "sse9")


def test_a_weight_that_cannot_be_expanded_is_refused():
    packed = packed_weight(3, 8)
    with pytest.raises(ValueError, match="on the CPU, not values on meta"):
        expand(packed.to("meta"))
    with pytest.raises(ValueError, match=r"'sse9' is not available for torch.float32 here; choose from .*portable, reference"):
        expand(packed, "sse9")
    packed.values.requires_grad_()
    with pytest.raises(ValueError, match="has no gradients; call it under"):
        expand(packed)


def test_the_type_or_device_that_makes_it_unavailable_is_named():
    assert why_unavailable(torch.device("cpu"), torch.bfloat16) is None
    assert "float32 and bfloat16, not torch.float16" in why_unavailable(torch.device("cpu"), torch.float16)
    assert "not on cuda" in why_unavailable(torch.device("cuda"), torch.bfloat16)


def test_without_a_compiler_pytorch_multiplies_and_the_log_says_so_once(afresh, caplog):
    packed, x = packed_weight(5, 8), torch.randn(2, 8)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(matvec(x, packed), reference_matvec(x, packed))
            assert_product(dense_matvec(x, packed.dense()), x, packed.dense())
            assert torch.equal(expand(packed), packed.dense())
    (message,) = [record.getMessage() for record in caplog.records]
    assert re.search(r"no C compiler .* is on the PATH, install gcc or clang; PyTorch computes", message)
    assert "no C compiler" in why_unavailable(torch.device("cpu"), torch.float32) and instruction_sets(torch.float32) == ("reference",)


def write_compiler(folder, name, body):
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def test_what_every_compiler_that_failed_said_is_in_the_reason(afresh, monkeypatch):
    write_compiler(afresh, "mycc", "echo first trouble >&2; exit 1")
    write_compiler(afresh, "gcc", "echo second trouble >&2; exit 1")
    monkeypatch.setenv("CC", "mycc -m64")
    assert re.search("mycc -m64 failed: first trouble; .*gcc failed: second trouble", why_unavailable(torch.device("cpu"), torch.float32))


def test_a_cache_that_cannot_be_written_is_a_reason(afresh, monkeypatch):
    write_compiler(afresh, "cc", "exit 1")
    (afresh / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(afresh / "file"))
    assert str(afresh / "file") in why_unavailable(torch.device("cpu"), torch.float32)


COPYING = """
case "$1" in --version) echo {version}; exit;; esac
echo compiled >> {log}
for last; do :; done
/bin/sleep {seconds}
/bin/cp {compiled} "$last"
"""


def test_it_is_compiled_once_for_a_source_a_compiler_and_its_version(afresh, compiled):
    log = afresh / "log"
    for version, compilations in [("1", 1), ("1", 1), ("2", 2), ("1", 2)]:
        write_compiler(afresh, "cc", COPYING.format(version=version, log=log, seconds=0, compiled=compiled))
        forget()
        assert why_unavailable(torch.device("cpu"), torch.float32) is None
        assert len(log.read_text().split()) == compilations
    assert len(list((afresh / "cache" / "permllm").iterdir())) == 2


def test_two_processes_that_compile_at_once_both_get_the_kernel(afresh, compiled, repository):
    write_compiler(afresh, "cc", COPYING.format(version=1, log=afresh / "log", seconds=1, compiled=compiled))
    ask = "import torch; from permllm.kernels.cpu_matvec import instruction_sets; print(instruction_sets(torch.float32))"
    asking = [subprocess.Popen([sys.executable, "-c", ask], cwd=repository, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate(timeout=60)[0] for process in asking]
    assert all("portable" in answer for answer in answers)
    assert [path.name for path in (afresh / "cache" / "permllm").iterdir()] == [path.name for path in (afresh / "cache" / "permllm").glob("*.so")]


def test_the_sources_are_installed_with_the_package(repository):
    pyproject = (repository / "pyproject.toml").read_text()
    assert re.search(r"\[tool.setuptools.package-data\]\npermllm = .*kernels/\*\.c.*kernels/\*\.h", pyproject)


def test_values_that_are_not_contiguous_are_read_right():
    packed, x = packed_weight(6, 16), torch.randn(16)
    strided = PackedWeight(packed.values.T.contiguous().T, packed.bits.T.contiguous().T, packed.pattern, packed.in_channels)
    assert torch.equal(matvec(x, strided), matvec(x, packed))
