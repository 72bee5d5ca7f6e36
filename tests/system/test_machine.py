"""Cores and memory within control groups, of both versions, as kernels and containers show them."""

import os
import pathlib
from pathlib import Path

import pytest

from maekit.system import machine

GB = 10**9


@pytest.fixture
def groups(tmp_path: Path, monkeypatch):
    """Make up /proc and /sys/fs/cgroup: 64 cores, 100 GB of memory, and the files that a test names."""
    real = pathlib.Path.read_text
    proc = {"/proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {100 * GB // 1024} kB\n"}

    def read(path: Path, *args: str, **options: str) -> str:
        return proc[str(path)] if str(path) in proc else real(path, *args, **options)

    def make(own: str, files: dict[str, str]) -> None:
        proc["/proc/self/cgroup"] = own
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{text}\n")

    monkeypatch.setattr(pathlib.Path, "read_text", read)
    monkeypatch.setattr(machine, "_GROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    make("0::/\n", {})
    return make


def gigabytes() -> float:
    return round(machine.available_memory() / GB, 2)


def test_without_limits(groups) -> None:
    groups("0::/a\n4:memory:/b\n", {"a/memory.max": "max", "a/cpu.max": "max 100000", "memory/b/memory.stat": "x"})
    assert gigabytes() == 100
    assert machine.cores() == 64
    groups("", {"memory/memory.limit_in_bytes": str(2**63 - 4096), "memory/memory.usage_in_bytes": "5"})
    groups("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"})
    assert gigabytes() == 100
    assert machine.cores() == 64


def test_cached_files_are_free_memory_and_shared_memory_is_not(groups) -> None:
    """`file` holds both; the lists of pages by which the kernel reclaims hold files alone."""
    stat = f"anon {GB}\nfile {6 * GB}\nshmem {GB}\ninactive_file {3 * GB}\nactive_file {2 * GB}"
    groups("0::/a\n", {"a/memory.max": str(8 * GB), "a/memory.current": str(7 * GB), "a/memory.stat": stat})
    assert gigabytes() == 6
    groups("0::/a\n", {"a/memory.high": str(4 * GB)})  # above it, the kernel slows a group down
    assert gigabytes() == 2
    stat = f"inactive_file 1\nactive_file 1\ntotal_inactive_file {3 * GB}\ntotal_active_file {2 * GB}"
    files = {"limit_in_bytes": str(8 * GB), "usage_in_bytes": str(7 * GB), "stat": stat}
    groups("5:memory:/a\n", {f"memory/a/memory.{name}": text for name, text in files.items()})
    assert gigabytes() == 6


def test_the_strictest_of_all_parents_counts(groups) -> None:
    groups("0::/job/task\n", {"job/memory.max": str(3 * GB), "job/memory.current": str(GB)})
    groups("0::/job/task\n", {"job/task/memory.max": "max", "job/cpu.max": "150000 100000"})
    assert gigabytes() == 2
    assert machine.cores() == 2
    groups("0::/job/task\n", {"job/task/cpu.max": "300000 100000"})
    assert machine.cores() == 2
    groups("0::/job/task\n", {"cpu.max": "20000 100000", "job/memory.current": str(9 * GB)})
    assert machine.cores() == 1
    assert gigabytes() == 0


@pytest.mark.parametrize("own", ["0::/\n", "0::/docker/abc\n", "0::/../../other\n", ""])
def test_a_container_that_sees_its_group_as_the_root(groups, own: str) -> None:
    groups(own, {"memory.max": str(2 * GB), "memory.current": "0", "cpu.max": "400000 100000"})
    assert gigabytes() == 2
    assert machine.cores() == 4


@pytest.mark.parametrize("folder", ["cpu,cpuacct", "cpu"])
@pytest.mark.parametrize("path", ["pod/own", ""])
def test_version_1_beside_version_2(groups, folder: str, path: str) -> None:
    """Each controller has a path of its own; a container may have its group alone, at the root of each."""
    limits = {"cpu.cfs_quota_us": "250000", "cpu.cfs_period_us": "100000"}
    files = {f"{folder}/{path}/{name}": text for name, text in limits.items()}
    files |= {"memory/slurm/memory.limit_in_bytes": str(GB), "unified/x/memory.max": str(GB // 2)}
    groups("11:cpu,cpuacct:/pod/own\n5:memory:/slurm/job/task\n1:name=systemd:/y\n0::/z\n", files)
    assert machine.cores() == 3
    assert gigabytes() == 1


def test_shares_of_the_mask_and_of_the_quota(groups) -> None:
    """Processes that are pinned to cores of their own have the quota in common all the same."""
    assert machine.cores(on_mask=4, on_machine=4) == 16
    groups("0::/\n", {"cpu.max": "800000 100000"})
    assert machine.cores(on_mask=1, on_machine=4) == 2
    assert machine.cores(on_mask=32, on_machine=4) == 2
    assert machine.cores(on_mask=100, on_machine=100) == 1
