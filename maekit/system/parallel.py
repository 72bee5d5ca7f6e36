"""Map a function over items in processes or threads of one machine, with results in order."""

import contextlib
import ctypes
import gc
import itertools
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from maekit.system.errors import MaekitError
from maekit.system.signals import SIGNALS

Item = TypeVar("Item")
Result = TypeVar("Result")

_PR_SET_PDEATHSIG = 1


class Workers(contextlib.AbstractContextManager["Workers"]):
    """A pool of processes that maps functions over items in order; a context manager.

    Args:
        count: number of processes; with 1, the work runs in this process.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ProcessPoolExecutor | None = None
        if count > 1:
            # Forked children start at once and share what is loaded here; only on Linux do the libraries allow it.
            context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
            self._pool = ProcessPoolExecutor(count, context, follow_parent, (os.getpid(),))
            with forking():
                self._pool.submit(os.getpid)  # forks now, before the work that follows starts threads

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def map(
        self, function: Callable[[Item], Result], items: Iterable[Item], *, ahead: int | None = None
    ) -> Iterator[Result]:
        """Yield `function(item)` for each item, in order.

        Args:
            function: defined at module level, so that a process can find it; its exceptions are raised here.
            items: read only as fast as they are processed.
            ahead: how many items may be in progress ahead of the consumer; None is four per process.

        Raises:
            MaekitError: a process was killed.
        """
        if self._pool is None:
            yield from map(function, items)
            return
        try:
            yield from _run_ahead(self._pool, function, items, ahead=ahead or 4 * self.count)
        except BrokenProcessPool as error:
            raise MaekitError("a worker process was killed (out of memory?); run the command again") from error


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item], *, threads: int) -> Iterator[Result]:
    """Yield `function(item)` for each item, in order, computed ahead in threads, one item per thread.

    For work that mostly waits, such as network requests.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        yield from _run_ahead(pool, function, items, ahead=threads)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def batched(items: Iterable[Item], size: int) -> Iterator[tuple[Item, ...]]:
    """Yield the items in tuples of `size`; the last one may be shorter (`itertools.batched` of Python 3.12)."""
    rest = iter(items)
    while batch := tuple(itertools.islice(rest, size)):
        yield batch


def _run_ahead(
    pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], *, ahead: int
) -> Iterator[Result]:
    flying: deque[Future[Result]] = deque()
    for item in items:
        flying.append(pool.submit(function, item))
        if len(flying) > ahead:
            yield flying.popleft().result()
    while flying:
        yield flying.popleft().result()


@contextlib.contextmanager
def forking() -> Iterator[None]:
    """Context in which to fork: the child's garbage collector ignores the objects of the parent.

    Threads of the parent do not exist in the child. Destroying an object that owns some, such as an ONNX Runtime
    session, would wait for them for ever.
    """
    was_frozen = gc.get_freeze_count() > 0
    gc.freeze()
    try:
        yield
    finally:
        if not was_frozen:
            gc.unfreeze()


def follow_parent(parent: int) -> None:
    """Make this worker process end with its parent, and leave signals to it.

    Ctrl-C goes to the whole process group, and schedulers send SIGTERM to it; the parent alone decides when to stop.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before prctl took effect
            os._exit(1)
