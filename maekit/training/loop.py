"""The loop: it knows steps only. Between two steps, at the boundary, all processes agree on what happens next."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from maekit.system.errors import ElsewhereError, MaekitError
from maekit.training.crops import Chunk
from maekit.training.data import StepBatches
from maekit.training.distributed import World
from maekit.training.optim import Schedule
from maekit.training.step import Step

# Steps that the host may run ahead of the device: enough that it never waits, few enough that what is uploaded fits.
_STEPS_AHEAD = 2


@dataclass
class Cadence:
    """When the loop does what is not training.

    Attributes:
        log: steps from one row of metrics to the next.
        checkpoint: steps from one checkpoint to the next.
        checkpoint_seconds: longest time from one checkpoint to the next.
        keep: steps of which each multiple has a checkpoint; 0 is none.
        pictures: steps from one picture to the next; 0 is never.
        validate: steps from one held-out loss to the next; 0 is never.
    """

    log: int
    checkpoint: int
    checkpoint_seconds: float
    keep: int
    pictures: int
    validate: int

    def saves(self, done: int) -> bool:
        """Whether there is a checkpoint of this step, whatever the time."""
        return done % self.checkpoint == 0 or bool(self.keep and done % self.keep == 0)


@dataclass
class Hooks:
    """What the loop calls between steps.

    Attributes:
        advance: after every step, with the steps done; must not wait for the device.
        log: with a row of metrics.
        checkpoint: with the steps done and the tally; everything up to here is finite.
        failure: what went wrong in the background since, or None.
        picture: with the steps done.
        validate: with the steps done; called on all ranks.
        stop_requested: whether this process is to save and stop.
        keys: names of the samples that a rank takes in a step.
        bad: with a line for each sample that was replaced on this rank.
        note: with a line to tell.
    """

    advance: Callable[[int], None]
    log: Callable[[dict[str, Any]], None]
    checkpoint: Callable[[int, "Tally"], None]
    failure: Callable[[], MaekitError | None]
    picture: Callable[[int], None]
    validate: Callable[[int], None]
    stop_requested: Callable[[], bool]
    keys: Callable[[int, int], list[str]]
    bad: Callable[[str], None]
    note: Callable[[str], None]


@dataclass
class Tally:
    """What is counted over the run, and what has gathered since the last row of metrics.

    Attributes:
        bad: samples that had to be replaced, over the whole run and all ranks.
        skipped: steps without effect because their gradient was not finite, over the whole run.
        wait: seconds that the loop waited for data, in this process.
        seconds: seconds in the loop, in this process.
        losses: device scalars since the last row, one per step.
        norms: of the gradient, likewise.
    """

    bad: int = 0
    skipped: int = 0
    wait: float = 0.0
    seconds: float = 0.0
    losses: list[torch.Tensor] = field(default_factory=list)
    norms: list[torch.Tensor] = field(default_factory=list)


@dataclass
class Trainer:
    """One run's loop.

    Attributes:
        step: takes one.
        schedule: the learning rate, for the rows.
        world: the processes that divide each batch.
        device: that the model lies on.
        batch_size: images per step, over all ranks.
        epoch_samples: samples per epoch.
        max_bad: largest share of bad samples.
        max_skipped: most steps whose gradient is not finite.
        cadence: of everything else.
        hooks: of everything else.
    """

    step: Step
    schedule: Schedule
    world: World
    device: torch.device
    batch_size: int
    epoch_samples: int
    max_bad: float
    max_skipped: int
    cadence: Cadence
    hooks: Hooks
    _logged: float = 0.0
    _logged_wait: float = 0.0
    _logged_step: int = 0

    def run(self, batches: StepBatches, *, first: int, last: int, tally: Tally) -> int:
        """Train from `first` to `last` steps done; return the steps done, fewer if a stop was asked for.

        Raises:
            MaekitError: a loss that is not finite (no checkpoint holds its weights), too many bad samples, no data, or
                a checkpoint that could not be written.
        """
        cadence, hooks = self.cadence, self.hooks
        started = saved = time.perf_counter()
        self._logged, self._logged_step, self._logged_wait = started, first, 0.0
        done = saved_step = first
        ahead = _Throttle(self.device)
        while done < last:
            before = time.perf_counter()
            batch = self._agree_on_next(batches, overdue=before - saved > cadence.checkpoint_seconds)
            tally.wait += time.perf_counter() - before - batch.agreeing
            if (batch.micro_batches is None or batch.save) and done > saved_step:
                self._log(tally, done)
                hooks.checkpoint(done, tally)
                saved, saved_step = time.perf_counter(), done
            if batch.micro_batches is None:
                break
            ahead.wait()
            loss, norm = self.step(batch.micro_batches, done)
            ahead.mark()
            tally.losses.append(loss)
            tally.norms.append(norm)
            done += 1
            self._count_bad(tally, batch, done)
            hooks.advance(done)

            saving = done == last or cadence.saves(done)
            validating = bool(cadence.validate) and (done == last or done % cadence.validate == 0)
            if saving or validating or done % cadence.log == 0:
                self._log(tally, done)
            if saving:
                hooks.checkpoint(done, tally)
                saved, saved_step = time.perf_counter(), done
            if validating:
                # After the checkpoint: whoever asks for a stop meanwhile finds everything saved.
                hooks.validate(done)
                self._logged = time.perf_counter()
            if cadence.pictures and (done % cadence.pictures == 0 or done == last):
                hooks.picture(done)
        tally.seconds = time.perf_counter() - started
        return done

    def _log(self, tally: Tally, done: int) -> None:
        """Tell of the steps since the last row; all ranks do so at the same steps."""
        if done == self._logged_step:
            return
        row = self._fetch(tally, done)
        span = time.perf_counter() - self._logged
        waits = self.world.gather([(tally.wait - self._logged_wait) / span])
        row |= {
            "images_per_second": round((done - self._logged_step) * self.batch_size / span, 2),
            "data_wait": round(sum(wait for (wait,) in waits) / len(waits), 4),
        }
        self.hooks.log(row)
        self._logged, self._logged_step, self._logged_wait = time.perf_counter(), done, tally.wait

    def _agree_on_next(self, batches: StepBatches, *, overdue: bool) -> "_Next":
        """Get the next step's batch, and settle with the other ranks whether to take the step, to save, or to stop."""
        error: MaekitError | None = self.hooks.failure()
        micro_batches: list[list[Chunk]] | None = None
        if error is None:
            try:
                micro_batches = batches.next(self.hooks.stop_requested)
            except MaekitError as raised:
                error = raised
        before = time.perf_counter()
        bad = [line for chunks in micro_batches or [] for chunk in chunks for line in chunk.bad]
        stop = error is None and (micro_batches is None or self.hooks.stop_requested())
        # Only the main process's clock decides when a checkpoint is overdue.
        votes = [bool(error), stop, overdue and self.world.is_main, len(bad)]
        failed, stops, saves, all_bad = self.world.sum([float(vote) for vote in votes])
        if failed:
            raise error or ElsewhereError("another rank failed", MaekitError.exit_code)
        return _Next(None if stops else micro_batches, bool(saves), int(all_bad), bad, time.perf_counter() - before)

    def _count_bad(self, tally: Tally, batch: "_Next", done: int) -> None:
        tally.bad += batch.bad
        for line in batch.bad_lines:
            self.hooks.bad(line)
        # The share is taken of an epoch (or 1,000 samples) at least: one bad sample in the first batch says nothing.
        seen = done * self.batch_size
        if tally.bad > self.max_bad * max(seen, min(self.epoch_samples, 1000)):
            if not self.world.is_main:
                raise ElsewhereError("too many bad samples", MaekitError.exit_code)
            last = f"; the last one: {batch.bad_lines[-1]}" if batch.bad_lines else ""
            raise MaekitError(
                f"{tally.bad} of {seen} samples cannot be used, more than --max-bad {self.max_bad:g}{last}"
            )

    def _fetch(self, tally: Tally, done: int) -> dict[str, Any]:
        """Fetch what the device has counted since the last row, in one transfer; return the beginning of a new row.

        Raises:
            MaekitError: a loss or gradient is not finite, and no more steps may be skipped.
        """
        count = len(tally.losses)
        fetched = torch.stack([*tally.losses, *tally.norms]).tolist() if count else []
        tally.losses.clear()
        tally.norms.clear()
        by_rank = self.world.gather(fetched)
        norms = fetched[count:]
        finite = []
        for number in range(count):
            losses = [numbers[number] for numbers in by_rank]
            if all(map(math.isfinite, losses)) and math.isfinite(norms[number]):
                finite.append(math.fsum(losses) / len(losses))
            else:
                self._count_skipped(tally, done - count + 1 + number, done, losses)
        return {
            "step": done,
            "epoch": round(done * self.batch_size / self.epoch_samples, 4),
            "samples": done * self.batch_size,
            "loss": math.fsum(finite) / len(finite) if finite else None,
            "lr": self.schedule.at(done - 1),
            "grad_norm": norms[-1] if norms and math.isfinite(norms[-1]) else None,
            "bad": tally.bad,
            "skipped": tally.skipped,
        }

    def _count_skipped(self, tally: Tally, step: int, seen: int, losses: list[float]) -> None:
        tally.skipped += 1
        ranks = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        what, rank = ("loss", ranks[0]) if ranks else ("gradient", 0)
        names = self.hooks.keys(step, rank)
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        on = f" on rank {rank}" if ranks and self.world.size > 1 else ""
        found = f"the {what} is not finite at step {step}{on} (samples: {shown})"
        if tally.skipped <= self.max_skipped:
            if self.world.is_main:
                self.hooks.note(f"{found}; the step was left out, {tally.skipped} of at most {self.max_skipped}")
            return
        if not self.world.is_main:
            raise ElsewhereError(found, MaekitError.exit_code)
        raise MaekitError(
            f"{found}, seen at step {seen}; no checkpoint holds its weights. A lower --lr, a longer warm-up, "
            "--clip-grad 1 or --precision fp32 usually help; --skip-nonfinite N leaves up to N such steps out"
        )


@dataclass
class _Next:
    """What the ranks agreed on.

    Attributes:
        micro_batches: this rank's part of the step; None is to save and stop.
        save: whether to save before the step.
        bad: samples of the step that were replaced, on all ranks.
        bad_lines: a line for each of them on this rank.
        agreeing: seconds that it took.
    """

    micro_batches: list[list[Chunk]] | None
    save: bool
    bad: int
    bad_lines: list[str]
    agreeing: float


class _Throttle:
    """Keeps the host a few steps ahead of a CUDA device and no more; the device itself never waits."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._events: deque[torch.cuda.Event] = deque()

    def mark(self) -> None:
        """Note that a step has been queued."""
        if self._on_cuda:
            event = torch.cuda.Event()
            event.record()
            self._events.append(event)

    def wait(self) -> None:
        """Wait until no more than the allowed steps are queued."""
        if len(self._events) >= _STEPS_AHEAD:
            self._events.popleft().synchronize()
