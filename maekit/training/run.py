"""`maekit pretrain`: from a config to a run directory, and on from where it was killed.

The order of things: check the config -> index the shards -> build the model -> own the directory -> find what to
resume, or start from weights -> compare with what is there -> write the config -> loop -> write the encoder.
"""

import copy
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from maekit import files, runs
from maekit.config import DEFAULT_EPOCHS, PretrainConfig, dump_toml, fields_of
from maekit.errors import DamagedShard, ImageError, InputError, MaekitError, Stopped
from maekit.images import Preprocess, RandomCrop
from maekit.machine import cores
from maekit.mae.autoencoder import MaskedAutoencoder, build_autoencoder
from maekit.mae.encoder import timm_arguments
from maekit.mae.reconstruction import reconstruct, to_pixels
from maekit.mae.weights import encoder_bytes, fill_in, initialize_encoder, resolve_model
from maekit.pictures import sheet
from maekit.progress import Progress, Silent
from maekit.random import Purpose, uniforms
from maekit.runs import RunDirectory
from maekit.shards.order import Order
from maekit.shards.read import ShardSet, open_shards
from maekit.shards.remote import RemoteCache
from maekit.shards.spec import find_shards
from maekit.signals import stop_on_signal
from maekit.training import checkpoint, metrics
from maekit.training.data import CropLoader, ExactSource, Normalizer, make_loader, stop_workers
from maekit.training.loop import Cadence, Hooks, Tally, Trainer
from maekit.training.optim import make_optimizer, make_schedule

_PICTURE_IMAGES = 8
_BAD_SHOWN = 10  # bad samples named; after that they are counted only


@dataclass(frozen=True)
class PretrainResult:
    """What a finished run amounts to; `--json` prints it.

    Attributes:
        out: the run directory.
        steps: optimiser steps done.
        samples: images trained on, repeats counted.
        loss: mean loss over the last logged steps; None where no row of metrics is left.
        images_per_second: over this process's part of the run.
        data_wait: share of this process's time spent waiting for data.
        bad: samples replaced, over the whole run.
        resumed_from: the step that this process went on from; 0 for a fresh start.
        already_finished: whether there was nothing left to do.
    """

    out: str
    steps: int
    samples: int
    loss: float | None
    images_per_second: float
    data_wait: float
    bad: int
    resumed_from: int
    already_finished: bool = False


def pretrain(config: PretrainConfig, progress: Progress | None = None) -> PretrainResult:
    """Pre-train a masked autoencoder; called again with the same config, go on or say that it is finished.

    Raises:
        InputError: bad usage, damaged or missing data, or a directory of another run; found before any step.
        Stopped: SIGTERM or SIGINT came; everything is saved.
        MaekitError: failed while working.
    """
    progress = progress or Silent()
    config = copy.deepcopy(config)
    _refuse_many_processes()
    if config.epochs is None and config.steps is None:
        config.epochs = DEFAULT_EPOCHS
    config.validate()
    run = RunDirectory(Path(config.out))
    files.require_utf8(run.path)
    if runs.is_run(run.path) and (started := run.config().model).init_from == config.model.init_from:
        # What an earlier start resolved; the weights that it began with may be gone by now.
        fill_in(config.model, vars(started))
    else:
        resolve_model(config.model)
    _refuse_foreign_directory(run)
    shards = _index(config, progress)
    device, precision = _choose_device(config, progress)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    model = build_autoencoder(config.model, seed=config.seed)
    with files.sole_owner(run.path):
        # Asked inside the lock: a former process may just have saved its last checkpoint.
        newest = run.newest_valid(progress.note)
        if newest is None and (lost := run.list_checkpoints()):
            raise InputError(f"none of {len(lost)} checkpoints in {run.checkpoints} is valid; delete it to start anew")
        if config.model.init_from and newest is None:
            initialize_encoder(model.encoder, config.model.init_from, config.model)
        return _Run(config, run, shards, model.to(device), device, precision, progress).go(newest)


class _Run:
    """One process's part of a run."""

    def __init__(
        self,
        config: PretrainConfig,
        run: RunDirectory,
        shards: ShardSet,
        model: MaskedAutoencoder,
        device: torch.device,
        precision: str,
        progress: Progress,
    ) -> None:
        self.config, self.run, self.shards, self.model = config, run, shards, model
        self.device, self.precision, self.progress = device, precision, progress
        self.steps = total_steps(config, shards.samples)
        self.normalizer = Normalizer(config.data.mean, config.data.std, device)
        self.optimizer = make_optimizer(model, config.optimizer)
        self.order = Order(shards.counts, seed=config.seed, digest=shards.digest, window=config.data.window)
        self.size = (config.model.image_size, config.model.image_size)
        self.bad_shown = 0

    def go(self, newest: runs.Checkpoint | None) -> PretrainResult:
        if runs.is_run(self.run.path):
            self._refuse_other_training(newest)
        if newest is not None and newest.step == self.steps and self.run.encoder_file.exists():
            self.progress.note(f"{self.run.path} is finished: {self.steps} steps; nothing left to do")
            return self._result(self.steps, Tally(), self.steps, already_finished=True)
        files.write_atomically(self.run.config_file, dump_toml(self.config).encode())
        first = bad = 0
        if newest is not None:
            state = checkpoint.load(newest, self.model, self.optimizer)
            first, bad = state["step"], state["bad"]
            self.progress.note(f"resuming {self.run.path} after step {first} of {self.steps}")
        metrics.cut_back(self.run.metrics_file, first)
        self.run.checkpoints.mkdir(exist_ok=True)
        checkpoint.discard_after(self.run, first)
        checkpoint.prune(self.run, self.config.run.keep_checkpoints)
        done, tally = self._train(first, bad)
        if done < self.steps:
            raise Stopped(
                f"stopped by a signal after step {done} of {self.steps}, everything is saved; "
                "run the same command again to go on"
            )
        self._write_encoder()
        return self._result(done, tally, first)

    def _train(self, first: int, bad: int) -> tuple[int, Tally]:
        config = self.config
        every = config.run.checkpoint_every or min(1000, -(-self.steps // 10))
        pictures = every if config.run.pictures_every is None else config.run.pictures_every
        cadence = Cadence(config.run.log_every or min(50, -(-self.steps // 100)), every, pictures)
        trainer = Trainer(
            self.model.train(),
            self.optimizer,
            make_schedule(
                config.optimizer, batch_size=config.batch_size, samples=self.shards.samples, steps=self.steps
            ),
            self.normalizer,
            self._autocast(),
            config.batch_size,
            self.shards.samples,
            config.data.max_bad,
        )
        loader = make_loader(
            ExactSource(self.order, batch_size=config.batch_size, first=first, last=self.steps),
            CropLoader(
                self.shards,
                self.order,
                RandomCrop(self.size, config.data.crop_scale, config.data.flip, config.seed),
                patches=self.model.patches,
                seed=config.seed,
            ),
            workers=_workers(config, self.device),
            prefetch=config.data.prefetch,
            pin=self.device.type == "cuda",
        )
        self.progress.start("pretrain", self.steps, first)
        batches = iter(loader)
        try:
            with stop_on_signal() as stopped_by:
                hooks = Hooks(
                    advance=self.progress.advance,
                    log=self._log,
                    checkpoint=self._save,
                    picture=self._draw,
                    stop_requested=lambda: stopped_by() is not None,
                    keys=self._keys_of_step,
                    bad=self._tell_bad,
                )
                return trainer.run(batches, first=first, last=self.steps, bad=bad, cadence=cadence, hooks=hooks)
        except RuntimeError as error:
            # The DataLoader raises this in the middle of whatever runs when one of its workers is killed.
            if "DataLoader worker" not in str(error):
                raise
            raise MaekitError(f"reading the data failed: {str(error).splitlines()[0]} Run the command again") from error
        finally:
            stop_workers(batches)
            self.progress.stop()

    def _autocast(self) -> Callable[[], AbstractContextManager[Any]]:
        if self.precision == "bf16":
            return lambda: torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext

    def _log(self, row: dict[str, Any]) -> None:
        metrics.append(self.run.metrics_file, row)
        self.progress.figures(row)

    def _save(self, done: int, bad: int) -> None:
        state = {"step": done, "bad": bad, "data_digest": self.shards.digest, "samples_per_epoch": self.shards.samples}
        checkpoint.save(self.run, self.model, self.optimizer, state)
        checkpoint.prune(self.run, self.config.run.keep_checkpoints)

    def _draw(self, done: int) -> None:
        """Draw the same few images, under the same masks, every time: masked | reconstruction | original."""
        prepare = Preprocess.for_size(self.size, self.config.data.mean, self.config.data.std)
        reader = self.shards.reader()
        images = []
        # Of a remote set, the first shard: eight shards are not downloaded for one picture.
        samples = int(self.shards.counts[self.shards.counts > 0][0]) if self.shards.remote else self.shards.samples
        for number in range(0, samples, -(-samples // _PICTURE_IMAGES)):
            shard, ordinal = self.shards.locate(number)
            try:
                image = prepare(reader.read_image(self.shards.index(shard), ordinal))
                images.append(torch.from_numpy(image.copy()))
            except ImageError:
                continue  # counted where it is trained on; a picture shows what can be shown
        reader.close()
        if not images:
            return
        noise = [
            torch.from_numpy(uniforms(self.model.patches, Purpose.PICTURE, seed=self.config.seed, position=i))
            for i in range(len(images))
        ]
        originals = self.normalizer(torch.stack(images))
        self.model.eval()
        shown = reconstruct(self.model, originals, torch.stack(noise).to(self.device))
        self.model.train()
        mean, std = self.config.data.mean, self.config.data.std
        files.write_atomically(
            self.run.picture(done), sheet([to_pixels(x, mean, std) for x in (shown.masked, shown.full, originals)])
        )

    def _tell_bad(self, bad: list[str]) -> None:
        for line in bad[: max(0, _BAD_SHOWN - self.bad_shown)]:
            self.progress.note(f"replaced by another sample: {line}")
        self.bad_shown += len(bad)

    def _keys_of_step(self, step: int) -> list[str]:
        places = self.order.slice((step - 1) * self.config.batch_size, step * self.config.batch_size)
        return [
            f"{self.shards.shards[s].name} {self.shards.index(s).key(o)}"
            for s, o in zip(places.shards.tolist(), places.ordinals.tolist(), strict=True)
        ]

    def _write_encoder(self) -> None:
        description = {
            "model": self.config.model.name,
            "timm_arguments": timm_arguments(self.config.model),
            "preprocess": Preprocess.for_size(self.size, self.config.data.mean, self.config.data.std).to_json(),
            "step": self.steps,
            "data_digest": self.shards.digest,
        }
        files.write_atomically(self.run.encoder_file, encoder_bytes(self.model.encoder, description))

    def _refuse_other_training(self, newest: runs.Checkpoint | None) -> None:
        """Compare with the config that the run was started with, key by key, and with its data."""
        there = {key: value for key, value, free in fields_of(self.run.config()) if not free}
        for key, value, free in fields_of(self.config):
            if not free and there.get(key) != value:
                raise InputError(
                    f"{self.run.path} was started with {key} = {there.get(key)}, and {value} is asked for now; "
                    "go on with the old value or choose another --out"
                )
        if newest is not None and newest.state()["data_digest"] != self.shards.digest:
            raise InputError(
                f"{self.run.path} was trained on other data (its digest differs: shards were added, removed, renamed "
                "or changed); go on with the old data or choose another --out"
            )

    def _result(self, done: int, tally: Tally, first: int, *, already_finished: bool = False) -> PretrainResult:
        rows = self.run.metrics()
        return PretrainResult(
            out=str(self.run.path),
            steps=done,
            samples=done * self.config.batch_size,
            loss=rows[-1]["loss"] if rows else None,
            images_per_second=round((done - first) * self.config.batch_size / tally.seconds, 2)
            if tally.seconds
            else 0.0,
            data_wait=round(tally.wait / tally.seconds, 4) if tally.seconds else 0.0,
            bad=tally.bad,
            resumed_from=first,
            already_finished=already_finished,
        )


def total_steps(config: PretrainConfig, samples: int) -> int:
    """Return the optimiser steps of the run: as given, or ceil(epochs · N / batch)."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    return math.ceil(config.epochs * samples / config.batch_size)


def _index(config: PretrainConfig, progress: Progress) -> ShardSet:
    found = find_shards(config.shards)
    seen = 0

    def on_shard(shard: object) -> None:
        nonlocal seen
        seen += 1
        progress.advance(seen)

    def on_damage(damage: DamagedShard) -> None:
        if config.data.skip_damaged:
            progress.note(f"left out: {damage}")

    progress.start("index shards", len(found))
    try:
        shards = open_shards(
            found,
            skip_damaged=config.data.skip_damaged,
            remote=RemoteCache(int(config.data.cache_gb * 1e9)),
            on_shard=on_shard,
            on_damage=on_damage,
        )
    finally:
        progress.stop()
    progress.note(f"{shards.samples} samples in {len(shards.shards)} shards")
    _refuse_small_cache(config, shards)
    return shards


def _refuse_small_cache(config: PretrainConfig, shards: ShardSet) -> None:
    """See that a window of remote shards and the next one fit into the cache; else each read would be a download."""
    if shards.remote is None:
        return
    sizes = [shards.bytes_of(shard) for shard, file in enumerate(shards.shards) if file.url]
    shards.remote.refuse_if_too_small(min(2 * config.data.window, len(sizes)), max(sizes))


def _choose_device(config: PretrainConfig, progress: Progress) -> tuple[torch.device, str]:
    has_cuda = torch.cuda.is_available()
    if config.run.device == "cuda" and not has_cuda:
        raise InputError(
            "--device cuda: PyTorch finds no CUDA device here; check `nvidia-smi` and that this is a CUDA build of "
            f"torch (it is {torch.__version__}), or use --device cpu"
        )
    device = torch.device("cuda" if has_cuda and config.run.device != "cpu" else "cpu")
    able = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else _cpu_has_bf16()
    precision = config.run.precision
    if precision == "auto":
        precision = "bf16" if able else "fp32"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    why = "" if config.run.device != "auto" or has_cuda else " (no CUDA device found)"
    no_bf16 = " (no bf16 arithmetic in this hardware)" if config.run.precision == "auto" and not able else ""
    progress.note(f"device: {name}{why}; precision: {precision}{no_bf16}")
    return device, precision


def _cpu_has_bf16() -> bool:
    # Without these instructions bf16 on a CPU is emulated, and slower than fp32.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _workers(config: PretrainConfig, device: torch.device) -> int:
    if config.data.workers is not None:
        return config.data.workers
    from_machine = cores()
    # On a CPU the model itself needs the cores; one worker keeps ahead of it.
    return min(16, from_machine) if device.type == "cuda" else 1


def _refuse_many_processes() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("WORLD_SIZE is set: this version trains in one process; start it without torchrun")


def _refuse_foreign_directory(run: RunDirectory) -> None:
    if run.path.is_dir() and not runs.is_run(run.path):
        others = sorted(p.name for p in run.path.iterdir() if not p.name.startswith("."))
        if others:
            raise InputError(f"{run.path} is no run (it holds {others[0]}); choose an empty or new --out")
    elif run.path.exists() and not run.path.is_dir():
        raise InputError(f"{run.path} is a file; --out names a directory")
