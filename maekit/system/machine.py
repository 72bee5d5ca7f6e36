"""CPU cores and memory of this machine."""

import os
from pathlib import Path


def cores() -> int:
    """Return how many CPU cores this process may use."""
    return first_core_and_count()[1]


def first_core_and_count() -> tuple[int, int]:
    """Return the lowest CPU core that this process may use, and how many it may use."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return min(usable), len(usable)


def available_memory() -> int:
    """Return how many bytes of memory can be allocated without swapping, within the limit of this process's cgroup."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        (line,) = [line for line in lines if line.startswith("MemAvailable")]
        available = int(line.split()[1]) * 1024
    except (OSError, ValueError):
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([available, *_cgroup_room()])


def _cgroup_room() -> list[int]:
    """Return the bytes that the control group (version 2) leaves as a list of one, or an empty list without a limit."""
    try:
        (path,) = [line.split("::")[1] for line in Path("/proc/self/cgroup").read_text().splitlines() if "::" in line]
        folder = Path("/sys/fs/cgroup") / path.lstrip("/")
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return [max(0, int(limit) - int(used))]
    except (OSError, ValueError):  # no such group; or `max`, which is not a number
        return []
