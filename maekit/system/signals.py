"""Stopping on SIGTERM or Ctrl-C at a point where everything is saved."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SAME_WISH_SECONDS = 5.0


@contextlib.contextmanager
def stop_on_signal(then: Callable[[], None] = lambda: None) -> Iterator[Callable[[], str | None]]:
    """Catch SIGTERM and SIGINT inside the context.

    Args:
        then: called when the signal arrives, in the middle of whatever the main thread is doing.

    Yields:
        a function that returns the name of the signal received, or None. A second signal gets the default handling, so
        that a blocked save can still be interrupted. Within a few seconds of the first it is ignored, because a
        scheduler and a launcher often both send one.
    """
    received: dict[str, float] = {}  # its name -> when it came

    def handle(number: int, frame: FrameType | None) -> None:
        if not received:
            received[signal.Signals(number).name] = time.monotonic()
            then()
        elif time.monotonic() - min(received.values()) > _SAME_WISH_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    is_main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, handle) for number in _SIGNALS if is_main}
    try:
        yield lambda: next(iter(received), None)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
