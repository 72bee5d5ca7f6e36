"""What surrounds every command: streams that never end the work, and signals that are answered at once."""

import atexit
import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterator

from maekit.cli.streams import streams
from maekit.system.signals import SIGNALS, answering

_entered = False


@contextlib.contextmanager
def program(*, ends: bool = False) -> Iterator[None]:
    """Context of a whole command, entered before anything that takes time; within itself it does nothing.

    Args:
        ends: the process ends with it. Streams and signals then stay as they are until the interpreter has shut down.

    Raises:
        SystemExit: with 1 where the result could not be printed.
    """
    global _entered
    if _entered:
        yield
        return
    _entered = True
    stack = contextlib.ExitStack()
    if ends:
        atexit.register(_ignore_signals, stack)  # runs last: whoever registers later runs before
    stack.enter_context(streams.mended())
    answer = stack.enter_context(answering(_tell))
    try:
        code = 0
        try:
            yield
        except SystemExit as done:
            code = done.code if isinstance(done.code, int) else int(done.code is not None)
        if lost := streams.lost():
            print(f"maekit: cannot write to standard output: {lost.strerror}", file=sys.stderr)
            code = code or int(streams.is_result)
        answer.done = code
        sys.exit(code)
    finally:
        if not ends:
            stack.close()
            _entered = False


def _ignore_signals(kept: contextlib.ExitStack) -> None:
    """End signal handling; `kept` holds the contexts until now, as collecting them would bring back the defaults."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _tell(line: str) -> None:
    """Print a line, from another thread, past the streams: the main thread may be waiting in one of them."""
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1
    rank = f"rank {os.environ.get('RANK')}: " if several else ""
    above = "\n\x1b[?25h" if os.isatty(2) else ""  # below a bar, which hides the cursor
    with contextlib.suppress(OSError):
        if select.select([], [2], [], 0)[1]:
            os.write(2, f"{above}maekit: {rank}{line}\n".encode())
