"""Preparation before the first step: newest checkpoint, shards, precision, workers, and checks of batch and data."""

import torch

from maekit import runs
from maekit.config import TrainingConfig
from maekit.runs import RunDirectory
from maekit.shards.cache import RemoteCache
from maekit.shards.read import ShardSet, open_shards
from maekit.shards.spec import find_shards
from maekit.system.errors import DamagedShard, InputError, OtherRankError
from maekit.system.progress import Progress
from maekit.training.distributed import DistributedContext
from maekit.training.step import check_micro_batch


def newest_checkpoint(run: RunDirectory, progress: Progress) -> runs.Checkpoint | None:
    """Return the checkpoint to resume from, or None for a new run; reports damaged checkpoints.

    Raises:
        InputError: there are checkpoints, and none is valid.
    """
    newest = run.newest_valid(progress.note)
    if newest is None and (lost := run.list_checkpoints()):
        raise InputError(f"none of {len(lost)} checkpoints in {run.checkpoints} is valid; delete it to start anew")
    return newest


def index_shards(config: TrainingConfig, world: DistributedContext, progress: Progress) -> ShardSet:
    """Index the training set, and check that the cache for remote shards is large enough."""
    shards = open_set(config, config.shards, progress, "index shards")
    if world.is_main:
        progress.note(f"{shards.samples} samples in {len(shards.shards)} shards")
    _refuse_small_cache(config, shards)
    return shards


def open_set(config: TrainingConfig, specs: tuple[str, ...], progress: Progress, what: str) -> ShardSet:
    """Find and index the shards of the input specs; `what` labels the progress.

    Raises:
        InputError: there are no shards, or damaged ones without `skip_damaged`.
    """
    found = find_shards(specs)
    seen = 0

    def on_shard(shard: object) -> None:
        nonlocal seen
        seen += 1
        progress.advance(seen)

    def on_damage(damage: DamagedShard) -> None:
        if config.data.skip_damaged:
            progress.note(f"left out: {damage}")

    progress.start(what, len(found))
    try:
        return open_shards(
            found,
            skip_damaged=config.data.skip_damaged,
            remote=RemoteCache(int(config.data.cache_gb * 1e9)),
            on_shard=on_shard,
            on_damage=on_damage,
        )
    finally:
        progress.stop()


def refuse_different_data(shards: ShardSet, world: DistributedContext) -> None:
    """Check that all ranks read the same data, by 48 bits of the digest, which a float64 holds exactly."""
    numbers = [int(number) for (number,) in world.gather([float(int(shards.digest[:12], 16))])]
    for rank, number in enumerate(numbers):
        if number != numbers[0]:
            message = f"rank {rank} reads other shards than rank 0 does: each machine must see the same set"
            raise InputError(message) if world.is_main else OtherRankError(message, InputError.exit_code)


def refuse_indivisible(config: TrainingConfig, world: DistributedContext) -> None:
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


def _refuse_small_cache(config: TrainingConfig, shards: ShardSet) -> None:
    """Check that two windows of remote shards fit into the cache; otherwise each read would be a download."""
    if shards.remote is None:
        return
    sizes = [shards.bytes_of(shard) for shard, file in enumerate(shards.shards) if file.url]
    shards.remote.refuse_if_too_small(min(2 * config.data.window, len(sizes)), max(sizes))


def choose_precision(
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


def loader_workers(config: TrainingConfig, device: torch.device, world: DistributedContext) -> int:
    """Return the number of worker processes that read and decode for this one."""
    if config.data.workers is not None:
        return config.data.workers
    # On a CPU the model itself needs the cores; one worker is fast enough for it.
    return min(16, world.cores) if device.type == "cuda" else 1
