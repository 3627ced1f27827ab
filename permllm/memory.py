"""How much memory there is, and a refusal to start what will not fit."""

import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")
GB = 1e9


@dataclass(frozen=True)
class Need:
    """A part of what a stage holds in memory.

    Attributes:
        what: it is.
        lower: what to do to make it smaller; empty if nothing can be done.
    """

    what: str
    nbytes: int
    lower: str = ""


def free_host_bytes() -> int:
    """Return the memory that this process can still take: of the machine, and of the control group it runs in."""
    limits = [_available_bytes()]
    for usage, limit, statistics, file_cache in (
        (CGROUP / "memory.current", CGROUP / "memory.max", CGROUP / "memory.stat", "inactive_file"),
        (CGROUP / "memory/memory.usage_in_bytes", CGROUP / "memory/memory.limit_in_bytes", CGROUP / "memory/memory.stat", "total_inactive_file"),
    ):
        if limit.is_file() and (most := limit.read_text().strip()) != "max":
            cached = dict(line.split() for line in statistics.read_text().splitlines()).get(file_cache, 0)
            limits.append(int(most) - int(usage.read_text()) + int(cached))
    return max(min(limits), 0)


def _available_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        entries = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(entries["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # no better figure outside of Linux


def peak_host_bytes() -> int:
    """Return the most resident memory that this process had. `ru_maxrss` would begin with the peak of the process that started it."""
    status = Path("/proc/self/status")
    if status.is_file():
        entries = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(entries["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_device_bytes(device: torch.device) -> int:
    """Return the memory of a GPU that is free, what PyTorch has reserved and not used included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def need_memory(stage: str, device: torch.device, host: Sequence[Need], on_device: Sequence[Need] = ()) -> None:
    """Refuse to start when memory cannot hold what a stage is about to hold at a time.

    Args:
        stage: and what it works on.
        on_device: on a device that is the CPU it is in the host's memory as well.

    Raises:
        NotEnoughMemoryError: with the free and the needed bytes, the parts, and what to lower.
    """
    is_host = device.type != "cuda"
    places = [("this machine", [*host, *on_device] if is_host else list(host), free_host_bytes())]
    if not is_host:
        places.append((str(device), list(on_device), free_device_bytes(device)))
    problems = []
    for place, needs, free in places:
        needed = sum(need.nbytes for need in needs)
        if needed > free:
            largest = sorted((need for need in needs if need.nbytes), key=lambda need: -need.nbytes)
            parts = ", ".join(f"{need.what} {need.nbytes / GB:.2f} GB" for need in largest)
            advice = next((need.lower for need in largest if need.lower), "use a machine with more memory")
            problems.append(f"about {needed / GB:.2f} GB are needed on {place} and {free / GB:.2f} GB are free ({parts}); {advice}")
    if problems:
        raise NotEnoughMemoryError(f"not enough memory for {stage}: {'; '.join(problems)}")


class NotEnoughMemoryError(OSError):
    """A stage that would not fit was not started."""
