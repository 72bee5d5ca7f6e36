"""Stopping on a signal: at once while nothing needs saving, later at a point where everything is saved.

Python calls a signal's handler between two bytecodes of the main thread: a backward pass, an import or a wait for other
processes delays it, and what it raises may be caught by whatever is running. The command line therefore has a thread
(`answering`) that reads signals as they arrive. While nothing needs saving, the thread ends the process itself.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from maekit.system.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_SAME_WISH_SECONDS = 2.0
_TELL_SECONDS = 0.5
_FLUSH_SECONDS = 0.3


class StopNow(BaseException):
    """Ends work that has nothing to save; no `except Exception` on its way takes it for an error of its own."""

    exit_code = Stopped.exit_code


@dataclass(eq=False)
class _Work:
    """What a signal stops.

    Attributes:
        then: called when the first signal arrives.
        has_begun: whether there is something to save.
        before: what has not begun until then, for the message.
        after: at which point it stops, for the message.
    """

    then: Callable[[], None]
    has_begun: Callable[[], bool]
    before: str = ""
    after: str = ""

    def stopped(self, name: str) -> str:
        """Return the message of a stop that had nothing to save."""
        return f"stopped by {name}{self.before and ' before '}{self.before}; run the same command again to go on"


_stack: list[_Work] = []  # the innermost work is the last
_received: dict[str, float] = {}  # the first signal: its name -> when it came
_undo: list[Callable[[], object]] = []
_answer: "_Answer | None" = None


@contextlib.contextmanager
def stop_on_signal(
    then: Callable[[], None] = lambda: None,
    *,
    has_begun: Callable[[], bool] = lambda: True,
    before: str = "",
    after: str = "as soon as everything is saved",
) -> Iterator[Callable[[], str | None]]:
    """Catch SIGTERM, SIGINT, SIGHUP and SIGUSR1 inside the context; the last two unless they are ignored, as by nohup.

    Args:
        then: called when the signal arrives, in the middle of whatever the main thread is doing, or in the thread of
            `answering`. It may raise `StopNow`, which leaves the context as `Stopped`.
        has_begun: whether there is something to save; until then, `answering` ends the process.
        before: what has not begun until then, for the message.
        after: at which point the work stops, for the message.

    Yields:
        a function that returns the name of the signal received, or None. A second signal gets the default handling, so
        that a blocked save can still be interrupted. Within two seconds of the first it is ignored, because a scheduler
        and a launcher often both send one, and people press Ctrl-C several times.

    Raises:
        Stopped: `then` raised `StopNow`, or the signal came before the context was entered.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    work = _Work(then, has_begun, before, after)
    if _received:
        raise Stopped(work.stopped(next(iter(_received))))
    handlers = contextlib.nullcontext() if _stack else _handlers()
    _stack.append(work)
    try:
        with handlers:
            try:
                yield lambda: next(iter(_received), None)
            except StopNow:
                raise Stopped(work.stopped(next(iter(_received)))) from None
    finally:
        if work in _stack:
            _stack.remove(work)


@contextlib.contextmanager
def _handlers() -> Iterator[None]:
    ignored = [number for number in (signal.SIGHUP, signal.SIGUSR1) if signal.getsignal(number) == signal.SIG_IGN]
    previous = {number: signal.signal(number, _handle) for number in SIGNALS if number not in ignored}
    try:
        yield
    finally:
        for number, handler in previous.items():
            if signal.getsignal(number) == _handle:  # not where somebody has set another one since
                signal.signal(number, handler)
        _received.clear()


def _handle(number: int, frame: FrameType | None) -> None:
    """Runs in the main thread."""
    if not _stack:  # in a forked child: its parent decides
        return
    is_first = not _received
    _received.setdefault(signal.Signals(number).name, time.monotonic())
    if _answer is not None:
        if not _stack[-1].has_begun():
            time.sleep(60)  # the other thread ends the process meanwhile: nothing more is begun or said
    elif is_first:
        _stack[-1].then()
    elif time.monotonic() - min(_received.values()) > _SAME_WISH_SECONDS:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


@contextlib.contextmanager
def undone(undo: Callable[[], object]) -> Iterator[None]:
    """Context in which `undo` is called if a signal ends the process: it removes what is unfinished."""
    _undo.append(undo)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # forked children forget
            _undo.remove(undo)


@contextlib.contextmanager
def answering(tell: Callable[[str], None]) -> Iterator["_Answer"]:
    """Answer signals within a second, whatever the main thread does; for a program that may end at any moment.

    Args:
        tell: shows one line. Called in another thread; must not wait.
    """
    global _answer
    _stack.append(_Work(lambda: None, lambda: False))
    _answer = answer = _Answer(tell)
    try:
        with _handlers():
            yield answer
    finally:
        answer.close()
        _answer = None
        _stack.clear()


class _Answer:
    """The thread that answers signals.

    Attributes:
        done: exit code of the work, once it is done and the interpreter is shutting down.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.done: int | None = None
        self._tell = tell
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._run, name="signals", daemon=True).start()

    def close(self) -> None:
        """End the thread."""
        signal.set_wakeup_fd(self._before)
        os.close(self._writer)

    def _run(self) -> None:
        first: float | None = None
        wait: float | None = None
        while True:
            if not select.select([self._reader], [], [], wait)[0]:
                wait = None
                if self.done is None and _stack[-1].has_begun():
                    self._tell(f"{next(iter(_received))}: stopping {_stack[-1].after}; again to stop now")
                continue
            if not (arrived := os.read(self._reader, 1)):
                os.close(self._reader)
                return
            if arrived[0] not in SIGNALS or not _stack:  # such as SIGCHLD, where someone handles it
                continue
            name, work = signal.Signals(arrived[0]).name, _stack[-1]
            if self.done is not None:
                os._exit(self.done)
            if not work.has_begun():
                self._end(Stopped.exit_code, work.stopped(name))
            if first is None:
                first, wait = time.monotonic(), _TELL_SECONDS
                _received.setdefault(name, first)
                work.then()
            elif time.monotonic() - first > _SAME_WISH_SECONDS:
                self._end(128 + arrived[0], f"ended at once by another {name}; run the same command again to go on")

    def _end(self, code: int, line: str) -> NoReturn:
        """Remove what is unfinished, say why, and end the process with its children."""
        for undo in reversed(list(_undo)):
            with contextlib.suppress(Exception):
                undo()
        if processes := sys.modules.get("multiprocessing"):
            for child in processes.active_children():
                child.kill()
        # In a thread of its own: the main thread may hold the stream, in a write that nobody reads.
        flush = threading.Thread(target=_flush, daemon=True)
        flush.start()
        flush.join(_FLUSH_SECONDS)
        self._tell(line)
        os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _forget() -> None:
    """Leave signals to the parent, in a forked child that sets no handlers of its own."""
    global _answer
    if _answer is not None:
        signal.set_wakeup_fd(-1)
    _answer = None
    for state in (_stack, _received, _undo):
        state.clear()


os.register_at_fork(after_in_child=_forget)
