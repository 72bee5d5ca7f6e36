"""Standard output and standard error that never end the work: closed, full, or with nobody left who reads."""

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import Any

_NAMES = ("stdin", "stdout", "stderr")


class _Output(io.FileIO):
    """A descriptor that takes everything; what cannot be written is dropped.

    Attributes:
        lost: the first error, or None; that nobody reads any more is none.
    """

    def __init__(self, descriptor: int, *, closed: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.was_closed, self.lost = closed, OSError(errno.EBADF, os.strerror(errno.EBADF)) if closed else None

    def write(self, data: Any) -> int:
        """Write the bytes, or drop them; return their number."""
        view = memoryview(data).cast("B")
        size, done = len(view), 0
        try:
            while done < size:
                written = super().write(view[done:])
                if written is None:  # a pipe that whoever started us made non-blocking
                    select.select([], [self], [])
                done += written or 0
        except OSError as error:
            if error.errno != errno.EPIPE:
                self.lost = self.lost or error
        return size


class Streams:
    """The standard streams of this process, made safe.

    Attributes:
        is_result: whether the result is what is printed: `--json`, or a command without an `out`.
        is_asked_for: whether it is the JSON line, which even a closed standard output loses.
    """

    is_result, is_asked_for = True, False

    def __init__(self) -> None:
        self._output: _Output | None = None

    @contextlib.contextmanager
    def mended(self) -> Iterator[None]:
        """Context in which `sys.stdout` and `sys.stderr` never raise, and descriptors 0, 1 and 2 are open.

        Streams that something else has replaced, such as a test, stay.
        """
        before = {name: getattr(sys, name) for name in _NAMES}
        closed = [_open_if_closed(descriptor) for descriptor in range(3)]
        if sys.stdin is None:
            sys.stdin = open(0, closefd=False)  # noqa: SIM115
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            stream = getattr(sys, name)
            if stream is not None and stream is not getattr(sys, f"__{name}__"):
                continue
            raw = _Output(descriptor, closed=closed[descriptor])
            if name == "stdout":
                self._output = raw
            _drain(stream)
            safe = io.TextIOWrapper(
                io.BufferedWriter(raw),
                encoding=stream.encoding if stream else "utf-8",
                errors="backslashreplace",
                line_buffering=name == "stderr" or raw.isatty(),
            )
            setattr(sys, name, safe)
        try:
            yield
        finally:
            for name in _NAMES[1:]:
                _drain(getattr(sys, name))
            for name, stream in before.items():
                setattr(sys, name, stream)

    def lost(self) -> OSError | None:
        """Return why a part of standard output is missing; None if nothing is, or nobody wanted to read it."""
        _drain(sys.stdout)
        if self._output is None or (self._output.was_closed and not self.is_asked_for):
            return None
        return self._output.lost


def _open_if_closed(descriptor: int) -> bool:
    """Open the null device as a descriptor that is closed: a file opened later would take its number."""
    try:
        os.fstat(descriptor)
        return False
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
        if null != descriptor:
            os.dup2(null, descriptor)
            os.close(null)
        os.set_inheritable(descriptor, True)
        return True


def _drain(stream: Any) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        stream.flush()


streams = Streams()
