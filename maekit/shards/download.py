"""Downloads through fsspec over unreliable networks: the size and version of a file, and its bytes in pieces."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from maekit.shards.spec import connect
from maekit.system.errors import MaekitError
from maekit.system.redaction import redact

# The piece size is halved when a piece fails or takes long, and doubled when it arrives soon: a connection that drops
# often still makes progress, and a signal takes effect within seconds.
_FIRST_PIECE, _SMALLEST_PIECE, _LARGEST_PIECE = 4 << 20, 64 << 10, 64 << 20
_PIECE_SECONDS = 2.0
_ATTEMPTS = 8  # in a row, without one byte of progress
_FIRST_ATTEMPTS = 5  # to get the size and version of a file
_LONGEST_PAUSE = 10.0
# The names that fsspec file systems give to an identifier that changes with the file.
_MARKS = (
    *("ETag", "etag", "md5Hash", "md5", "sha256", "oid", "blob_id", "generation"),
    *("Last-Modified", "LastModified", "last_modified", "mtime", "modify", "modificationTime", "last_write_time"),
)
# HTTP status codes that another attempt does not change.
_ABSENT_STATUS = frozenset((404, 410))
_FINAL_STATUS = frozenset(range(400, 500)) - {408, 425, 429}


class AbsentError(MaekitError):
    """A remote file does not exist."""


@dataclass(frozen=True)
class RemoteFile:
    """What a server reports about a file.

    Attributes:
        url: its URL.
        size: in bytes; None if the server does not report it.
        version: an identifier that changes with the content; empty if there is none.
    """

    url: str
    size: int | None
    version: str


def describe(url: str, pause: Callable[[float], None]) -> RemoteFile:
    """Ask the server for size and version.

    Raises:
        AbsentError: the file does not exist.
        MaekitError: the server refuses, or does not answer.
    """
    filesystem, path = connect(url)
    with contextlib.suppress(Exception):
        filesystem.invalidate_cache()  # some file systems answer from cached listings
    info: dict[str, Any] = _insist(url, lambda: filesystem.info(path), pause, attempts=_FIRST_ATTEMPTS)
    size = info.get("size")
    version = " ".join(f"{key}={info[key]}" for key in _MARKS if info.get(key) is not None)
    return RemoteFile(url, None if size is None else int(size), version and f"{version} size={size}")


def pieces(there: RemoteFile, done: int, pause: Callable[[float], None]) -> Iterator[bytes]:
    """Yield the bytes of a remote file from `done` on.

    Raises:
        MaekitError: the server keeps failing, or returns another number of bytes than requested.
    """
    filesystem, path = connect(there.url)
    if there.size is None:
        # No piece can be requested; after an interruption the next download starts over.
        with _insist(there.url, lambda: filesystem.open(path, "rb"), pause) as stream:
            while data := _insist(there.url, lambda: stream.read(_FIRST_PIECE), pause, attempts=1):
                yield data
        return
    length, failures = _FIRST_PIECE, 0
    while done < there.size:
        end = min(done + length, there.size)
        before = time.monotonic()
        try:
            ask = functools.partial(filesystem.cat_file, path, start=done, end=end)
            data = _insist(there.url, ask, pause, attempts=1)
            if len(data) == there.size != end - done:  # a server without range requests sends the whole file
                data = data[done:]
            elif len(data) != end - done:
                raise MaekitError(f"{there.url}: {len(data)} bytes came where {end - done} were asked for")
        except MaekitError as error:
            failures += 1
            if isinstance(error, AbsentError) or failures >= _ATTEMPTS:
                raise
            length = max(_SMALLEST_PIECE, length // 2)
            pause(min(_LONGEST_PAUSE, 0.1 * 2**failures))
            continue
        failures = 0
        is_fast = time.monotonic() - before < _PIECE_SECONDS
        length = min(_LARGEST_PIECE, 2 * length) if is_fast else max(_SMALLEST_PIECE, length // 2)
        done += len(data)
        yield data


def _insist(url: str, ask: Any, pause: Callable[[float], None], *, attempts: int = _ATTEMPTS) -> Any:
    """Call `ask`; retry after a pause if the network fails.

    Raises:
        AbsentError: there is no such file.
        MaekitError: the server refuses, or does not answer.
    """
    for attempt in range(1, attempts + 1):
        try:
            return ask()
        except Exception as raised:  # each protocol raises its own types, which must not be imported here
            error: BaseException = raised
            if isinstance(error, FileNotFoundError):
                # Over HTTP, fsspec also raises this for a server that is down; `__cause__` is the actual error.
                if error.__cause__ is None or getattr(error.__cause__, "status", None) in _ABSENT_STATUS:
                    raise AbsentError(f"{url}: no such file there") from None
                error = error.__cause__
            status = getattr(error, "status", None)
            if isinstance(error, PermissionError) or status in _FINAL_STATUS or attempt == attempts:
                what = f"{status} {getattr(error, 'message', '')}".strip() if status else str(error)
                raise MaekitError(redact(f"{url}: {what or type(error).__name__}", url)) from None
            pause(min(_LONGEST_PAUSE, 0.1 * 2**attempt))
    raise AssertionError
