"""Remote shards are downloaded before reading comes to them."""

import threading
from collections.abc import Callable, Iterator

from maekit.system.errors import MaekitError


class FetchAhead:
    """Downloads, in a thread of its own, the shards that reading will come to, at most one window ahead.

    Args:
        fetch: `fetch(shard)` has a shard, by its number, in the cache, or says False where another process is at it.
        windows: the numbers of the shards in the order of reading, window by window, without end.
    """

    def __init__(self, fetch: Callable[[int], bool], windows: Iterator[list[int]]) -> None:
        self._fetch, self._windows = fetch, windows
        self._may_start = threading.Semaphore(2)  # this window and the next
        self._stopped = threading.Event()
        threading.Thread(target=self._run, name="fetch-ahead", daemon=True).start()

    def go_on(self) -> None:
        """Tell that reading went on to the next window."""
        self._may_start.release()

    def stop(self) -> None:
        """End the thread after the download under way."""
        self._stopped.set()
        self._may_start.release()

    def _run(self) -> None:
        for window in self._windows:
            self._may_start.acquire()
            missing = window
            while missing and not self._stopped.is_set():
                # What another worker is downloading is left to it, and looked at again afterwards.
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
            return True  # reading meets it again, and tells
