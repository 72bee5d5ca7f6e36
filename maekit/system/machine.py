"""CPU cores and memory of this machine, within the limits of this process's control groups (versions 1 and 2)."""

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_GROUPS = Path("/sys/fs/cgroup")
_NEWER, _OLDER = ("memory.max", "memory.high"), ("memory.limit_in_bytes",)


def cores(on_mask: int = 1, on_machine: int = 1) -> int:
    """Return how many CPU cores this process may use: those of its mask, or fewer where its quota of time is less.

    Args:
        on_mask: number of processes that share its mask.
        on_machine: number of processes that share its quota.
    """
    count, quota = first_core_and_count()[1] // on_mask, cpu_quota() / on_machine
    return max(1, math.ceil(quota) if quota < count else count)


def first_core_and_count() -> tuple[int, int]:
    """Return the lowest core of this process's mask and the number of its cores, whatever time they are granted."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return min(usable), len(usable)


def cpu_quota() -> float:
    """Return how many cores' time the control groups of this process grant; infinite without a limit."""
    newer = [_read(folder / "cpu.max").split() for folder in _folders("")]
    older = [[_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")] for folder in _folders("cpu")]
    # Without a limit, version 2 says `max` and version 1 says -1.
    limits = (map(int, limit) for limit in newer + older if len(limit) == 2 and all(map(str.isdecimal, limit)))
    return min((quota / period for quota, period in limits if period), default=math.inf)


def available_memory() -> int:
    """Return how many bytes of memory can be allocated without swapping, within this process's control groups."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        (line,) = [line for line in lines if line.startswith("MemAvailable")]
        available = int(line.split()[1]) * 1024
    except (OSError, ValueError):
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    newer = [_room(folder, _NEWER, "memory.current", "") for folder in _folders("")]
    older = [_room(folder, _OLDER, "memory.usage_in_bytes", "total_") for folder in _folders("memory")]
    return int(min([available, *newer, *older]))


def _room(folder: Path, limits: tuple[str, ...], used: str, prefix: str) -> float:
    """Return the bytes that one control group leaves; infinite without a limit."""
    known = [int(text) for name in limits if (text := _read(folder / name)).isdecimal()]
    if not known:
        return math.inf
    # The kernel drops pages of files before it refuses memory. Shared memory is in `file`, but not in these two lists.
    counts = dict(line.split(maxsplit=1) for line in _read(folder / "memory.stat").splitlines() if " " in line)
    files = sum(int(counts.get(f"{prefix}{name}_file", 0)) for name in ("inactive", "active"))
    taken = _read(folder / used)
    return max(0, min(known) - max(0, (int(taken) if taken.isdecimal() else 0) - files))


def _folders(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control group and its parents, some of which may not exist.

    A container may see its own group as the root, under a path that only the host has: then the root alone exists.

    Args:
        controller: a controller of version 1, or an empty text for version 2.
    """
    # Each line is `number:controllers:path`.
    lines = [line.split(":", 2) for line in _read(Path("/proc/self/cgroup")).splitlines() if line.count(":") > 1]
    found = [(names, path) for _, names, path in lines if controller in names.split(",")] or [(controller, "/")]
    for names, path in found:
        # Version 2 lies beside the controllers of version 1 where a system has both.
        roots = dict.fromkeys(_GROUPS / name for name in ((names, controller) if controller else ("", "unified")))
        inner = PurePosixPath(path.strip("/"))
        for root in roots:
            yield from (root / part for part in (inner, *inner.parents) if ".." not in part.parts)


def _read(path: Path) -> str:
    """Return the text of a file of the kernel; empty if there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
