"""When a run stops: on a signal, or when its time limit is reached."""

import math
import time
from collections.abc import Callable

from maekit.config import parse_duration
from maekit.system.signals import StopNow


class Stop:
    """Decides when to stop: immediately before training has begun, later at the next step boundary.

    Attributes:
        has_begun: whether the loop over steps has.
        has_stepped: whether this start has taken a step.
        is_alone: whether no other process must agree to stop.

    Args:
        max_time: time limit such as `3h50m`, counted from now; None for no limit.
    """

    def __init__(self, max_time: str | None) -> None:
        self._max_time = max_time
        self._until = time.monotonic() + (parse_duration(max_time) if max_time else math.inf)
        self.received_signal: Callable[[], str | None] = lambda: None
        self.has_begun = False
        # Even if startup exceeds the time limit, one step must be taken; otherwise restarts would never make progress.
        self.has_stepped = False
        self.is_alone = True

    def heed(self) -> None:
        """Stop a run that has nothing to save yet; called by the signal handler during startup.

        Raises:
            StopNow: the training has not begun.
        """
        if not self.has_begun:
            raise StopNow

    def needs_saving(self) -> bool:
        """Whether a step was taken, or other processes count on this one to agree on the next."""
        return self.has_stepped or (self.has_begun and not self.is_alone)

    def reason(self) -> str | None:
        """Return the reason to stop at the next step boundary, or None."""
        if self.has_stepped and time.monotonic() > self._until:
            return f"`max_time` {self._max_time}"
        return self.received_signal()

    def is_due(self) -> bool:
        """Whether to stop at the next step boundary."""
        return self.reason() is not None
