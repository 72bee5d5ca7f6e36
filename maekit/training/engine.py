"""A training run of any `Task`: own the directory, resume from the newest checkpoint, loop, save, finish.

Order: find what to resume -> compare with the existing run -> write the config -> loop -> finish. Only the main process
(rank 0) reads and writes the run directory.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from maekit import runs
from maekit.config import TrainingConfig, total_steps
from maekit.config.settings import dump_toml, fields_of
from maekit.sheet import encode_png
from maekit.system import files
from maekit.system.errors import InputError, MaekitError, OtherRankError, Stopped
from maekit.system.progress import duration
from maekit.system.redaction import redacted
from maekit.training import checkpoint, distributed, metrics
from maekit.training.checkpoint import CheckpointWriter
from maekit.training.crops import WorkerProgress, name_of
from maekit.training.data import BatchLayout, ExactSource, StepBatches, make_loader, stop_workers
from maekit.training.image_cache import DecodedSet
from maekit.training.intervals import Intervals
from maekit.training.launch import Launch
from maekit.training.loop import Loop, TrainState
from maekit.training.optim import make_schedule
from maekit.training.step import Step, choose_micro_batch
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

    def summary(self, batch_size: int) -> dict[str, Any]:
        """Return what the results of all trainings contain, under the names of their fields."""
        state, images = self.state, (self.steps - self.resumed_from) * batch_size
        return {
            "steps": self.steps,
            "samples": self.steps * batch_size,
            "loss": next((row["loss"] for row in reversed(self.rows) if "loss" in row), None),
            "images_per_second": round(images / state.seconds, 2) if state.seconds else 0.0,
            "data_wait": round(state.wait / state.seconds, 4) if state.seconds else 0.0,
            "bad": state.bad,
            "resumed_from": self.resumed_from,
            "already_finished": self.already_finished,
        }


class Engine:
    """One process's part of a run.

    Args:
        launch: the run; its directory is owned by the main process.
        task: what is trained; its model is on the device.
    """

    def __init__(self, launch: Launch[Any], task: Task) -> None:
        self.launch, self.task = launch, task
        self.config: TrainingConfig = launch.config
        self.run, self.shards, self.world, self.progress = launch.run, launch.shards, launch.world, launch.progress
        self.steps = total_steps(self.config, self.shards.samples)
        self.intervals = Intervals.of(self.config.run, self.steps)
        self.writer = CheckpointWriter(
            self.run,
            task.objective.model,
            task.optimizer,
            keep=self.config.run.keep_checkpoints,
            retain=self.intervals.keeps,
        )
        self.board: TensorBoardLog | None = None
        self.bad_shown = 0
        self.timed_from: tuple[int, float] | None = None

    def go(self, newest: runs.Checkpoint | None) -> Finished:
        """Resume from a checkpoint (known to the main process only), or start.

        Raises:
            Stopped: a stop was requested; everything is saved.
            InputError: the directory belongs to another run.
            MaekitError: failed during training.
        """
        begun = self.world.share(self.world.on_main(lambda: self._take_up(newest)))
        first, state = int(begun["step"]), TrainState(bad=begun["bad"], skipped=begun["skipped"])
        if begun["finished"]:
            if self.world.is_main:
                self.progress.note(f"{self.run.path} is finished: {self.steps} steps; nothing left to do")
            return Finished(self.steps, self._rows(), state, self.steps, already_finished=True)
        if first:
            distributed.share_optimizer(self.task.optimizer, self.world)
        with self.world.lost_ranks():
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
        state = {"step": 0, "bad": 0, "skipped": 0, "finished": False}
        # If nothing is saved yet, changed settings lose nothing.
        if newest is not None:
            self._refuse_other_training(newest)
            state |= newest.state()
            if newest.step == self.steps and self.run.is_finished:
                return state | {"finished": True}
        files.write_atomically(self.run.config_file, dump_toml(self.config).encode())
        self.task.begin()
        first = int(state["step"])
        if newest is not None:
            checkpoint.load(newest, self.task.objective.model, self.task.optimizer)
            self.progress.note(f"resuming {self.run.path} after step {first} of {self.steps}")
        self._sweep()
        metrics.cut_back(self.run.metrics_file, first)
        checkpoint.discard_after(self.run, first)
        checkpoint.prune(self.run, self.config.run.keep_checkpoints, self.intervals.keeps)
        return state

    def _sweep(self) -> None:
        """Delete unfinished files of killed runs, and create the folders."""
        with files.writing(self.run.checkpoints):
            for folder in (self.run.path, self.run.path / "pictures"):
                for leftover in folder.glob(".*.tmp"):
                    leftover.unlink(missing_ok=True)
            self.run.checkpoints.mkdir(exist_ok=True)

    def _train(self, first: int, state: TrainState) -> tuple[int, str]:
        """Train to the last step, or until a stop is requested; return the steps done and the reason for the stop."""
        launch, config, task = self.launch, self.config, self.task
        layout = self._lay_out_batch()
        validation = task.open_validation(layout.micro_batch)
        step = self._make_step()
        workers = _loader_workers(launch)
        task.crops.watch, task.crops.decoded = WorkerProgress(workers), self._decode_all()
        source = ExactSource(launch.order, layout, first=first, last=self.steps)
        on_cuda, ahead = launch.device.type == "cuda", config.data.prefetch
        chunks = iter(make_loader(source, task.crops, layout, workers=workers, prefetch=ahead, pin=on_cuda))
        # Downloads have timeouts of their own; a worker that waits for one shows no progress here.
        patience = math.inf if self.shards.remote else config.data.patience
        batches = StepBatches(chunks, layout, shards=self.shards, watch=task.crops.watch, patience=patience)
        loop = Loop(launch, step=step, batches=batches, state=state, failure=self.writer.failure)
        self.progress.start(task.name, self.steps, first)
        try:
            with self.writer, self._open_board(first) as self.board:
                launch.stop.has_begun = True
                done = self._follow(loop, first, validation)
                # No rank exits before the last checkpoint is on disk: a launcher would then end the others.
                self.world.together(self.writer.finish)
                return done, launch.stop.reason() or "a signal to another process"
        except torch.OutOfMemoryError as error:
            raise MaekitError(
                f"the device's memory is too small for {layout.micro_batch} images at a time; "
                f"try `micro_batch={max(1, layout.micro_batch // 2)}`"
            ) from error
        except RuntimeError as error:
            # When a worker is killed, the DataLoader raises this in the middle of whatever is running.
            if "DataLoader worker" in str(error):
                raise batches.failure(error) from error
            raise
        finally:
            stop_workers(chunks)
            self.progress.stop()

    def _follow(self, loop: Loop, first: int, validation: Callable[[int], dict[str, Any]] | None) -> int:
        """Log, save, validate and draw at the boundaries where each is due; return the steps done."""
        done = saved = first
        for boundary in loop.run(first, self.steps):
            done = boundary.done
            self._tell_bad(boundary.bad)
            if not boundary.must_save:
                self._advance(done, first)
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
                self._log({"step": done, **validation(done)})
                loop.leave_out()
            if self.world.is_main and not boundary.must_save and self.intervals.draws(done):
                self._draw(done)
        return done

    def _open_board(self, first: int) -> AbstractContextManager[TensorBoardLog | None]:
        if self.world.is_main and self.config.run.tensorboard:
            return closing(TensorBoardLog(self.run.path / "tensorboard", first))
        return nullcontext()

    def _lay_out_batch(self) -> BatchLayout:
        """Divide the batch among the ranks, and each rank's share into micro-batches that fit into memory."""
        size, world, task = self.config.batch_size, self.world, self.task
        share, (height, width) = size // world.size, task.crops.size
        micro_batch = self.config.run.micro_batch
        if micro_batch is None:
            there = sum(tensor.nbytes for tensor in checkpoint.optimizer_tensors(task.optimizer).values())
            largest = choose_micro_batch(
                task.objective, share, task.crops.size, task.forward, moments=there, fits=task.fits
            )
            micro_batch = int(min(count for (count,) in world.gather([largest])))
            if micro_batch < share and world.is_main:
                self.progress.note(f"micro-batch: {micro_batch} of {share} images at a time, by the memory there is")
        return BatchLayout(size, micro_batch, world.rank, world.size, height * width * 3)

    def _make_step(self) -> Step:
        config, task, compile_it = self.config, self.task, self.config.run.compile
        samples = self.shards.samples
        return Step(
            task.objective.train(),
            task.optimizer,
            make_schedule(config.optimizer, batch_size=config.batch_size, samples=samples, steps=self.steps),
            forward=task.forward,
            upload=task.upload,
            world=self.world,
            clip=config.optimizer.clip_grad,
            compile=self.launch.device.type == "cuda" if compile_it is None else compile_it,
            begin=task.begin_step,
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

    def _advance(self, done: int, first: int) -> None:
        """Report a step as done, and once how long the run will take; must not wait for the device."""
        self.launch.stop.has_stepped = True
        self.progress.advance(done)
        now = time.monotonic()
        if done == first + _WARM_STEPS:
            self.timed_from = done, now
        elif self.timed_from is not None and now - self.timed_from[1] >= _ESTIMATE_SECONDS:
            rate, left = (done - self.timed_from[0]) / (now - self.timed_from[1]), self.steps - done
            self.timed_from = None
            if self.world.is_main:
                images = rate * self.config.batch_size
                self.progress.note(f"{images:.1f} img/s: about {duration(left / rate)} for the {left} steps left")

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
        if self.world.is_main:
            about = {"data_digest": self.shards.digest, "samples_per_epoch": self.shards.samples}
            self.writer.save({"step": done, "bad": state.bad, "skipped": state.skipped, **about})

    def _draw(self, done: int) -> None:
        picture = self.task.draw()
        if picture is None:
            return
        files.write_atomically(self.run.picture(done), encode_png(picture))
        if self.board is not None:
            self.board.picture(picture, done)

    def _tell_bad(self, lines: Sequence[str]) -> None:
        for line in lines[: max(0, _BAD_SHOWN - self.bad_shown)]:
            self.progress.note(f"replaced by another sample: {line}")
        self.bad_shown += len(lines)

    def _keys_of_step(self, step: int, rank: int) -> list[str]:
        share = self.config.batch_size // self.world.size
        start = (step - 1) * self.config.batch_size + rank * share
        samples = self.launch.order.slice(start, start + share)
        pairs = zip(samples.shards.tolist(), samples.ordinals.tolist(), strict=True)
        return [name_of(self.shards, shard, ordinal) for shard, ordinal in pairs]

    def _refuse_other_training(self, newest: runs.Checkpoint) -> None:
        """Raise an InputError if a setting or the data differ from those the run was started with."""
        there = {key: value for key, value, free in fields_of(self.run.config()) if not free}
        for key, value, free in fields_of(self.config):
            if not free and redacted(there.get(key)) != redacted(value):  # as they are stored
                raise InputError(self.task.mismatch_message(key, there.get(key), value))
        if newest.state()["data_digest"] != self.shards.digest:
            raise InputError(
                f"{self.run.path} was trained on other data (its digest differs: shards were added, removed, renamed "
                "or changed); go on with the old data or choose another `out`"
            )


def _loader_workers(launch: Launch[Any]) -> int:
    """Return the number of worker processes that read and decode for this one."""
    if launch.config.data.workers is not None:
        return int(launch.config.data.workers)
    # On a CPU the model itself needs the cores; one worker is fast enough for it.
    return min(16, launch.world.cores) if launch.device.type == "cuda" else 1
