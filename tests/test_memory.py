import subprocess
import sys
from pathlib import Path

import pytest
import torch

from permllm import memory
from permllm.memory import Need, NotEnoughMemoryError, free_device_bytes, free_host_bytes, need_memory, peak_host_bytes

CPU = torch.device("cpu")


def test_the_free_memory_is_some_and_no_more_than_the_machine_has():
    assert 0 < free_host_bytes() < 1 << 50


def test_a_control_group_limits_it_and_file_cache_that_can_go_counts_as_free(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    for name, text in {"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 400\ninactive_file 300\n"}.items():
        (tmp_path / name).write_text(text)
    assert free_host_bytes() == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert free_host_bytes() > 1000


def test_what_fits_may_start():
    need_memory("calibrate m", CPU, [Need("hidden states", 1000)])


def test_what_does_not_fit_is_refused_with_its_parts_and_what_to_lower(monkeypatch):
    monkeypatch.setattr(memory, "free_host_bytes", lambda: int(2e9))
    with pytest.raises(NotEnoughMemoryError) as refused:
        need_memory("calibrate m", CPU, [Need("hidden states", int(1e9), "lower calibrate.length")], [Need("weights", int(1.5e9))])
    assert str(refused.value) == (
        "not enough memory for calibrate m: about 2.50 GB are needed on this machine and 2.00 GB are free "
        "(weights 1.50 GB, hidden states 1.00 GB); lower calibrate.length"
    )


def test_nothing_to_lower_is_said_too(monkeypatch):
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 0)
    with pytest.raises(NotEnoughMemoryError, match="use a machine with more memory"):
        need_memory("assemble m", CPU, [Need("one pruned decoder layer", 10)])


def test_host_and_gpu_are_judged_apart_and_named_together(monkeypatch):
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 5)
    monkeypatch.setattr(memory, "free_device_bytes", lambda device: 5)
    need_memory("prune m", torch.device("cuda"), [Need("a", 4)], [Need("b", 4)])
    with pytest.raises(NotEnoughMemoryError, match=r"on this machine .* on cuda:1 and"):
        need_memory("prune m", torch.device("cuda:1"), [Need("a", 6)], [Need("b", 7)])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_pytorch_keeps_in_reserve_on_a_gpu_is_free():
    before = free_device_bytes(torch.device("cuda"))
    torch.empty(1 << 26, device="cuda")
    assert free_device_bytes(torch.device("cuda")) >= before - (1 << 24)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="elsewhere a process begins with the peak of its parent")
def test_the_peak_of_a_process_is_its_own():
    held = torch.ones(1 << 30, dtype=torch.uint8)
    code = "from permllm.memory import peak_host_bytes; print(peak_host_bytes())"
    child = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert child < held.nbytes < peak_host_bytes()
