"""Stopping on SIGTERM or Ctrl-C at a place where everything is saved."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

_SAME_WISH_SECONDS = 5.0


@contextlib.contextmanager
def stop_on_signal(then: Callable[[], None] = lambda: None) -> Iterator[Callable[[], str | None]]:
    """Catch SIGTERM and SIGINT for a while.

    Args:
        then: called when the signal comes, in the middle of whatever the main thread does.

    Yields:
        a function that returns the name of the signal that came, or None. A second signal gets the default treatment,
        so that a hanging save can still be interrupted; but not within a few seconds of the first: a scheduler and a
        launcher between them often send the same wish twice.
    """
    received: list[str] = []
    previous = {}

    first = 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if received:
            if time.monotonic() - first > _SAME_WISH_SECONDS:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        first = time.monotonic()
        received.append(signal.Signals(number).name)
        then()

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, handle)
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
