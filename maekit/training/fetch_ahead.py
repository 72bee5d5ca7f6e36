"""Prefetch of remote shards: they are downloaded before they are read."""

import threading
from collections.abc import Callable, Iterator

from maekit.shards.order import SampleOrder
from maekit.system.errors import MaekitError


class FetchAhead:
    """Downloads the shards that are read next, at most one window ahead, in a separate thread.

    Args:
        fetch: `fetch(shard)` brings the shard of that number into the cache; it returns False while another process
            downloads it.
        order: order of the samples.
        start: position of the first sample in the endless sequence of epochs.
    """

    def __init__(self, fetch: Callable[[int], bool], order: SampleOrder, start: int) -> None:
        self._fetch, self._order, self._window = fetch, order, order.window_number(start)
        self._may_start = threading.Semaphore(2)  # this window and the next
        self._stopped = threading.Event()
        threading.Thread(target=self._run, args=(order.windows(start),), name="fetch-ahead", daemon=True).start()

    def reach(self, position: int) -> None:
        """Report the position that reading has reached; with each new window, one more may be downloaded."""
        window = self._order.window_number(position)
        for _ in range(window - self._window):
            self._may_start.release()
        self._window = window

    def stop(self) -> None:
        """Stop the thread after the current download."""
        self._stopped.set()
        self._may_start.release()

    def _run(self, windows: Iterator[list[int]]) -> None:
        for window in windows:
            self._may_start.acquire()
            missing = window
            while missing and not self._stopped.is_set():
                # A shard that another worker is downloading is left to it and checked again afterwards.
                missing = [shard for shard in missing if not self._try(shard)]
                self._stopped.wait(0.05 if missing else 0)
            if self._stopped.is_set():
                return

    def _try(self, shard: int) -> bool:
        if self._stopped.is_set():
            return True
        try:
            return self._fetch(shard)
        except MaekitError:
            return True  # the reader will hit the same error and report it
