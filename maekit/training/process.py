"""A process of a training run before anything is trained: its device, the other processes, and when to stop."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from maekit.config import TrainingConfig, parse_duration
from maekit.errors import MaekitError, Stopped
from maekit.signals import stop_on_signal
from maekit.training import distributed
from maekit.training.distributed import World
from maekit.training.prepare import choose_device


class Stop:
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
def device_errors() -> Iterator[None]:
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


@dataclass(frozen=True)
class Process:
    """Where a process of a run stands.

    Attributes:
        device: that it trains on.
        world: the processes of the run.
        stop: when to stop.
    """

    device: torch.device
    world: World
    stop: Stop


@contextlib.contextmanager
def started(config: TrainingConfig) -> Iterator[Process]:
    """Choose the device and join the other processes; signals and `--max-time` stop what is done within.

    Raises:
        InputError: the device is not there.
        Stopped: a signal came before there was anything to save.
        MaekitError: the others cannot be joined, or the device failed.
    """
    stop = Stop(config.run.max_time)
    kind = choose_device(config)
    with stop_on_signal(stop.heed) as stop.received_signal, device_errors(), distributed.join(kind) as world:
        yield Process(torch.device(kind, world.local_rank) if kind == "cuda" else torch.device(kind), world, stop)
