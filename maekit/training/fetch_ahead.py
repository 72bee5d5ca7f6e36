"""Prefetch of remote shards: they are downloaded before they are read."""

import threading
from collections.abc import Callable, Iterator

from maekit.system.errors import MaekitError


class FetchAhead:
    """Downloads the shards that are read next, at most one window ahead, in a separate thread.

    Args:
        fetch: `fetch(shard)` brings the shard of that number into the cache; it returns False while another process
            downloads it.
        windows: the numbers of the shards in reading order, window by window, without end.
    """

    def __init__(self, fetch: Callable[[int], bool], windows: Iterator[list[int]]) -> None:
        self._fetch, self._windows = fetch, windows
        self._may_start = threading.Semaphore(2)  # this window and the next
        self._stopped = threading.Event()
        threading.Thread(target=self._run, name="fetch-ahead", daemon=True).start()

    def go_on(self) -> None:
        """Report that reading has reached the next window."""
        self._may_start.release()

    def stop(self) -> None:
        """Stop the thread after the current download."""
        self._stopped.set()
        self._may_start.release()

    def _run(self) -> None:
        for window in self._windows:
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
