"""A process of a training run before anything is trained: its device, the other processes, and when to stop."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from maekit.config import TrainingConfig, parse_duration
from maekit.mae.device import choose_device, device_errors
from maekit.system.errors import Stopped
from maekit.system.signals import stop_on_signal
from maekit.training import distributed
from maekit.training.distributed import World


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
    kind = choose_device(config.run.device)
    with stop_on_signal(stop.heed) as stop.received_signal, device_errors(), distributed.join(kind) as world:
        yield Process(torch.device(kind, world.local_rank) if kind == "cuda" else torch.device(kind), world, stop)
