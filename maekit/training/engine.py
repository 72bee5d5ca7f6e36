"""A training run of any `Task`: own the directory, resume from the newest checkpoint, loop, save, finish.

Order: find what to resume -> compare with the existing run -> write the config -> loop -> finish. Only the main process
(rank 0) reads and writes the run directory.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from maekit import runs
from maekit.config import total_steps
from maekit.config.settings import dump_toml, fields_of
from maekit.runs import RunDirectory
from maekit.shards.order import SampleOrder
from maekit.shards.read import ShardSet
from maekit.sheet import encode_png
from maekit.system import files
from maekit.system.errors import InputError, MaekitError, OtherRankError, Stopped
from maekit.system.progress import Progress, duration
from maekit.training import checkpoint, distributed, metrics
from maekit.training.checkpoint import CheckpointWriter
from maekit.training.crops import WorkerProgress
from maekit.training.data import BatchLayout, ExactSource, StepBatches, make_loader, stop_workers
from maekit.training.distributed import DistributedContext
from maekit.training.image_cache import DecodedSet
from maekit.training.intervals import Intervals
from maekit.training.loop import Loop, TrainState
from maekit.training.optim import Schedule, make_schedule
from maekit.training.prepare import loader_workers
from maekit.training.step import Step, choose_micro_batch
from maekit.training.stop import Stop
from maekit.training.task import Task
from maekit.training.tensorboard_log import TensorBoardLog

_BAD_SHOWN = 10  # bad samples reported by name; later ones are only counted
# The first steps include one-time costs; the rate after them gives the estimate of the run's duration.
_WARM_STEPS, _ESTIMATE_SECONDS = 3, 10.0


@dataclass(frozen=True)
class Finished:
    """The result of a finished run.

    Attributes:
        steps: optimiser steps done.
        rows: rows of metrics; on the main process only.
        state: counts over the run.
        resumed_from: the step that this process resumed from; 0 for a fresh start.
        already_finished: whether there was nothing left to do.
    """

    steps: int
    rows: list[dict[str, Any]]
    state: TrainState
    resumed_from: int
    already_finished: bool = False

    def images_per_second(self, batch_size: int) -> float:
        """Return the rate of all ranks together since this start of the run."""
        if not self.state.seconds:
            return 0.0
        return round((self.steps - self.resumed_from) * batch_size / self.state.seconds, 2)


class Engine:
    """One process's part of a run.

    Args:
        task: what is trained; its model is on the device.
        run: the run directory, owned by the main process.
        shards: the training set.
        order: order of its samples.
        device: device of the model.
        world: the processes of the run.
        progress: receives progress updates.
        stop: decides when to stop.
    """

    def __init__(
        self,
        *,
        task: Task,
        run: RunDirectory,
        shards: ShardSet,
        order: SampleOrder,
        device: torch.device,
        world: DistributedContext,
        progress: Progress,
        stop: Stop,
    ) -> None:
        self.task, self.config, self.run, self.shards, self.order = task, task.config, run, shards, order
        self.device, self.world, self.progress, self.stop = device, world, progress, stop
        self.steps = total_steps(task.config, shards.samples)
        self.intervals = Intervals.of(task.config.run, self.steps)
        self.bad_shown = 0
        self.board: TensorBoardLog | None = None
        self.writer: CheckpointWriter | None = None
        self.estimate = _Estimate(self.steps, task.config.batch_size)

    def go(self, newest: runs.Checkpoint | None) -> Finished:
        """Resume from a checkpoint (known to the main process only), or start.

        Raises:
            Stopped: a stop was requested; everything is saved.
            InputError: the directory belongs to another run.
            MaekitError: failed during training.
        """
        begun = self.world.on_main(lambda: self._take_up(newest))
        begun = self.world.share(begun)
        state = TrainState(bad=begun["bad"], skipped=begun["skipped"])
        first = int(begun["step"])
        if begun["finished"]:
            if self.world.is_main:
                self.progress.note(f"{self.run.path} is finished: {self.steps} steps; nothing left to do")
            return Finished(self.steps, self._rows(), state, self.steps, already_finished=True)
        if first:
            distributed.share_optimizer(self.task.optimizer, self.world)
        done, stopped_by = self._train(first, state)
        if done < self.steps:
            message = (
                f"stopped by {stopped_by} after step {done} of {self.steps}, everything is saved; "
                "run the same command again to go on"
            )
            raise Stopped(message) if self.world.is_main else OtherRankError(message, Stopped.exit_code)
        self.world.on_main(lambda: self.task.finish(done))
        return Finished(done, self._rows(), state, first)

    def _rows(self) -> list[dict[str, Any]]:
        return self.run.metrics() if self.world.is_main else []

    def _take_up(self, newest: runs.Checkpoint | None) -> dict[str, Any]:
        """Compare with the checkpoint, load it, and discard everything after it; return the state of the run."""
        # If nothing is saved yet, changed settings lose nothing.
        if newest is not None:
            self._refuse_other_training(newest)
        if newest is not None and newest.step == self.steps and self.task.is_finished():
            return {"bad": 0, "skipped": 0, **newest.state(), "finished": True}
        files.write_atomically(self.run.config_file, dump_toml(self.config).encode())
        self.task.begin()
        state = {"step": 0, "bad": 0, "skipped": 0, "finished": False}
        if newest is not None:
            state |= checkpoint.load(newest, self.task.objective.model, self.task.optimizer)
            self.progress.note(f"resuming {self.run.path} after step {state['step']} of {self.steps}")
        first = int(state["step"])
        self._sweep()
        metrics.cut_back(self.run.metrics_file, first)
        checkpoint.discard_after(self.run, first)
        checkpoint.prune(self.run, self.config.run.keep_checkpoints, self.intervals.keeps)
        return state

    def _sweep(self) -> None:
        """Delete unfinished files of killed runs, and create the folders."""
        try:
            for folder in (self.run.path, self.run.path / "pictures"):
                for leftover in folder.glob(".*.tmp"):
                    leftover.unlink(missing_ok=True)
            self.run.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise files.write_failure(self.run.checkpoints, error) from error

    def _train(self, first: int, state: TrainState) -> tuple[int, str]:
        """Train to the last step, or until a stop is requested; return the steps done and the reason for the stop."""
        config, world = self.config, self.world
        schedule = self._schedule()
        division = self._divide()
        validation = self.task.open_validation(division)
        step = self._make_step(schedule)
        watch = WorkerProgress(workers := loader_workers(config, self.device, world))
        crops = self.task.crops(watch, self._decode_all())
        source = ExactSource(self.order, division, first=first, last=self.steps)
        on_cuda = self.device.type == "cuda"
        chunks = iter(make_loader(source, crops, division, workers=workers, prefetch=config.data.prefetch, pin=on_cuda))
        # Downloads have timeouts of their own; a worker that waits for one shows no progress here.
        patience = math.inf if self.shards.remote else config.data.patience
        batches = StepBatches(chunks, division, shards=self.shards, watch=watch, patience=patience)
        loop = Loop(
            step=step,
            batches=batches,
            schedule=schedule,
            state=state,
            world=world,
            device=self.device,
            batch_size=config.batch_size,
            epoch_samples=self.shards.samples,
            max_bad=config.data.max_bad,
            checkpoint_seconds=60 * config.run.checkpoint_minutes,
            stop_requested=lambda: self.stop.reason() is not None,
            failure=lambda: self.writer.failure() if self.writer else None,
        )
        self.progress.start(self.task.name, self.steps, first)
        try:
            with self._writers(first):
                self.stop.has_begun = True
                done = self._follow(loop, first, validation)
                # No rank exits before the last checkpoint is on disk: a launcher would then end the others.
                world.together(lambda: self.writer.finish() if self.writer else None)
                return done, self.stop.reason() or "a signal to another process"
        except torch.OutOfMemoryError as error:
            raise MaekitError(
                f"the device's memory is too small for {division.micro_batch} images at a time; "
                f"try `micro_batch={max(1, division.micro_batch // 2)}`"
            ) from error
        except RuntimeError as error:
            # When a worker is killed, the DataLoader raises this in the middle of whatever is running.
            if "DataLoader worker" in str(error):
                raise batches.failure(error) from error
            if world.size > 1 and distributed.lost_rank(error):
                raise distributed.rank_is_gone(error) from error
            raise
        finally:
            stop_workers(chunks)
            self.progress.stop()

    def _follow(self, loop: Loop, first: int, validation: Callable[[], dict[str, Any]] | None) -> int:
        """Log, save, validate and draw at the boundaries where each is due; return the steps done."""
        done = saved = first
        for boundary in loop.run(first, self.steps):
            done = boundary.done
            self._tell_bad(boundary.bad)
            if not boundary.must_save:
                self._advance(done)
            saves = boundary.must_save or self.intervals.saves(done)
            validates = validation is not None and not boundary.must_save and self.intervals.validates(done)
            if saves or validates or self.intervals.logs(done):
                self._log_steps(loop, done)
            if saves and done > saved:
                # The row just logged showed that all losses and gradients up to here are finite.
                self._save(done, loop.state)
                loop.saved()
                saved = done
            if validates and validation is not None:
                # After the checkpoint: if a stop is requested during validation, everything is saved already.
                self._log({"step": done, **validation()})
                loop.leave_out()
            if self.world.is_main and not boundary.must_save and self.intervals.draws(done):
                self._draw(done)
        return done

    @contextmanager
    def _writers(self, first: int) -> Iterator[None]:
        """Open the checkpoint writer and the TensorBoard log on the main process."""
        if not self.world.is_main:
            yield
            return
        run, task = self.config.run, self.task
        with ExitStack() as stack:
            self.writer = stack.enter_context(
                CheckpointWriter(
                    self.run,
                    task.objective.model,
                    task.optimizer,
                    keep=run.keep_checkpoints,
                    retain=self.intervals.keeps,
                )
            )
            if run.tensorboard:
                self.board = TensorBoardLog(self.run.path / "tensorboard", first)
                stack.callback(self.board.close)
            yield

    def _schedule(self) -> Schedule:
        config = self.config
        return make_schedule(
            config.optimizer, batch_size=config.batch_size, samples=self.shards.samples, steps=self.steps
        )

    def _divide(self) -> BatchLayout:
        """Divide the batch among the ranks, and each rank's share into micro-batches that fit into memory."""
        size, world = self.config.batch_size, self.world
        share = size // world.size
        micro_batch = self.config.run.micro_batch
        if micro_batch is None:
            task = self.task
            there = sum(tensor.nbytes for tensor in checkpoint.optimizer_tensors(task.optimizer).values())
            largest = choose_micro_batch(task.objective, share, task.size, task.forward, there, task.fits)
            micro_batch = int(min(part for (part,) in world.gather([largest])))
            if micro_batch < share and world.is_main:
                self.progress.note(f"micro-batch: {micro_batch} of {share} images at a time, by the memory there is")
        height, width = self.task.size
        return BatchLayout(size, micro_batch, world.rank, world.size, height * width * 3)

    def _make_step(self, schedule: Schedule) -> Step:
        compile_it = self.config.run.compile
        return Step(
            self.task.objective.train(),
            self.task.optimizer,
            schedule,
            forward=self.task.forward,
            upload=self.task.upload,
            world=self.world,
            clip=self.config.optimizer.clip_grad,
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

    def _advance(self, done: int) -> None:
        """Report a step as done; must not wait for the device."""
        self.stop.has_stepped = True
        self.progress.advance(done)
        if self.world.is_main and (text := self.estimate.after(done)):
            self.progress.note(text)

    def _log_steps(self, loop: Loop, done: int) -> None:
        """Log the steps since the last row.

        Raises:
            MaekitError: a loss or gradient is not finite, and the limit of skipped steps is reached.
        """
        row, broken = loop.row(done)
        most = self.config.run.skip_nonfinite
        for count, step in enumerate(broken, loop.state.skipped - len(broken) + 1):
            names = self._keys_of_step(step.step, step.rank)
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            on = f" on rank {step.rank}" if step.what == "loss" and self.world.size > 1 else ""
            found = f"the {step.what} is not finite at step {step.step}{on} (samples: {shown})"
            if count > most:
                if not self.world.is_main:
                    raise OtherRankError(found, MaekitError.exit_code)
                raise MaekitError(
                    f"{found}, seen at step {done}; no checkpoint holds its weights. A lower `lr`, a longer warm-up, "
                    "`clip_grad=1` or `precision=fp32` usually help; `skip_nonfinite=N` leaves up to N such steps out"
                )
            if self.world.is_main:
                self.progress.note(f"{found}; the step was left out, {count} of at most {most}")
        if row is not None:
            self._log(row)

    def _log(self, row: dict[str, Any]) -> None:
        if not self.world.is_main:
            return
        metrics.append(self.run.metrics_file, row)
        if self.board is not None:
            self.board.row(row)
        if "loss" in row:
            self.progress.figures(row)

    def _save(self, done: int, state: TrainState) -> None:
        if self.writer is not None:
            self.writer.save(
                {
                    "step": done,
                    "bad": state.bad,
                    "skipped": state.skipped,
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

    def _tell_bad(self, lines: Sequence[str]) -> None:
        for line in lines:
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
        """Raise an InputError if a setting or the data differ from those the run was started with."""
        there = {key: value for key, value, free in fields_of(self.run.config()) if not free}
        for key, value, free in fields_of(self.config):
            if not free and there.get(key) != value:
                raise InputError(self.task.mismatch_message(key, there.get(key), value))
        if newest.state()["data_digest"] != self.shards.digest:
            raise InputError(
                f"{self.run.path} was trained on other data (its digest differs: shards were added, removed, renamed "
                "or changed); go on with the old data or choose another `out`"
            )


class _Estimate:
    """Estimates once how long the run will take, from the rate after the first steps."""

    def __init__(self, steps: int, batch_size: int) -> None:
        self._steps, self._batch_size = steps, batch_size
        self._began: tuple[int, float] | None = None
        self._first: int | None = None
        self._is_told = False

    def after(self, done: int) -> str | None:
        """Return the line to report after a step; None if there is none."""
        if self._is_told:
            return None
        now = time.monotonic()
        self._first = done if self._first is None else self._first
        if self._began is None:
            # The first steps include one-time costs.
            if done >= self._first + _WARM_STEPS - 1:
                self._began = (done, now)
            return None
        step, since = self._began
        if now - since < _ESTIMATE_SECONDS:
            return None
        self._is_told = True
        rate, left = (done - step) / (now - since), self._steps - done
        images = rate * self._batch_size
        return f"{images:.1f} img/s: about {duration(left / rate)} for the {left} steps left"
