"""A training run, whatever is trained: own the directory, go on from the newest checkpoint, loop, save, finish.

The order of things: find what to resume -> compare with what is there -> write the config -> loop -> finish. The main
process (rank 0) alone reads and writes the run directory. What is trained is a `Task`.
"""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from maekit import runs
from maekit.config import TrainingConfig, total_steps
from maekit.config.settings import dump_toml, fields_of
from maekit.images import Pixels
from maekit.runs import RunDirectory
from maekit.shards.order import Order
from maekit.shards.read import ShardSet
from maekit.sheet import encode_png
from maekit.system import files
from maekit.system.errors import ElsewhereError, InputError, MaekitError, Stopped
from maekit.system.progress import Progress, duration
from maekit.training import checkpoint, distributed, metrics
from maekit.training.checkpoint import CheckpointWriter
from maekit.training.crops import CropLoader, Watch
from maekit.training.data import Division, ExactSource, StepBatches, Upload, make_loader, stop_workers
from maekit.training.distributed import World
from maekit.training.image_cache import DecodedSet
from maekit.training.launch import Stop
from maekit.training.loop import Cadence, Hooks, Tally, Trainer
from maekit.training.optim import Schedule
from maekit.training.prepare import loader_workers
from maekit.training.step import Objective, Step, choose_micro_batch
from maekit.training.tensorboard_log import Board

_BAD_SHOWN = 10  # bad samples named; after that they are counted only
# The first steps pay for what is done once; the rate after them tells how long the run will take.
_WARM_STEPS, _ESTIMATE_SECONDS = 3, 10.0


class Task(Protocol):
    """What is trained, and what comes of it."""

    @property
    def name(self) -> str:
        """Name of the work, for the progress."""

    @property
    def config(self) -> TrainingConfig:
        """Settings of the run."""

    @property
    def model(self) -> torch.nn.Module:
        """What is saved in checkpoints."""

    @property
    def objective(self) -> Objective:
        """What is minimised."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Over its parameters."""

    @property
    def forward(self) -> Callable[[], AbstractContextManager[Any]]:
        """A fresh context for the forward pass."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images, in pixels."""

    @property
    def masks(self) -> int:
        """Masks of each image."""

    @property
    def upload(self) -> Upload:
        """From chunks on the host to the arguments of the objective."""

    @property
    def clip_grad(self) -> float | None:
        """Largest norm of the gradient."""

    @property
    def pictures(self) -> bool:
        """Whether there is anything to draw."""

    @property
    def otherwise(self) -> str:
        """What to do where a run's settings are not the ones it was started with, besides taking those."""

    def schedule(self, steps: int) -> Schedule:
        """Return the learning rate of a run of so many steps."""

    def crops(self, watch: Watch, decoded: DecodedSet | None) -> CropLoader:
        """Return what makes images of places in the order."""

    def fits(self, count: int) -> bool:
        """Whether so many images may go through the model at a time, whatever the memory."""

    def begin_step(self, done: int) -> None:
        """Prepare for the step that follows `done` steps; called on every rank."""

    def open_validation(self, division: Division) -> Callable[[], dict[str, Any]] | None:
        """Return what measures the model on held-out images, on all ranks together; None where nothing does."""

    def draw(self) -> Pixels | None:
        """Return a picture of how the model does; called on the main process."""

    def difference(self, key: str, before: Any, now: Any) -> str | None:
        """Return what to say of a setting that is not what the run was started with, where that is not the usual."""

    def read_config(self, run: RunDirectory) -> TrainingConfig:
        """Return the settings that a run was started with."""

    def begin(self) -> None:
        """Write what else a run begins with, beside its settings; called on the main process."""

    def is_finished(self) -> bool:
        """Whether what the run is for has been written."""

    def finish(self, steps: int) -> None:
        """Write what the run was for; called on the main process."""


@dataclass(frozen=True)
class Finished:
    """What a finished run amounts to.

    Attributes:
        steps: optimiser steps done.
        rows: of metrics; on the main process.
        tally: what was counted.
        resumed_from: the step that this process went on from; 0 for a fresh start.
        already_finished: whether there was nothing left to do.
    """

    steps: int
    rows: list[dict[str, Any]]
    tally: Tally
    resumed_from: int
    already_finished: bool = False

    def images_per_second(self, batch_size: int) -> float:
        """Return the rate over this process's part of the run, on all ranks together."""
        if not self.tally.seconds:
            return 0.0
        return round((self.steps - self.resumed_from) * batch_size / self.tally.seconds, 2)


class Engine:
    """One process's part of a run.

    Args:
        task: what is trained; its model lies on the device.
        run: the run directory, owned by the main process.
        shards: the training set.
        order: of its samples.
        device: that the model lies on.
        world: the processes of the run.
        progress: is told how it goes on.
        stop: when to stop.
    """

    def __init__(
        self,
        task: Task,
        run: RunDirectory,
        shards: ShardSet,
        order: Order,
        device: torch.device,
        world: World,
        progress: Progress,
        stop: Stop,
    ) -> None:
        self.task, self.config, self.run, self.shards, self.order = task, task.config, run, shards, order
        self.device, self.world, self.progress, self.stop = device, world, progress, stop
        self.steps = total_steps(task.config, shards.samples)
        self.bad_shown = 0
        self.board: Board | None = None
        self.writer: CheckpointWriter | None = None
        self.warm: tuple[float, int] | None = None
        self.estimated = False

    def go(self, newest: runs.Checkpoint | None) -> Finished:
        """Go on from a checkpoint (known to the main process), or begin.

        Raises:
            Stopped: a stop was asked for; everything is saved.
            InputError: the directory is of another run.
            MaekitError: failed while working.
        """
        begun = self.world.on_main(lambda: self._take_up(newest))
        begun = self.world.share(begun)
        tally = Tally(bad=begun["bad"], skipped=begun["skipped"])
        first = int(begun["step"])
        if begun["finished"]:
            if self.world.is_main:
                self.progress.note(f"{self.run.path} is finished: {self.steps} steps; nothing left to do")
            return Finished(self.steps, self._rows(), tally, self.steps, already_finished=True)
        if first:
            distributed.share_optimizer(self.task.optimizer, self.world)
        done, stopped_by = self._train(first, tally)
        if done < self.steps:
            message = (
                f"stopped by {stopped_by} after step {done} of {self.steps}, everything is saved; "
                "run the same command again to go on"
            )
            raise Stopped(message) if self.world.is_main else ElsewhereError(message, Stopped.exit_code)
        self.world.on_main(lambda: self.task.finish(done))
        return Finished(done, self._rows(), tally, first)

    def _rows(self) -> list[dict[str, Any]]:
        return self.run.metrics() if self.world.is_main else []

    def _take_up(self, newest: runs.Checkpoint | None) -> dict[str, Any]:
        """Compare with what is there, load it, and cut back what lies behind it; return where the run stands."""
        # Where nothing was saved yet, nothing is lost by other settings.
        if newest is not None:
            self._refuse_other_training(newest)
        if newest is not None and newest.step == self.steps and self.task.is_finished():
            return {"bad": 0, "skipped": 0, **newest.state(), "finished": True}
        files.write_atomically(self.run.config_file, dump_toml(self.config).encode())
        self.task.begin()
        state = {"step": 0, "bad": 0, "skipped": 0, "finished": False}
        if newest is not None:
            state |= checkpoint.load(newest, self.task.model, self.task.optimizer)
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
        schedule = self.task.schedule(self.steps)
        division = self._divide()
        validation = self.task.open_validation(division)
        step = self._make_step(schedule)
        watch = Watch(workers := loader_workers(config, self.device, world))
        crops = self.task.crops(watch, self._decode_all())
        source = ExactSource(self.order, division, first=first, last=self.steps)
        on_cuda = self.device.type == "cuda"
        chunks = iter(make_loader(source, crops, division, workers=workers, prefetch=config.data.prefetch, pin=on_cuda))
        # What is downloaded has limits of its own; a worker that waits for it makes no progress that shows here.
        patience = math.inf if self.shards.remote else config.data.patience
        batches = StepBatches(chunks, division, shards=self.shards, watch=watch, patience=patience)
        self.progress.start(self.task.name, self.steps, first)
        try:
            with ExitStack() as stack:
                if world.is_main:
                    keep = config.run.keep_checkpoints
                    self.writer = stack.enter_context(
                        CheckpointWriter(
                            self.run, self.task.model, self.task.optimizer, keep=keep, retain=self._retains
                        )
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
            task = self.task
            there = sum(tensor.nbytes for tensor in checkpoint.optimizer_tensors(task.optimizer).values())
            largest = choose_micro_batch(task.objective, share, task.size, task.forward, there, task.masks, task.fits)
            micro_batch = int(min(part for (part,) in world.gather([largest])))
            if micro_batch < share and world.is_main:
                self.progress.note(f"micro-batch: {micro_batch} of {share} images at a time, by the memory there is")
        height, width = self.task.size
        return Division(size, micro_batch, world.rank, world.size, height * width * 3)

    def _make_step(self, schedule: Schedule) -> Step:
        compile_it = self.config.run.compile
        return Step(
            self.task.objective.train(),
            self.task.optimizer,
            schedule,
            forward=self.task.forward,
            upload=self.task.upload,
            world=self.world,
            clip=self.task.clip_grad,
            compile=self.device.type == "cuda" if compile_it is None else compile_it,
            begin=self.task.begin_step,
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

    def _cadence(self, validating: bool) -> Cadence:
        run = self.config.run
        every = run.checkpoint_every or min(1000, -(-self.steps // 10))
        return Cadence(
            log=run.log_every or min(50, -(-self.steps // 100)),
            checkpoint=every,
            checkpoint_seconds=60 * run.checkpoint_minutes,
            keep=run.keep_every or 0,
            # Only the main process draws; the others go on to the next boundary, and wait there.
            pictures=(every if run.pictures_every is None else run.pictures_every)
            if self.world.is_main and self.task.pictures
            else 0,
            validate=(run.val_every or every) if validating else 0,
        )

    def _retains(self, step: int) -> bool:
        return bool(self.config.run.keep_every) and step % (self.config.run.keep_every or 1) == 0

    def _validate(self, validation: Callable[[], dict[str, Any]] | None, done: int) -> None:
        if validation is not None:
            self._log({"step": done, **validation()})

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
        picture = self.task.draw()
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

    def _refuse_other_training(self, newest: runs.Checkpoint) -> None:
        """Compare with the config that the run was started with, key by key, and with its data."""
        there = {key: value for key, value, free in fields_of(self.task.read_config(self.run)) if not free}
        for key, value, free in fields_of(self.config):
            if not free and there.get(key) != value:
                if said := self.task.difference(key, there.get(key), value):
                    raise InputError(said)
                before, now = ("not set" if v is None else v for v in (there.get(key), value))
                raise InputError(
                    f"{self.run.path} was started with {key} = {before}, and now it is {now}; go on with the old value "
                    f"{self.task.otherwise}"
                )
        if newest.state()["data_digest"] != self.shards.digest:
            raise InputError(
                f"{self.run.path} was trained on other data (its digest differs: shards were added, removed, renamed "
                "or changed); go on with the old data or choose another --out"
            )
