"""Files that are either whole or absent: atomic writes, walks, digests, and errors that name the path.

Mounts of buckets and some network file systems lack calls that disks have. What can be done without is forgiven, with
one note; what cannot, a rename, is an error that says so.
"""

import contextlib
import errno
import hashlib
import itertools
import os
import stat
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from maekit.system.errors import InputError, MachineWarning, MaekitError
from maekit.system.signals import undone

_temporaries = itertools.count()
# What file systems say of a call that they lack. A disk that fails says EIO, and one that is full ENOSPC.
LACKING = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
_NO_DIRECTORIES = LACKING | {errno.EPERM, errno.EACCES, errno.EBADF, errno.EISDIR}
_NO_RENAME = LACKING | {errno.EPERM, errno.EXDEV}
_CLAIM_SECONDS = 10.0  # a claim is held for milliseconds; an older one is that of a killed process


_told: set[str] = set()


def tell_once(lacking: str, text: str) -> None:
    """Warn of something that this machine lacks, once per process."""
    if lacking not in _told:
        _told.add(lacking)
        warnings.warn(text, MachineWarning, stacklevel=2)


def fsync(file: IO[bytes]) -> None:
    """Make the content of a file durable; on a file system that cannot do that, say so once."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in LACKING:
            raise
        tell_once(
            "fsync",
            f"the file system of {file.name} does not write through on request ({error.strerror}): what was written "
            "shortly before a crash of the machine may be lost",
        )


def fsync_directory(directory: Path) -> None:
    """Make the names in `directory` durable, on file systems that can."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_DIRECTORIES:
            raise


def rename(source: Path, target: Path) -> None:
    """Rename a file or a directory; a file at `target` is replaced.

    Raises:
        MaekitError: the file system has no rename, without which nothing can appear whole.
        OSError: another failure.
    """
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno not in _NO_RENAME:
            raise
        raise MaekitError(
            f"cannot write {target}: its file system does not rename ({error.strerror}), so nothing can appear there "
            "whole; write to a local disk, then copy"
        ) from error


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
        raise read_failure(path, error, kind) from error


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
                fsync(file)
            rename(temporary, path)
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
            except OSError:  # no hard links here; if it is something else, the next lines fail as well
                with claimed(path):
                    if path.exists():
                        return False
                    rename(whole, path)
            fsync_directory(path.parent)
            return True
    finally:
        with contextlib.suppress(OSError):
            whole.unlink()


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Hold a name for milliseconds against other threads and processes, on file systems without links or locks.

    Raises:
        OSError: the folder is not writable.
    """
    claim, seen, since = path.with_name(f".{path.name}.claim"), None, 0.0
    while True:
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            break
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                there = os.stat(claim)
                if seen != (there.st_ino, there.st_mtime_ns):
                    seen, since = (there.st_ino, there.st_mtime_ns), time.monotonic()
                elif time.monotonic() - since > _CLAIM_SECONDS:
                    claim.unlink()
        time.sleep(0.01)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            claim.unlink()


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


def read_failure(path: Path | str, error: OSError, kind: type[MaekitError] = MaekitError) -> MaekitError:
    """Return the error of this kind for a failed read, with the path and the system's message."""
    return kind(f"cannot read {path}: {error.strerror or error}")


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
