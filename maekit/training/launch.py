"""The entry to any training: join the other processes, check batch and data, index the shards, own the run directory.

Each training command runs it as:

    with launched(config, run, progress, resolve) as launch:
        task = ...                          # built on launch.device, from launch.shards
        newest = launch.own()
        finished = Engine(launch, task).go(newest)
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from maekit.config import TrainingConfig
from maekit.mae.device import device_errors, find_device, run_kernel
from maekit.runs import Checkpoint, RunDirectory
from maekit.shards.cache import RemoteCache
from maekit.shards.order import SampleOrder
from maekit.shards.read import ShardSet, open_shards
from maekit.shards.spec import find_shards
from maekit.system import files, locks
from maekit.system.errors import DamagedShard, InputError, OtherRankError
from maekit.system.progress import Progress
from maekit.system.signals import stop_on_signal
from maekit.system.text import count
from maekit.training import distributed
from maekit.training.distributed import DistributedContext
from maekit.training.step import check_micro_batch
from maekit.training.stop import Stop

Config = TypeVar("Config", bound=TrainingConfig)


@dataclass
class Launch(Generic[Config]):
    """One process of a run, ready to train.

    Attributes:
        config: settings of the run, resolved, the same in all processes.
        run: the run directory.
        device: device that this process trains on.
        precision: `fp32` or `bf16`.
        shards: the training set.
        order: order of its samples.
        world: the processes of the run.
        stop: decides when to stop.
        progress: receives progress updates.
        stack: holds the lock of the run directory.
    """

    config: Config
    run: RunDirectory
    device: torch.device
    precision: str
    shards: ShardSet
    order: SampleOrder
    world: DistributedContext
    stop: Stop
    progress: Progress
    stack: ExitStack

    def own(self) -> Checkpoint | None:
        """Lock the run directory; return the newest valid checkpoint on the main process.

        Raises:
            InputError: another run holds the lock, or there are checkpoints and none is valid.
        """
        self.world.on_main(lambda: self.stack.enter_context(locks.sole_owner(self.run.path)))
        # Looked up under the lock: a previous process may just have saved its last checkpoint.
        return self.world.on_main(self._newest_checkpoint)

    def _newest_checkpoint(self) -> Checkpoint | None:
        newest = self.run.newest_valid(self.progress.note)
        if newest is None and (lost := self.run.list_checkpoints()):
            raise InputError(
                f"none of {len(lost)} checkpoints in {self.run.checkpoints} is valid; delete it to start anew"
            )
        return newest


@contextlib.contextmanager
def launched(
    config: Config, run: RunDirectory, progress: Progress, resolve: Callable[[], None]
) -> Iterator[Launch[Config]]:
    """Join the other processes and prepare what every training needs; inside the context, signals stop the run.

    Args:
        config: the settings, already validated.
        run: the run directory.
        progress: receives progress updates.
        resolve: called on the main process; fills in what the config leaves open, and refuses a directory that holds
            something else.

    Raises:
        InputError: the device does not exist, the data cannot be trained on, or the batch does not divide.
        Stopped: a signal came before there was anything to save.
        MaekitError: the other processes cannot be joined, or the device failed.
    """
    files.require_utf8(run.path)
    stop = Stop(config.run.max_time)
    kind = find_device(config.run.device)
    with (
        stop_on_signal(
            stop.heed, has_begun=stop.needs_saving, before="the first step of this start", after="after this step"
        ) as stop.received_signal,
        device_errors(),
        distributed.join(kind, progress.note) as world,
        ExitStack() as stack,
    ):
        stop.is_alone = world.size == 1
        # `join` has chosen among several GPUs.
        device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
        world.together(lambda: run_kernel(device))
        world.on_main(lambda: _refuse_indivisible(config, world))
        world.on_main(resolve)
        config = world.share(config)
        torch.set_num_threads(config.run.threads or min(torch.get_num_threads(), world.cores))
        precision = _choose_precision(config, device, world, progress)
        known_digest = world.share(world.on_main(lambda: _known_digest(run)))
        shards = world.in_turn(lambda: _index_shards(config, world, progress, known_digest=known_digest))
        _refuse_different_data(shards, world)
        order = SampleOrder(shards.counts, seed=config.seed, digest=shards.digest, window=config.data.window)
        yield Launch(
            config=config,
            run=run,
            device=device,
            precision=precision,
            shards=shards,
            order=order,
            world=world,
            stop=stop,
            progress=progress,
            stack=stack,
        )


def refuse_foreign_directory(run: RunDirectory, kind: str) -> None:
    """Refuse a directory that holds something other than a run of this kind.

    Raises:
        InputError: names what it holds.
    """
    if run.path.exists() and not run.path.is_dir():
        raise InputError(f"{run.path} is a file; `out` names a directory")
    if run.path.is_dir() and not run.config_file.is_file():
        others = sorted(p.name for p in run.path.iterdir() if not p.name.startswith("."))
        if others:
            raise InputError(f"{run.path} is no {kind} (it holds {others[0]}); choose an empty or new `out`")


def _known_digest(run: RunDirectory) -> str | None:
    """Return the digest of the data that an earlier start of the run was trained on; None if there was none."""
    for checkpoint in run.list_checkpoints():
        with contextlib.suppress(OSError, ValueError, KeyError):
            return str(checkpoint.state()["data_digest"])
    return None


def _index_shards(
    config: TrainingConfig, world: DistributedContext, progress: Progress, *, known_digest: str | None
) -> ShardSet:
    """Index the training set, and check that the cache for remote shards is large enough."""
    shards = open_set(config, config.shards, progress, "index shards", known_digest=known_digest)
    shards.refuse_ambiguous()
    if world.is_main:
        progress.note(f"{count('sample', shards.samples)} in {count('shard', len(shards.shards))}")
    if shards.remote is not None:
        # Two windows of remote shards must fit; otherwise each read would be a download.
        sizes = [shards.bytes_of(shard) for shard, file in enumerate(shards.shards) if file.url]
        shards.remote.refuse_if_too_small(min(2 * config.data.window, len(sizes)), max(sizes))
    return shards


def open_set(
    config: TrainingConfig, specs: tuple[str, ...], progress: Progress, what: str, *, known_digest: str | None = None
) -> ShardSet:
    """Find and index the shards of the input specs; `what` labels the progress.

    Raises:
        InputError: there are no shards, or damaged ones without `skip_damaged`.
    """
    found = find_shards(specs)
    seen = itertools.count(1)

    def on_damage(damage: DamagedShard) -> None:
        if config.data.skip_damaged:
            progress.note(f"left out: {damage}")

    progress.start(what, len(found))
    try:
        return open_shards(
            found,
            image=config.data.image,
            known_digest=known_digest,
            skip_damaged=config.data.skip_damaged,
            remote=RemoteCache(int(config.data.cache_gb * 1e9)),
            on_shard=lambda shard: progress.advance(next(seen)),
            on_damage=on_damage,
        )
    finally:
        progress.stop()


def _refuse_different_data(shards: ShardSet, world: DistributedContext) -> None:
    """Check that all ranks read the same data, by 48 bits of the digest, which a float64 holds exactly."""
    numbers = [int(number) for (number,) in world.gather([float(int(shards.digest[:12], 16))])]
    for rank, number in enumerate(numbers):
        if number != numbers[0]:
            message = f"rank {rank} reads other shards than rank 0 does: each machine must see the same set"
            raise InputError(message) if world.is_main else OtherRankError(message, InputError.exit_code)


def _refuse_indivisible(config: TrainingConfig, world: DistributedContext) -> None:
    """Refuse a batch that the number of processes or the micro-batch does not divide.

    Raises:
        InputError: names the nearest size that fits.
    """
    size = config.batch_size
    if size % world.size:
        below = size // world.size * world.size
        nearest = " and ".join(str(n) for n in (below, below + world.size) if n)
        raise InputError(f"{world.size} processes do not divide a batch of {size}; the nearest are {nearest}")
    if config.run.micro_batch is not None:
        check_micro_batch(config.run.micro_batch, size // world.size)


def _choose_precision(
    config: TrainingConfig, device: torch.device, world: DistributedContext, progress: Progress
) -> str:
    """Return `fp32` or `bf16`, and report the choice and its reason."""
    able = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else _cpu_has_bf16()
    precision = config.run.precision
    if precision == "auto":
        precision = "bf16" if able else "fp32"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    why = "" if config.run.device != "auto" or device.type == "cuda" else " (no CUDA device found)"
    no_bf16 = " (no bf16 arithmetic in this hardware)" if config.run.precision == "auto" and not able else ""
    if world.is_main:
        many = f"{world.size} processes, each on " if world.size > 1 else ""
        progress.note(f"device: {many}{name}{why}; precision: {precision}{no_bf16}")
    return precision


def _cpu_has_bf16() -> bool:
    # Without these instructions, bf16 on a CPU is emulated and slower than fp32.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
