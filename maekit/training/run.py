"""`maekit pretrain`: from a config to a run directory, and on from where it was killed.

The order of things: check the config -> join the other processes -> resolve the model -> index the shards -> build the
model -> own the directory -> find what to resume, or start from weights -> compare with what is there -> write the
config -> loop -> write the encoder. The main process (rank 0) alone reads and writes the run directory.
"""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from maekit import files, runs
from maekit.config import DEFAULT_EPOCHS, PretrainConfig, dump_toml, fields_of, parse_duration
from maekit.errors import ElsewhereError, InputError, MaekitError, Stopped
from maekit.images import Preprocess
from maekit.mae.autoencoder import MaskedAutoencoder, build_autoencoder
from maekit.mae.encoder import timm_arguments
from maekit.mae.mask_shapes import MaskShape
from maekit.mae.normalize import Normalizer
from maekit.mae.weights import encoder_bytes
from maekit.pictures import encode_png
from maekit.progress import Progress, Silent, duration
from maekit.runs import RunDirectory
from maekit.shards.order import Order
from maekit.shards.read import ShardSet
from maekit.signals import stop_on_signal
from maekit.training import checkpoint, distributed, metrics
from maekit.training.board import Board
from maekit.training.checkpoint import CheckpointWriter
from maekit.training.crops import Augmentation, CropLoader, Watch
from maekit.training.data import Division, ExactSource, StepBatches, Uploader, make_loader, stop_workers
from maekit.training.distributed import World
from maekit.training.kernels import choose_kernels
from maekit.training.loop import Cadence, Hooks, Tally, Trainer
from maekit.training.optim import Schedule, make_optimizer, make_schedule
from maekit.training.pictures import draw_samples
from maekit.training.prepare import (
    choose_device,
    choose_precision,
    index_shards,
    loader_workers,
    newest_checkpoint,
    open_set,
    refuse_different_data,
    refuse_indivisible,
    resolve,
    start_from,
    total_steps,
)
from maekit.training.ram import DecodedSet
from maekit.training.step import Objective, Step, choose_micro_batch
from maekit.training.tokenizer import Tokenizer
from maekit.training.validation import Validation

_BAD_SHOWN = 10  # bad samples named; after that they are counted only
# The first steps pay for what is done once; the rate after them tells how long the run will take.
_WARM_STEPS, _ESTIMATE_SECONDS = 3, 10.0


@dataclass(frozen=True)
class PretrainResult:
    """What a finished run amounts to; `--json` prints it.

    Attributes:
        out: the run directory.
        steps: optimiser steps done.
        samples: images trained on, repeats counted.
        loss: mean loss over the last logged steps; None where no row of metrics is left.
        val_loss: the last loss on held-out images; None without `--val`.
        images_per_second: over this process's part of the run, on all ranks together.
        data_wait: share of this process's time spent waiting for data.
        bad: samples replaced, over the whole run.
        skipped: steps left out because their gradient was not finite, over the whole run.
        resumed_from: the step that this process went on from; 0 for a fresh start.
        already_finished: whether there was nothing left to do.
    """

    out: str
    steps: int
    samples: int
    loss: float | None
    val_loss: float | None
    images_per_second: float
    data_wait: float
    bad: int
    skipped: int
    resumed_from: int
    already_finished: bool = False


def pretrain(config: PretrainConfig, progress: Progress | None = None) -> PretrainResult:
    """Pre-train a masked autoencoder; called again with the same config, go on or say that it is finished.

    In several processes (`torchrun`), each calls this with the same config and all return the same.

    Raises:
        InputError: bad usage, damaged or missing data, or a directory of another run; found before any step.
        Stopped: SIGTERM or SIGINT came to any of the processes, or the time is over; everything is saved.
        ElsewhereError: another process of the run failed or was stopped, and raises the error itself.
        MaekitError: failed while working.
    """
    progress = progress or Silent()
    config = copy.deepcopy(config)
    if config.epochs is None and config.steps is None:
        config.epochs = DEFAULT_EPOCHS
    config.validate()
    run = RunDirectory(Path(config.out))
    files.require_utf8(run.path)
    stop = _Stop(config.run.max_time)
    kind = choose_device(config)
    with (
        stop_on_signal(stop.heed) as stop.received_signal,
        _device_errors(),
        distributed.join(kind) as world,
        ExitStack() as stack,
    ):
        device = torch.device(kind, world.local_rank) if kind == "cuda" else torch.device(kind)

        def main(work: Callable[[], Any]) -> Any:
            """Do some work on the main process, and fail on all if it fails."""
            return world.together(lambda: work() if world.is_main else None)

        main(lambda: refuse_indivisible(config, world))
        main(lambda: resolve(config, run))
        config = world.share(config)
        precision = choose_precision(config, device, world, progress)
        shards = world.in_turn(lambda: index_shards(config, world, progress))
        refuse_different_data(shards, world)
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        model = world.together(lambda: build_autoencoder(config.model, seed=config.seed))
        main(lambda: stack.enter_context(files.sole_owner(run.path)))

        # Asked inside the lock: a former process may just have saved its last checkpoint.
        newest = main(lambda: newest_checkpoint(run, progress))
        # Of a checkpoint the main process alone knows, and all must come to the same exchanges.
        main(lambda: None if newest else start_from(config, model, shards, progress))
        return _Run(config, run, shards, model.to(device), device, precision, world, progress, stop).go(newest)


class _Stop:
    """When to stop: at once as long as nothing has begun, at the next step boundary later on.

    Args:
        max_time: as in `3h50m`, from here on; None is for ever.
    """

    def __init__(self, max_time: str | None) -> None:
        self._max_time = max_time
        self._until = time.monotonic() + (parse_duration(max_time) if max_time else math.inf)
        self.received_signal: Callable[[], str | None] = lambda: None
        self.has_begun = False
        # A start that takes longer than the time it is given must still take a step, or none would ever be taken.
        self.has_stepped = False

    def heed(self) -> None:
        """Stop a start that has nothing to save yet; called in the middle of it, by the signal.

        Raises:
            Stopped: the training has not begun.
        """
        if not self.has_begun:
            raise Stopped(
                "stopped by a signal before the first step of this start; run the same command again to go on"
            )

    def reason(self) -> str | None:
        """Return why to stop at the next step boundary, or None."""
        if self.has_stepped and time.monotonic() > self._until:
            return f"--max-time {self._max_time}"
        return self.received_signal()


@contextlib.contextmanager
def _device_errors() -> Iterator[None]:
    """Tell in one line of a device that is too small, and of a compiler that cannot compile."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = str(error).splitlines()[0]
        raise MaekitError(f"the device's memory is too small for this model, or taken by others: {said}") from error
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MaekitError(f"compiling the step failed: {said}; --no-compile goes without") from error


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
        world: World,
        progress: Progress,
        stop: _Stop,
    ) -> None:
        self.config, self.run, self.shards, self.model = config, run, shards, model
        self.device, self.world, self.progress, self.stop = device, world, progress, stop
        self.steps = total_steps(config, shards.samples)
        normalizer = Normalizer(config.data.mean, config.data.std, device, channels=config.model.channels)
        self.objective = Objective(model, normalizer)
        self.forward = choose_kernels(model, device, precision)
        self.optimizer = make_optimizer(model, config.optimizer)
        self.order = Order(shards.counts, seed=config.seed, digest=shards.digest, window=config.data.window)
        self.size = config.model.size
        self.masks = MaskShape(config.model.masking, model.grid, config.model.mask_ratio)
        self.tokenizer = world.together(self._open_tokenizer)
        self.prepare = Preprocess.for_size(self.size, config.data.mean, config.data.std)
        self.bad_shown = 0
        self.board: Board | None = None
        self.writer: CheckpointWriter | None = None
        self.warm: tuple[float, int] | None = None
        self.estimated = False

    def _open_tokenizer(self) -> Tokenizer | None:
        model = self.config.model
        if model.tokenizer is None or model.vocabulary is None:
            return None
        return Tokenizer(
            Path(model.tokenizer),
            size=self.size,
            grid=self.model.grid,
            vocabulary=model.vocabulary,
            device=self.device,
            threads=torch.get_num_threads(),
        )

    def go(self, newest: runs.Checkpoint | None) -> PretrainResult:
        """Go on from a checkpoint (known to the main process), or begin."""
        begun = self.world.together(lambda: self._take_up(newest) if self.world.is_main else None)
        begun = self.world.share(begun)
        tally = Tally(bad=begun["bad"], skipped=begun["skipped"])
        first = int(begun["step"])
        if begun["finished"]:
            if self.world.is_main:
                self.progress.note(f"{self.run.path} is finished: {self.steps} steps; nothing left to do")
            return self._result(self.steps, tally, self.steps, already_finished=True)
        if first:
            distributed.share_optimizer(self.optimizer, self.world)
        done, stopped_by = self._train(first, tally)
        if done < self.steps:
            message = (
                f"stopped by {stopped_by} after step {done} of {self.steps}, everything is saved; "
                "run the same command again to go on"
            )
            raise Stopped(message) if self.world.is_main else ElsewhereError(message, Stopped.exit_code)
        self.world.together(lambda: self._write_encoder() if self.world.is_main else None)
        return self._result(done, tally, first)

    def _take_up(self, newest: runs.Checkpoint | None) -> dict[str, Any]:
        """Compare with what is there, load it, and cut back what lies behind it; return where the run stands."""
        # Where nothing was saved yet, nothing is lost by other settings.
        if newest is not None:
            self._refuse_other_training(newest)
        if newest is not None and newest.step == self.steps and self.run.encoder_file.exists():
            return {"bad": 0, "skipped": 0, **newest.state(), "finished": True}
        files.write_atomically(self.run.config_file, dump_toml(self.config).encode())
        state = {"step": 0, "bad": 0, "skipped": 0, "finished": False}
        if newest is not None:
            state |= checkpoint.load(newest, self.model, self.optimizer)
            self.progress.note(f"resuming {self.run.path} after step {state['step']} of {self.steps}")
        first = int(state["step"])
        self._sweep()
        metrics.cut_back(self.run.metrics_file, first)
        checkpoint.discard_after(self.run, first)
        checkpoint.prune(self.run, self.config.run.keep_checkpoints, self._retains)
        return state

    def _sweep(self) -> None:
        """Delete what killed runs left unfinished, and make the folders."""
        try:
            for folder in (self.run.path, self.run.path / "pictures"):
                for leftover in folder.glob(".*.tmp"):
                    leftover.unlink(missing_ok=True)
            self.run.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise files.write_failure(self.run.checkpoints, error) from error

    def _train(self, first: int, tally: Tally) -> tuple[int, str]:
        config, world = self.config, self.world
        schedule = make_schedule(
            config.optimizer, batch_size=config.batch_size, samples=self.shards.samples, steps=self.steps
        )
        division = self._divide()
        validation = self._open_validation(division)
        step = self._make_step(schedule)
        watch = Watch(workers := loader_workers(config, self.device, world))
        crops = CropLoader(
            self.shards,
            self.order,
            Augmentation(
                self.size,
                self.prepare.resize,
                config.seed,
                config.data.augmentation,
                config.data.crop_scale,
                config.data.flip,
                config.data.color_jitter,
            ),
            self.masks,
            masks=config.model.masks_per_image,
            watch=watch,
            decoded=self._decode_all(),
        )
        source = ExactSource(self.order, division, first=first, last=self.steps)
        on_cuda = self.device.type == "cuda"
        chunks = iter(make_loader(source, crops, division, workers=workers, prefetch=config.data.prefetch, pin=on_cuda))
        # What is downloaded has limits of its own; a worker that waits for it makes no progress that shows here.
        patience = math.inf if self.shards.remote else config.data.patience
        batches = StepBatches(chunks, division, shards=self.shards, watch=watch, patience=patience)
        self.progress.start("pretrain", self.steps, first)
        try:
            with ExitStack() as stack:
                if world.is_main:
                    keep = config.run.keep_checkpoints
                    self.writer = stack.enter_context(
                        CheckpointWriter(self.run, self.model, self.optimizer, keep=keep, retain=self._retains)
                    )
                    if config.run.tensorboard:
                        self.board = Board(self.run.path / "tensorboard", first)
                        stack.callback(self.board.close)
                hooks = Hooks(
                    advance=self._advance,
                    log=self._log,
                    checkpoint=self._save,
                    failure=lambda: self.writer.failure() if self.writer else None,
                    picture=self._draw,
                    validate=lambda done: self._validate(validation, done),
                    stop_requested=lambda: self.stop.reason() is not None,
                    keys=self._keys_of_step,
                    bad=self._tell_bad,
                    note=self.progress.note,
                )
                trainer = Trainer(
                    step,
                    schedule,
                    world,
                    self.device,
                    config.batch_size,
                    self.shards.samples,
                    config.data.max_bad,
                    config.run.skip_nonfinite,
                    self._cadence(validation is not None),
                    hooks,
                )
                self.stop.has_begun = True
                done = trainer.run(batches, first=first, last=self.steps, tally=tally)
                # Nobody leaves before the last checkpoint is on disk: a launcher would end the others.
                world.together(lambda: self.writer.finish() if self.writer else None)
                return done, self.stop.reason() or "a signal to another process"
        except torch.OutOfMemoryError as error:
            raise MaekitError(
                f"the device's memory is too small for {division.micro_batch} images at a time; "
                f"try --micro-batch {max(1, division.micro_batch // 2)}"
            ) from error
        except RuntimeError as error:
            # The DataLoader raises this in the middle of whatever runs when one of its workers is killed.
            if "DataLoader worker" in str(error):
                raise batches.failure(error) from error
            if world.size > 1 and distributed.lost_rank(error):
                raise distributed.rank_is_gone(error) from error
            raise
        finally:
            stop_workers(chunks)
            self.progress.stop()

    def _divide(self) -> Division:
        """Divide the batch among the ranks, and a rank's share into what fits into memory."""
        size, world = self.config.batch_size, self.world
        share = size // world.size
        micro_batch = self.config.run.micro_batch
        if micro_batch is None:
            state = checkpoint.optimizer_tensors(self.optimizer).values()
            there = sum(tensor.nbytes for tensor in state)
            masks = self.config.model.masks_per_image
            largest = choose_micro_batch(self.objective, share, self.size, self.forward, there, masks)
            micro_batch = int(min(part for (part,) in world.gather([largest])))
            if micro_batch < share and world.is_main:
                self.progress.note(f"micro-batch: {micro_batch} of {share} images at a time, by the memory there is")
        height, width = self.size
        return Division(size, micro_batch, world.rank, world.size, height * width * 3)

    def _make_step(self, schedule: Schedule) -> Step:
        compile_it = self.config.run.compile
        return Step(
            self.objective.train(),
            self.optimizer,
            schedule,
            forward=self.forward,
            upload=Uploader(self.device, self.tokenizer),
            world=self.world,
            clip=self.config.optimizer.clip_grad,
            compile=self.device.type == "cuda" if compile_it is None else compile_it,
        )

    def _decode_all(self) -> DecodedSet | None:
        if self.config.data.cache != "ram":
            return None
        self.progress.start("decode into memory", self.shards.samples)
        try:
            decoded = self.world.together(
                lambda: DecodedSet(self.shards, sharing=self.world.local_size, on_images=self.progress.advance)
            )
        finally:
            self.progress.stop()
        if self.world.is_main:
            size = files.describe_bytes(decoded.bytes)
            self.progress.note(f"{self.shards.samples} images decoded, {size} of memory in each process")
        return decoded

    def _open_validation(self, division: Division) -> Validation | None:
        if not self.config.data.val:
            return None
        specs = self.config.data.val
        shards = self.world.in_turn(lambda: open_set(self.config, specs, self.progress, "index held-out shards"))
        return Validation(
            shards,
            images=self.config.data.val_images,
            prepare=self.prepare,
            batch_size=min(division.micro_batch, 64),
            threads=self.world.cores,
            seed=self.config.seed,
            world=self.world,
            shape=self.masks,
            tokenizer=self.tokenizer,
        )

    def _cadence(self, validating: bool) -> Cadence:
        run = self.config.run
        every = run.checkpoint_every or min(1000, -(-self.steps // 10))
        return Cadence(
            log=run.log_every or min(50, -(-self.steps // 100)),
            checkpoint=every,
            checkpoint_seconds=60 * run.checkpoint_minutes,
            keep=run.keep_every or 0,
            # Only the main process draws; the others go on to the next boundary, and wait there. Tokens are no pixels.
            pictures=(every if run.pictures_every is None else run.pictures_every)
            if self.world.is_main and self.tokenizer is None
            else 0,
            validate=(run.val_every or every) if validating else 0,
        )

    def _retains(self, step: int) -> bool:
        return bool(self.config.run.keep_every) and step % (self.config.run.keep_every or 1) == 0

    def _validate(self, validation: Validation | None, done: int) -> None:
        if validation is not None:
            self._log({"step": done, **validation.measure(self.model, self.objective.normalizer, self.forward)})

    def _advance(self, done: int) -> None:
        self.stop.has_stepped = True
        self.progress.advance(done)
        if self.estimated or not self.world.is_main:
            return
        now = time.monotonic()
        if self.warm is None:
            self.warm = (math.inf, done + _WARM_STEPS - 1)
        since, step = self.warm
        if since == math.inf:
            if done >= step:
                self.warm = (now, done)
        elif now - since >= _ESTIMATE_SECONDS:
            rate, left = (done - step) / (now - since), self.steps - done
            self.estimated = True
            self.progress.note(
                f"{rate * self.config.batch_size:.1f} img/s: about {duration(left / rate)} for the {left} steps left"
            )

    def _log(self, row: dict[str, Any]) -> None:
        if not self.world.is_main:
            return
        metrics.append(self.run.metrics_file, row)
        if self.board is not None:
            self.board.row(row)
        if "loss" in row:
            self.progress.figures(row)

    def _save(self, done: int, tally: Tally) -> None:
        if self.writer is not None:
            self.writer.save(
                {
                    "step": done,
                    "bad": tally.bad,
                    "skipped": tally.skipped,
                    "data_digest": self.shards.digest,
                    "samples_per_epoch": self.shards.samples,
                }
            )

    def _draw(self, done: int) -> None:
        picture = draw_samples(self.objective, self.shards, self.prepare, self.masks, seed=self.config.seed)
        if picture is None:
            return
        files.write_atomically(self.run.picture(done), encode_png(picture))
        if self.board is not None:
            self.board.picture(picture, done)

    def _tell_bad(self, line: str) -> None:
        if self.bad_shown < _BAD_SHOWN:
            self.progress.note(f"replaced by another sample: {line}")
        self.bad_shown += 1

    def _keys_of_step(self, step: int, rank: int) -> list[str]:
        share = self.config.batch_size // self.world.size
        start = (step - 1) * self.config.batch_size + rank * share
        places = self.order.slice(start, start + share)
        return [
            f"{self.shards.shards[s].name} {self.shards.index(s).key(o)}"
            for s, o in zip(places.shards.tolist(), places.ordinals.tolist(), strict=True)
        ]

    def _write_encoder(self) -> None:
        description = {
            "model": self.config.model.name,
            "timm_arguments": timm_arguments(self.config.model),
            "preprocess": self.prepare.to_json(),
            "step": self.steps,
            "data_digest": self.shards.digest,
        }
        files.write_atomically(self.run.encoder_file, encoder_bytes(self.model.encoder, description))

    def _refuse_other_training(self, newest: runs.Checkpoint) -> None:
        """Compare with the config that the run was started with, key by key, and with its data."""
        there = {key: value for key, value, free in fields_of(self.run.config()) if not free}
        for key, value, free in fields_of(self.config):
            if not free and there.get(key) != value:
                if key == "model.tokenizer_sha256" and value and there.get(key):
                    raise InputError(
                        f"the tokenizer {self.config.model.tokenizer} is not the one that {self.run.path} was started "
                        "with; go on with that one, or start another --out"
                    )
                before, now = ("not set" if v is None else v for v in (there.get(key), value))
                raise InputError(
                    f"{self.run.path} was started with {key} = {before}, and now it is {now}; go on with the old value "
                    f"(--config {self.run.config_file} has all of them), or start another --out from these weights "
                    f"with --init-from {self.run.path}"
                )
        if newest.state()["data_digest"] != self.shards.digest:
            raise InputError(
                f"{self.run.path} was trained on other data (its digest differs: shards were added, removed, renamed "
                "or changed); go on with the old data or choose another --out"
            )

    def _result(self, done: int, tally: Tally, first: int, *, already_finished: bool = False) -> PretrainResult:
        rows = self.run.metrics() if self.world.is_main else []
        held_out = [row["val_loss"] for row in rows if "val_loss" in row]
        result = PretrainResult(
            out=str(self.run.path),
            steps=done,
            samples=done * self.config.batch_size,
            loss=next((row["loss"] for row in reversed(rows) if "loss" in row), None),
            val_loss=held_out[-1] if held_out else None,
            images_per_second=round((done - first) * self.config.batch_size / tally.seconds, 2)
            if tally.seconds
            else 0.0,
            data_wait=round(tally.wait / tally.seconds, 4) if tally.seconds else 0.0,
            bad=tally.bad,
            skipped=tally.skipped,
            resumed_from=first,
            already_finished=already_finished,
        )
        shared: PretrainResult = self.world.share(result)
        return shared
