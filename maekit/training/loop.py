"""The training loop; it knows only steps. At a boundary between two steps, all ranks have agreed on what comes next.

The engine runs it as:

    for boundary in loop.run(first, last):   # on every rank at the same steps
        ...                                  # the engine logs, saves, validates, draws
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from maekit.system.errors import MaekitError, OtherRankError
from maekit.training.crops import Chunk
from maekit.training.data import StepBatches
from maekit.training.launch import Launch
from maekit.training.step import Step

# Steps that the host may run ahead of the device: enough that the device never waits, few enough that the uploaded
# batches fit into its memory.
_STEPS_AHEAD = 2


@dataclass
class TrainState:
    """Counts over the run.

    Attributes:
        bad: samples replaced, over the whole run and all ranks.
        skipped: steps without effect because of a non-finite gradient, over the whole run.
        wait: seconds that the loop of this process waited for data.
        seconds: seconds that this process spent in the loop.
    """

    bad: int = 0
    skipped: int = 0
    wait: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Boundary:
    """The state of all ranks between two steps.

    Attributes:
        done: steps done.
        must_save: a checkpoint is required here: the loop is about to stop, or the last checkpoint is too old.
        bad: one line for each sample of the last step that this rank replaced.
    """

    done: int
    must_save: bool = False
    bad: tuple[str, ...] = ()


@dataclass(frozen=True)
class BrokenStep:
    """A step that was skipped because its gradient was not finite.

    Attributes:
        step: its number, 1-based.
        what: `loss` or `gradient`.
        rank: the first rank with a non-finite loss; 0 for a gradient, which all ranks share.
    """

    step: int
    what: str
    rank: int


@dataclass
class _Since:
    """Values accumulated since the last row of metrics.

    Attributes:
        step: steps done at that row.
        time: when it was written.
        wait: seconds waited for data by then.
        losses: device scalars, one per step.
        norms: gradient norms, likewise.
    """

    step: int
    time: float
    wait: float
    losses: list[torch.Tensor] = field(default_factory=list)
    norms: list[torch.Tensor] = field(default_factory=list)


class _Next(NamedTuple):
    """What the ranks agreed on.

    Attributes:
        micro_batches: this rank's part of the step; None means save and stop.
        save: whether to save before the step.
        bad: samples of the step that were replaced, on all ranks.
        bad_lines: one line for each of those on this rank.
    """

    micro_batches: list[list[Chunk]] | None
    save: bool
    bad: int
    bad_lines: tuple[str, ...]


class Loop:
    """One rank's loop over steps.

    Args:
        launch: the run.
        step: takes one training step.
        batches: the batches of this rank.
        state: counts over the run; updated.
        failure: returns the error of a background thread, or None.
    """

    def __init__(
        self,
        launch: Launch[Any],
        *,
        step: Step,
        batches: StepBatches,
        state: TrainState,
        failure: Callable[[], MaekitError | None],
    ) -> None:
        self.step, self.batches, self.state = step, batches, state
        self.device, self.batch_size = launch.device, launch.config.batch_size
        self._world, self._stop, self._failure = launch.world, launch.stop, failure
        self._epoch_samples, self._max_bad = launch.shards.samples, launch.config.data.max_bad
        self._checkpoint_seconds = 60 * launch.config.run.checkpoint_minutes
        self._since = _Since(0, 0.0, 0.0)
        self._saved = 0.0

    def run(self, first: int, last: int) -> Iterator[Boundary]:
        """Train from `first` to `last` steps done; yield after every step, and before a step if a save is required.

        Raises:
            MaekitError: too many bad samples, no data, or a failure in the background.
        """
        started = self._saved = time.perf_counter()
        self._since = _Since(first, started, self.state.wait)
        done = first
        ahead = _Throttle(self.device)
        while done < last:
            batch = self._agree_on_next()
            if batch.micro_batches is None or batch.save:
                yield Boundary(done, must_save=True)
            if batch.micro_batches is None:
                break
            ahead.wait()
            loss, norm = self.step(batch.micro_batches, done)
            ahead.mark()
            self._since.losses.append(loss)
            self._since.norms.append(norm)
            done += 1
            self._count_bad(batch, done)
            yield Boundary(done, bad=batch.bad_lines)
        self.state.seconds = time.perf_counter() - started

    def saved(self) -> None:
        """Record that everything has just been saved."""
        self._saved = time.perf_counter()

    def leave_out(self) -> None:
        """Exclude the time since the last row from the rate: it was not spent on training."""
        self._since.time = time.perf_counter()

    def row(self, done: int) -> tuple[dict[str, Any] | None, list[BrokenStep]]:
        """Return the row of metrics since the last one (None if no step was taken), and the skipped steps.

        All ranks call it at the same boundaries. Losses and norms come from the device in one transfer.
        """
        since = self._since
        if done == since.step:
            return None, []
        row, broken = self._fetch(done)
        span = time.perf_counter() - since.time
        waits = self._world.gather([(self.state.wait - since.wait) / span])
        row |= {
            "images_per_second": round((done - since.step) * self.batch_size / span, 2),
            "data_wait": round(sum(wait for (wait,) in waits) / len(waits), 4),
        }
        self._since = _Since(done, time.perf_counter(), self.state.wait)
        return row, broken

    def _agree_on_next(self) -> _Next:
        """Get the next step's batch, and agree with the other ranks whether to take the step, save, or stop."""
        before = time.perf_counter()
        # Only the clock of rank 0 decides when a checkpoint is overdue.
        overdue = self._world.is_main and before - self._saved > self._checkpoint_seconds
        error: MaekitError | None = self._failure()
        micro_batches: list[list[Chunk]] | None = None
        if error is None:
            try:
                micro_batches = self.batches.next(self._stop.is_due)
            except MaekitError as raised:
                error = raised
        self.state.wait += time.perf_counter() - before
        bad = tuple(line for chunks in micro_batches or [] for chunk in chunks for line in chunk.bad)
        stop = error is None and (micro_batches is None or self._stop.is_due())
        votes = [error is not None, stop, overdue, len(bad)]
        failed, stops, saves, all_bad = self._world.sum([float(vote) for vote in votes])
        if failed:
            raise error or OtherRankError("another rank failed", MaekitError.exit_code)
        return _Next(None if stops else micro_batches, bool(saves), int(all_bad), bad)

    def _count_bad(self, batch: "_Next", done: int) -> None:
        self.state.bad += batch.bad
        # The fraction refers to at least one epoch (or 1,000 samples): one bad sample in the first batch means nothing.
        seen = done * self.batch_size
        if self.state.bad > self._max_bad * max(seen, min(self._epoch_samples, 1000)):
            if not self._world.is_main:
                raise OtherRankError("too many bad samples", MaekitError.exit_code)
            last = f"; the last one: {batch.bad_lines[-1]}" if batch.bad_lines else ""
            raise MaekitError(
                f"{self.state.bad} of {seen} samples cannot be used, more than `max_bad` {self._max_bad:g}{last}"
            )

    def _fetch(self, done: int) -> tuple[dict[str, Any], list[BrokenStep]]:
        """Return the first part of a row, and the skipped steps."""
        count = len(self._since.losses)
        fetched = torch.stack([*self._since.losses, *self._since.norms]).tolist() if count else []
        by_rank = self._world.gather(fetched)
        norms = fetched[count:]
        finite, broken = [], []
        for number in range(count):
            losses = [numbers[number] for numbers in by_rank]
            ranks = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
            if not ranks and math.isfinite(norms[number]):
                finite.append(math.fsum(losses) / len(losses))
            else:
                step = done - count + 1 + number
                broken.append(BrokenStep(step, "loss", ranks[0]) if ranks else BrokenStep(step, "gradient", 0))
        self.state.skipped += len(broken)
        row = {
            "step": done,
            "epoch": round(done * self.batch_size / self._epoch_samples, 4),
            "samples": done * self.batch_size,
            "loss": math.fsum(finite) / len(finite) if finite else None,
            "lr": self.step.schedule.at(done - 1),
            "grad_norm": norms[-1] if norms and math.isfinite(norms[-1]) else None,
            "bad": self.state.bad,
            "skipped": self.state.skipped,
        }
        return row, broken


class _Throttle:
    """Limits how many steps the host runs ahead of a CUDA device; the device itself never waits."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._events: deque[torch.cuda.Event] = deque()

    def mark(self) -> None:
        """Record that a step has been queued."""
        if self._on_cuda:
            event = torch.cuda.Event()
            event.record()
            self._events.append(event)

    def wait(self) -> None:
        """Wait until fewer than the allowed number of steps are queued."""
        if len(self._events) >= _STEPS_AHEAD:
            self._events.popleft().synchronize()
