"""Files that are either whole or absent: atomic writes, walks, digests, and errors that name the path."""

import contextlib
import errno
import hashlib
import itertools
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from maekit.system.errors import InputError, MaekitError
from maekit.system.signals import undone

_temporaries = itertools.count()


def fsync_directory(directory: Path) -> None:
    """Make the names in `directory` durable; EINVAL and ENOTSUP (the file system cannot do that) are ignored."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def require_writable(directory: Path) -> None:
    """Check that a file can be created in a directory, and create the directory if it is missing.

    To be called before long work that writes its result there.

    Raises:
        InputError: the directory is not writable; names it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise InputError(f"cannot write to {directory}: {error.strerror or error}") from error


@contextlib.contextmanager
def reading(path: Path | str, kind: type[MaekitError] = MaekitError) -> Iterator[None]:
    """Context in which an `OSError` becomes an error of this kind, with the path and the system's message."""
    try:
        yield
    except OSError as error:
        raise kind(f"cannot read {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context in which an `OSError` becomes a `write_failure`."""
    try:
        yield
    except OSError as error:
        raise write_failure(path, error) from error


@contextlib.contextmanager
def atomic_file(path: Path, *, scratch: Path | None = None) -> Iterator[IO[bytes]]:
    """Write a file that appears under its name only when it is whole and durable.

    Args:
        path: the final name.
        scratch: a directory on the same file system for the unfinished file; by default the parent of `path`.

    Raises:
        MaekitError: the disk is full or the path is not writable; names the path.
    """
    # The unfinished name ends in .tmp, so that no glob over *.parquet or *.onnx ever sees it.
    # The counter avoids collisions between threads that write equally named files through one scratch directory.
    temporary = (scratch or path.parent) / f".{path.name}.{os.getpid()}.{next(_temporaries)}.tmp"
    try:
        with writing(path), undone(temporary.unlink):
            temporary.parent.mkdir(parents=True, exist_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync_directory(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes, *, scratch: Path | None = None) -> None:
    """Write `data` to `path`, whole or not at all."""
    with atomic_file(path, scratch=scratch) as file:
        file.write(data)


def create_whole(path: Path, data: bytes, *, scratch: Path) -> bool:
    """Write `data` to `path`, whole or not at all, unless the file exists; return False if it already existed.

    Raises:
        MaekitError: the disk is full or the path is not writable; names the path.
    """
    whole = scratch / f".{path.name}.{os.getpid()}.{next(_temporaries)}.new"
    write_atomically(whole, data)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(whole, path)  # unlike a rename, it never replaces a file
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS) or path.exists():
                    raise
                os.replace(whole, path)  # this file system has no hard links
            fsync_directory(path.parent)
            return True
    finally:
        with contextlib.suppress(OSError):
            whole.unlink()


def cache_directory() -> Path:
    """Return the directory of reproducible data: $MAEKIT_CACHE, else $XDG_CACHE_HOME/maekit, else ~/.cache/maekit."""
    if own := os.environ.get("MAEKIT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maekit"


def walk_files(directory: Path) -> Iterator[Path]:
    """Yield every file below a directory in sorted order; follow symbolic links and skip hidden names.

    Raises:
        InputError: a folder cannot be read, or a link is broken; files must not be left out silently.
    """
    seen: set[str] = set()

    def fail(error: OSError) -> None:
        raise InputError(f"cannot read {error.filename}: {error.strerror}") from error

    found: list[str] = []
    for folder, folders, names in os.walk(directory, followlinks=True, onerror=fail):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (os.path.join(folder, name) for name in names if not name.startswith(".")):
            try:
                if stat.S_ISREG(os.stat(path).st_mode):
                    found.append(path)
            except FileNotFoundError as error:
                raise InputError(f"{path} is a link that leads nowhere; mend or remove it") from error
            except OSError as error:
                fail(error)
    # Sorted by path components, as `Path` compares: a/x comes before a.b/x.
    yield from map(Path, sorted(found, key=lambda path: path.split(os.sep)))


def require_utf8(path: Path) -> None:
    """Refuse a path that cannot be written as text.

    Raises:
        InputError: the name is not UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{os.fsencode(path)!r}: the name is not UTF-8; rename it") from error


def write_failure(path: Path, error: OSError) -> MaekitError:
    """Return the error for a failed write, with the path and the system's message."""
    return MaekitError(f"cannot write {path}: {error.strerror or error}; what was written before is intact")


def describe_bytes(count: float) -> str:
    """Return a number of bytes as readable text, such as 1.5 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
