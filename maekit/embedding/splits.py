"""The split of the input that this process embeds, and its number among the processes of its machine."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from maekit.system.errors import InputError

Item = TypeVar("Item")
_FIRST_SPECIAL_STEP = 0xFFFFFFF0  # special SLURM step ids, such as the batch script's, start here


@dataclass(frozen=True)
class Split:
    """One of `count` splits of the input.

    Attributes:
        number: its number, from 0.
        count: number of splits.
        origin: where it comes from: `options`, `SLURM`, `a SLURM array` or `torchrun`; empty for a single split.
        local_number: number of this process among those of this machine.
        local_count: number of processes on this machine.
    """

    number: int = 0
    count: int = 1
    origin: str = ""
    local_number: int = 0
    local_count: int = 1

    @property
    def name(self) -> str:
        """Name of the split in the output's bookkeeping."""
        return "all" if self.count == 1 else f"{self.number}-of-{self.count}"

    def of(self, items: Sequence[Item]) -> list[Item]:
        """Return every `count`-th item, so that large neighbours go to different splits."""
        return list(items[self.number :: self.count])


def find_split(number: int | str | None, count: int | None) -> Split:
    """Return the requested split, or the one that srun or torchrun assigns to this process.

    Args:
        number: `--split`; `auto` also takes what a SLURM array, or RANK and WORLD_SIZE alone, say: each task of an
            array may have an input of its own.
        count: `--num-splits`.

    Raises:
        InputError: an impossible split, or `auto` where nothing names one.
    """
    if number == "auto" and count is None:
        split = _launcher_split() or _array_split()
        if split is None:
            raise InputError("`split=auto`: neither srun, torchrun, a SLURM array nor RANK and WORLD_SIZE name a split")
        return split
    if (number is None) != (count is None) or (isinstance(number, str) and number != "auto"):
        raise InputError("`split` and `num_splits` go together: `num_splits=8` and `split=0` to 7")
    if number is not None and count is not None:
        if isinstance(number, str):
            raise InputError(f"`split` = {number}: with `num_splits`, a number from 0; `auto` finds both")
        if not 0 <= number < count:
            raise InputError(f"`split` = {number}: must be 0 to {count - 1} with `num_splits={count}`")
        return Split(number, count, "options" if count > 1 else "")
    by_step = "TORCHELASTIC_RUN_ID" in os.environ or _is_srun()
    return (_launcher_split() if by_step else None) or Split()


def unused_split() -> str:
    """Return the variables that name a split which was not asked for, for a note; empty where there are none."""
    if (_number("SLURM_ARRAY_TASK_COUNT") or 1) > 1:
        return "SLURM_ARRAY_TASK_ID and _COUNT"
    return "RANK and WORLD_SIZE" if _launcher_split() is not None else ""


def _launcher_split() -> Split | None:
    for origin, names in (
        ("torchrun", ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")),
        ("SLURM", ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")),
    ):
        rank, world, local, local_world = (_number(name) for name in names)
        if origin == "SLURM" and not _is_srun():
            continue  # the batch script of the job, which runs once whatever the number of tasks
        if rank is not None and world is not None and 0 <= rank < world and world > 1:
            # srun usually gives each task of a node its own CPUs; torchrun does not divide them.
            local_count = (local_world or 1) if origin == "torchrun" else 1
            return Split(rank, world, origin, local or 0, local_count)
    return None


def _array_split() -> Split | None:
    task, first, tasks = (_number(f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "MIN", "COUNT"))
    last, step = _number("SLURM_ARRAY_TASK_MAX"), _number("SLURM_ARRAY_TASK_STEP") or 1
    if task is None or first is None or tasks is None or last is None:
        return None
    if last - first != (tasks - 1) * step:
        raise InputError("this SLURM array has gaps: give `num_splits` and `split`")
    return Split((task - first) // step, tasks, "a SLURM array" if tasks > 1 else "")


def _is_srun() -> bool:
    step = _number("SLURM_STEP_ID")
    return step is not None and 0 <= step < _FIRST_SPECIAL_STEP


def _number(name: str) -> int | None:
    try:
        return int(os.environ.get(name, ""))
    except ValueError:
        return None
