"""The loop: it knows steps only. What happens between steps is told to it as a cadence."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from maekit.errors import MaekitError
from maekit.mae.autoencoder import MaskedAutoencoder
from maekit.training.data import Batch, Normalizer, next_batch
from maekit.training.optim import Schedule


@dataclass
class Cadence:
    """When the loop does what is not training.

    Attributes:
        log: steps from one row of metrics to the next.
        checkpoint: steps from one checkpoint to the next.
        pictures: steps from one picture to the next; 0 is never.
    """

    log: int
    checkpoint: int
    pictures: int


@dataclass
class Hooks:
    """What the loop calls between steps.

    Attributes:
        advance: after every step, with the steps done; must not wait for the device.
        log: with a row of metrics.
        checkpoint: with the steps done and the bad samples so far; everything up to here is finite.
        picture: with the steps done.
        stop_requested: whether to save and stop at this step boundary.
        keys: names of the samples of one step, for the message when its loss is not finite.
        bad: with a line for each sample of a batch that was replaced.
    """

    advance: Callable[[int], None]
    log: Callable[[dict[str, Any]], None]
    checkpoint: Callable[[int, int], None]
    picture: Callable[[int], None]
    stop_requested: Callable[[], bool]
    keys: Callable[[int], list[str]]
    bad: Callable[[list[str]], None]


@dataclass
class Tally:
    """What is counted over the run, and what has gathered since the last row of metrics.

    Attributes:
        bad: samples that had to be replaced, over the whole run.
        seen: samples trained on, over the whole run.
        wait: seconds that the loop waited for data, in this process.
        seconds: seconds in the loop, in this process.
        losses: device scalars since the last row, one per step.
    """

    bad: int = 0
    seen: int = 0
    wait: float = 0.0
    seconds: float = 0.0
    losses: list[torch.Tensor] = field(default_factory=list)


@dataclass
class Trainer:
    """A model in training, and the one step it takes.

    Attributes:
        model: the autoencoder, in training mode.
        optimizer: AdamW.
        schedule: its learning rate.
        normalizer: batch -> device.
        autocast: a fresh context of the chosen precision.
        batch_size: images per step.
        epoch_samples: samples per epoch.
        max_bad: largest share of bad samples.
    """

    model: MaskedAutoencoder
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    normalizer: Normalizer
    autocast: Callable[[], AbstractContextManager[Any]]
    batch_size: int
    epoch_samples: int
    max_bad: float

    def step(self, batch: Batch, done: int) -> torch.Tensor:
        """Take the step that follows `done` steps; return its loss, still on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.at(done)
        # ---- one training step; nothing in here waits for the device --------------------------------------------
        images, noise = self.normalizer.to_device(batch)
        with self.autocast():
            loss = self.model(images, noise).loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        # ----------------------------------------------------------------------------------------------------------
        return loss.detach()

    def run(
        self, batches: Iterator[Batch], *, first: int, last: int, bad: int, cadence: Cadence, hooks: Hooks
    ) -> tuple[int, Tally]:
        """Train from `first` to `last` steps done, `bad` samples replaced so far; return the steps done and the tally.

        Raises:
            MaekitError: a loss that is not finite (no checkpoint holds its weights), too many bad samples, or no data.
        """
        tally = Tally(bad=bad, seen=first * self.batch_size)
        started = logged = time.perf_counter()
        logged_wait = 0.0
        logged_step = done = first
        while done < last:
            before = time.perf_counter()
            batch = next_batch(batches)
            tally.wait += time.perf_counter() - before
            tally.losses.append(self.step(batch, done))
            done += 1
            tally.seen += self.batch_size
            self._count_bad(batch, tally, hooks)
            hooks.advance(done)

            stopping = hooks.stop_requested()
            saving = stopping or done == last or done % cadence.checkpoint == 0
            if saving or done % cadence.log == 0:
                grad_norm = self._grad_norm()
                loss = self._fetch_losses(tally, done, grad_norm, hooks.keys)
                now = time.perf_counter()
                hooks.log(
                    {
                        "step": done,
                        "epoch": round(done * self.batch_size / self.epoch_samples, 4),
                        "samples": done * self.batch_size,
                        "loss": loss,
                        "lr": self.schedule.at(done - 1),
                        "grad_norm": grad_norm,
                        "images_per_second": round((done - logged_step) * self.batch_size / (now - logged), 2),
                        "data_wait": round((tally.wait - logged_wait) / (now - logged), 4),
                        "bad": tally.bad,
                    }
                )
                logged, logged_step, logged_wait = now, done, tally.wait
            if saving:
                hooks.checkpoint(done, tally.bad)
            if cadence.pictures and (done % cadence.pictures == 0 or done == last):
                hooks.picture(done)
            if stopping:
                break
        tally.seconds = time.perf_counter() - started
        return done, tally

    def _count_bad(self, batch: Batch, tally: Tally, hooks: Hooks) -> None:
        tally.bad += len(batch.bad)
        hooks.bad(batch.bad)
        # The share is taken of an epoch (or 1,000 samples) at least: one bad sample in the first batch says nothing.
        if tally.bad > self.max_bad * max(tally.seen, min(self.epoch_samples, 1000)):
            raise MaekitError(
                f"{tally.bad} of {tally.seen} samples hold no readable image, more than --max-bad "
                f"{self.max_bad:g}; the last one: {batch.bad[-1] if batch.bad else ''}"
            )

    def _grad_norm(self) -> float:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def _fetch_losses(self, tally: Tally, done: int, grad_norm: float, keys: Callable[[int], list[str]]) -> float:
        """Fetch the losses since the last row in one transfer; return their mean."""
        losses = torch.stack(tally.losses).tolist()
        first = done - len(losses) + 1
        tally.losses.clear()
        broken = [first + i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        if not broken and not math.isfinite(grad_norm):
            broken = [done]
        if broken:
            names = keys(broken[0])
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            raise MaekitError(
                f"the loss is not finite from step {broken[0]} on (seen at step {done}; samples: {shown}); no "
                "checkpoint holds its weights. A lower --lr, a longer warm-up or --precision fp32 usually help"
            )
        return math.fsum(losses) / len(losses)
