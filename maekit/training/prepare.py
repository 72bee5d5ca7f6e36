"""What is settled before the first step: device and precision, model and data, and what is refused."""

import hashlib
import math
from pathlib import Path

import torch

from maekit import files, runs
from maekit.config import PretrainConfig, TrainingConfig
from maekit.encoder_file import check_external_data
from maekit.errors import DamagedShard, ElsewhereError, InputError
from maekit.images import Preprocess
from maekit.mae.autoencoder import MaskedAutoencoder
from maekit.mae.loading import fill_in, initialize_from, resolve_model
from maekit.mae.normalize import Normalizer
from maekit.mae.targets import PcaTarget
from maekit.progress import Progress
from maekit.runs import RunDirectory
from maekit.shards.read import ShardSet, open_shards
from maekit.shards.remote import RemoteCache
from maekit.shards.spec import find_shards
from maekit.training.distributed import World
from maekit.training.pca import fit_pca
from maekit.training.step import check_micro_batch


def total_steps(config: TrainingConfig, samples: int) -> int:
    """Return the optimiser steps of the run: as given, or ceil(epochs · N / batch)."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    return math.ceil(config.epochs * samples / config.batch_size)


def resolve(config: PretrainConfig, run: RunDirectory) -> None:
    """Fill in what the config leaves to the model that it starts from, and refuse a directory of something else."""
    if runs.is_run(run.path) and (begun := run.config().model).init_from == config.model.init_from:
        # What an earlier start resolved; the weights that it began with may be gone by now.
        fill_in(config.model, vars(begun))
    else:
        resolve_model(config.model)
    height, width = config.model.size
    if height == width:
        config.model.image_size = height
    config.model.tokenizer_sha256 = tokenizer_digest(Path(config.model.tokenizer)) if config.model.tokenizer else None
    _refuse_foreign_directory(run)


def tokenizer_digest(path: Path) -> str:
    """Return a SHA-256 that names an ONNX file and the files that it keeps weights in.

    Raises:
        InputError: it cannot be read, or names files that it must not.
    """
    try:
        digests = [files.sha256_file(file) for file in (path, *check_external_data(path))]
    except InputError as error:
        raise InputError(f"--tokenizer: {error}") from error
    except OSError as error:
        raise InputError(f"cannot read --tokenizer {path}: {error.strerror}") from error
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def newest_checkpoint(run: RunDirectory, progress: Progress) -> runs.Checkpoint | None:
    """Return what a run goes on from, or None where it has not begun; tells of damaged checkpoints.

    Raises:
        InputError: there are checkpoints, and none is whole.
    """
    newest = run.newest_valid(progress.note)
    if newest is None and (lost := run.list_checkpoints()):
        raise InputError(f"none of {len(lost)} checkpoints in {run.checkpoints} is valid; delete it to start anew")
    return newest


def start_from(config: PretrainConfig, model: MaskedAutoencoder, shards: ShardSet, progress: Progress) -> None:
    """Give a new model what it does not learn: the weights to start from, and the basis of a PCA target."""
    if config.model.init_from:
        progress.note(initialize_from(model, config.model.init_from, config.model))
    if isinstance(model.target, PcaTarget) and not model.target.is_fitted:
        data = config.data
        fit_pca(
            model.target,
            shards,
            prepare=Preprocess.for_size(config.model.size, data.mean, data.std),
            normalizer=Normalizer(data.mean, data.std, torch.device("cpu"), channels=config.model.channels),
            patch_size=model.patch_size,
            progress=progress,
        )


def index_shards(config: TrainingConfig, world: World, progress: Progress) -> ShardSet:
    """Index the training set, and see that a cache for remote shards is large enough."""
    shards = open_set(config, config.shards, progress, "index shards")
    if world.is_main:
        progress.note(f"{shards.samples} samples in {len(shards.shards)} shards")
    _refuse_small_cache(config, shards)
    return shards


def open_set(config: TrainingConfig, specs: tuple[str, ...], progress: Progress, what: str) -> ShardSet:
    """Find and index the shards of some input specs, showing progress under the name of `what`.

    Raises:
        InputError: there are none, or damaged ones that are not to be left out.
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


def refuse_different_data(shards: ShardSet, world: World) -> None:
    """See that all ranks read the same data; 48 bits of the digest survive as a float."""
    numbers = [int(number) for (number,) in world.gather([float(int(shards.digest[:12], 16))])]
    for rank, number in enumerate(numbers):
        if number != numbers[0]:
            message = f"rank {rank} reads other shards than rank 0 does: each machine must see the same set"
            raise InputError(message) if world.is_main else ElsewhereError(message, InputError.exit_code)


def refuse_indivisible(config: TrainingConfig, world: World) -> None:
    """Refuse a batch that the processes, or a micro-batch, do not divide.

    Raises:
        InputError: names the nearest that fits.
    """
    size = config.batch_size
    if size % world.size:
        below = size // world.size * world.size
        nearest = " and ".join(str(n) for n in (below, below + world.size) if n)
        raise InputError(f"{world.size} processes do not divide a batch of {size}; the nearest are {nearest}")
    if config.run.micro_batch is not None:
        check_micro_batch(config.run.micro_batch, size // world.size)


def _refuse_small_cache(config: TrainingConfig, shards: ShardSet) -> None:
    """See that a window of remote shards and the next one fit into the cache; else each read would be a download."""
    if shards.remote is None:
        return
    sizes = [shards.bytes_of(shard) for shard, file in enumerate(shards.shards) if file.url]
    shards.remote.refuse_if_too_small(min(2 * config.data.window, len(sizes)), max(sizes))


def choose_device(config: TrainingConfig) -> str:
    """Return `cpu` or `cuda`.

    Raises:
        InputError: CUDA is asked for and not there.
    """
    has_cuda = torch.cuda.is_available()
    if config.run.device == "cuda" and not has_cuda:
        raise InputError(
            "--device cuda: PyTorch finds no CUDA device here; check `nvidia-smi` and that this is a CUDA build of "
            f"torch (it is {torch.__version__}), or use --device cpu"
        )
    return "cuda" if has_cuda and config.run.device != "cpu" else "cpu"


def choose_precision(config: TrainingConfig, device: torch.device, world: World, progress: Progress) -> str:
    """Return `fp32` or `bf16`, and tell what was chosen and why."""
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
    # Without these instructions bf16 on a CPU is emulated, and slower than fp32.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def loader_workers(config: TrainingConfig, device: torch.device, world: World) -> int:
    """Return how many processes read and decode for this one."""
    if config.data.workers is not None:
        return config.data.workers
    # On a CPU the model itself needs the cores; one worker keeps ahead of it.
    return min(16, world.cores) if device.type == "cuda" else 1


def _refuse_foreign_directory(run: RunDirectory) -> None:
    if run.path.is_dir() and not runs.is_run(run.path):
        others = sorted(p.name for p in run.path.iterdir() if not p.name.startswith("."))
        if others:
            raise InputError(f"{run.path} is no run (it holds {others[0]}); choose an empty or new --out")
    elif run.path.exists() and not run.path.is_dir():
        raise InputError(f"{run.path} is a file; --out names a directory")
