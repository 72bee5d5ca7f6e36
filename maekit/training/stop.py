"""When a run stops: on a signal, or when its time is over."""

import math
import time
from collections.abc import Callable

from maekit.config import parse_duration
from maekit.system.errors import Stopped


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
            return f"`max_time` {self._max_time}"
        return self.received_signal()
