"""The processes of one run: how they find each other, agree at each step boundary, and fail together.

`torchrun`, `srun` or anything else that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT starts them.
Decisions use a separate gloo group on the hosts, so none of them waits for a device. gloo also reports the death of a
process at once, where NCCL would wait.
"""

import contextlib
import datetime
import math
import os
import socket
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from maekit.system.errors import InputError, MaekitError, OtherRankError
from maekit.system.machine import cores, first_core_and_count
from maekit.system.progress import duration
from maekit.system.signals import StopNow

Result = TypeVar("Result")

# Timeout of collectives: ranks wait while one of them draws, saves or reads. The death of a rank shows without it.
_PATIENCE = datetime.timedelta(hours=2)
_ONE_PER_GPU = "start one process per GPU"
# How long ranks wait for each other at the start, in attempts of this length.
_MEETING, _ATTEMPT = datetime.timedelta(minutes=30), datetime.timedelta(seconds=2)
_MEETING_NOTE_SECONDS = 20.0
_SIGNS_OF_A_LOST_RANK = ("gloo", "Connection reset", "Connection closed", "Broken pipe", "NCCL")


@dataclass(frozen=True)
class DistributedContext:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: rank of this process.
        size: number of processes.
        local_rank: rank of this process on its machine.
        local_size: number of processes on this machine.
        group: gloo group of the hosts; None for a single process.
        cores: CPU cores available to this process alone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    group: Any = None
    cores: int = field(default_factory=cores)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run directory and reports progress."""
        return self.rank == 0

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """Return the numbers of every rank, by rank; all ranks pass equally many."""
        if self.group is None:
            return [list(numbers)]
        mine = torch.tensor(numbers, dtype=torch.float64)
        gathered = [torch.empty_like(mine) for _ in range(self.size)]
        with self.lost_ranks():
            dist.all_gather(gathered, mine, group=self.group)
        return [row.tolist() for row in gathered]

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Return the elementwise sums over all ranks."""
        if self.group is None:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        with self.lost_ranks():
            dist.all_reduce(total, group=self.group)
        return total.tolist()

    def share(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        if self.group is None:
            return value
        box = [value]
        with self.lost_ranks():
            dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite each tensor, such as running statistics, with that of rank 0."""
        if self.group is not None:
            for tensor in tensors:
                with self.lost_ranks():
                    dist.broadcast(tensor, src=0)

    @contextlib.contextmanager
    def lost_ranks(self) -> Iterator[None]:
        """Context in which an error caused by a lost rank becomes a one-line `MaekitError`.

        It quotes the original message, because a broken network looks the same.
        """
        try:
            yield
        except RuntimeError as error:
            said = str(error).strip() or type(error).__name__
            is_lost = isinstance(error, dist.DistError) or any(sign in said for sign in _SIGNS_OF_A_LOST_RANK)
            if self.group is None or not is_lost:
                raise
            raise MaekitError(
                "another process of this run is gone (what it said stands above, or in its own log); run the same "
                f"command again to go on [{said.splitlines()[0]}]"
            ) from error

    def together(self, work: Callable[[], Result]) -> Result:
        """Run `work` on every rank; if it fails on one, fail on all.

        Raises:
            MaekitError: the error of `work` on the first rank that failed; an `OtherRankError` on all others.
        """
        error: MaekitError | StopNow | None = None
        result: Result | None = None
        try:
            result = work()
        except (MaekitError, StopNow) as raised:
            error = raised
        codes = [int(code) for (code,) in self.gather([error.exit_code if error else 0])]
        failed = [rank for rank, code in enumerate(codes) if code]
        if not failed:
            return result  # type: ignore[return-value]
        if error is not None and failed[0] == self.rank:
            raise error
        raise OtherRankError(f"rank {failed[0]} failed", codes[failed[0]])

    def on_main(self, work: Callable[[], Result]) -> Result | None:
        """Run `work` on the main process, and fail on all if it fails; return None on the others.

        Raises:
            MaekitError: as `together`.
        """
        return self.together(lambda: work() if self.is_main else None)

    def in_turn(self, work: Callable[[], Result]) -> Result:
        """Run `work` on one rank of each machine, then on its other ranks, which use the cache that the first filled.

        Raises:
            MaekitError: as `together`.
        """
        first = self.together(lambda: work() if self.local_rank == 0 else None)
        rest = self.together(lambda: work() if self.local_rank else None)
        return first if self.local_rank == 0 else rest  # type: ignore[return-value]


@contextlib.contextmanager
def join(device: str, note: Callable[[str], None] = lambda text: None) -> Iterator[DistributedContext]:
    """Join the processes of this run, as the environment describes them, and leave them at the end.

    Args:
        device: `cpu` or `cuda`.
        note: is told for whom it waits.

    Raises:
        InputError: the environment describes them only in part, or there are more processes than devices.
        MaekitError: the others do not respond.
    """
    size = _number("WORLD_SIZE", 1, least=1)
    if size == 1:
        yield DistributedContext()
        return
    rank, local_rank = _number("RANK", below=size), _number("LOCAL_RANK")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise InputError(f"WORLD_SIZE={size} is set and {name} is not; start with torchrun, or set all it sets")
    _number("MASTER_PORT", least=1, below=1 << 16)
    gpu = torch.device("cuda", _own_gpu(local_rank, torch.cuda.device_count())) if device == "cuda" else None
    if gpu:
        torch.cuda.set_device(gpu)
    try:
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            store=_meet(rank, size, note),
            rank=rank,
            world_size=size,
            device_id=gpu,
        )
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        if "Duplicate GPU" in str(error):  # so says NCCL
            raise InputError(f"rank {rank} of {size} has the same GPU as another; {_ONE_PER_GPU}") from error
        raise MaekitError(f"rank {rank} of {size} cannot reach the others: {str(error).splitlines()[0]}") from error
    world = DistributedContext(rank, size, local_rank, _number("LOCAL_WORLD_SIZE", 1), group)
    try:
        yield replace(world, cores=_own_cores(world))
    except BaseException:
        # A regular exit waits for collectives that the others have begun. The error must be reported now; the others
        # notice it when the connections close.
        if device == "cuda":
            with contextlib.suppress(Exception):
                dist.distributed_c10d._abort_process_group()
        raise
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()


def _own_gpu(local_rank: int, count: int) -> int:
    """Return the index of this process's GPU; a launcher may show each process its own alone (--gpus-per-task=1).

    Raises:
        InputError: there are more processes than GPUs.
    """
    if count > 1 and local_rank >= count:
        raise InputError(f"LOCAL_RANK={local_rank}, and this process sees {count} CUDA devices; {_ONE_PER_GPU}")
    return local_rank if count > 1 else 0


def _meet(rank: int, size: int, note: Callable[[str], None]) -> Any:
    """Return the `Store` of all ranks, once all have come to it.

    Attempts are short, because a signal's handler does not run, and nothing is told, within one of torch's own.

    Raises:
        RuntimeError: not all came in time, or this rank cannot open the store for the others.
    """
    host, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT")
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # torchrun itself opens one
    prefix = f"maekit-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    store: Any = None
    came, problem, began = 0, "", time.monotonic()
    told = began - _MEETING_NOTE_SECONDS / 2
    while True:
        try:
            if store is None:
                if not hosts:  # a knock first: torch prints pages about a door that is still closed
                    socket.create_connection((host, port), timeout=_ATTEMPT.total_seconds()).close()
                opened = dist.TCPStore(  # type: ignore[attr-defined]
                    host, port, size, hosts, _ATTEMPT, wait_for_workers=False, multi_tenant=True
                )
                store = c10d.PrefixStore(prefix, opened)
                store.add("here", 1)
            came, problem = store.add("here", 0), ""
        except (RuntimeError, OSError) as error:
            if hosts:
                raise
            problem = f": {str(error).splitlines()[0]}"
        if store is not None and came >= size:
            store.set_timeout(_MEETING)
            return store
        now = time.monotonic()
        if now - began > _MEETING.total_seconds():
            raise RuntimeError(f"{came} of {size} came to {host}:{port} within {duration(now - began)}{problem}")
        if now - told > _MEETING_NOTE_SECONDS:
            told = now
            note(f"waiting for the other processes: {came} of {size} are at {host}:{port}{problem}")
        time.sleep(0.1)


def _own_cores(world: DistributedContext) -> int:
    """Return this process's share of the CPU cores; launchers assign separate cores, or the same ones to all."""
    host = zlib.crc32(socket.gethostname().encode())
    ranks = world.gather([host, *first_core_and_count()])
    return cores(ranks.count(ranks[world.rank]), sum(host == there for there, *_ in ranks))


def _number(name: str, default: int | None = None, *, least: int = 0, below: float = math.inf) -> int:
    text = os.environ.get(name, "")
    if not text and default is not None:
        return default
    with contextlib.suppress(ValueError):
        if least <= (number := int(text)) < below:
            return number
    size = "" if name == "WORLD_SIZE" else f"WORLD_SIZE={os.environ.get('WORLD_SIZE')} is set and "
    raise InputError(
        f"{size}{name} is {text!r}; start with torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and "
        "MASTER_PORT, or unset them for a single process"
    )


def share_optimizer(optimizer: torch.optim.Optimizer, world: DistributedContext) -> None:
    """Broadcast the optimiser's state that rank 0 loaded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kinds = world.share([sorted(optimizer.state[parameter]) for parameter in parameters])
    for parameter, loaded in zip(parameters, kinds, strict=True):
        state = optimizer.state[parameter]
        for kind in loaded:
            if kind not in state:
                like = torch.zeros((), device=parameter.device) if kind == "step" else torch.zeros_like(parameter)
                state[kind] = like
        world.broadcast(state[kind] for kind in loaded)
