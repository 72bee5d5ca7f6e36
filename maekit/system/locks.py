"""Locks on an output directory shared by processes and machines: one per run, and one per shard.

On one machine the kernel decides (`lockf`): a lock ends with its process, and forked workers do not inherit it. If the
file system does not share locks between machines, a heartbeat decides: the modification time of the lock file, compared
with the clock of the file system itself.
"""

import contextlib
import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from maekit.system import files
from maekit.system.errors import InputError, MaekitError
from maekit.system.signals import undone

HEARTBEAT_SECONDS = 15.0
# A machine whose heartbeat is older than this is considered dead.
STALE_SECONDS = 120.0
_mutex = threading.Lock()
_held: dict[Path, tuple[IO[str], str]] = {}  # open lock files, each with the text written to it
_SWEEPING = "clearing up, "
_SWEEP_SECONDS = 30.0  # how long to wait for another process to clean up


class LockedError(MaekitError):
    """Another process or thread holds the lock.

    Attributes:
        owner: the holder, as text.
    """

    def __init__(self, owner: str) -> None:
        super().__init__(f"held by {owner}")
        self.owner = owner


@contextlib.contextmanager
def sole_owner(directory: Path) -> Iterator[None]:
    """Hold `directory` for this process alone: a second process is refused, and a killed one leaves no lock behind.

    The lock is POSIX `lockf`: the kernel frees it when the process dies, and forked workers do not inherit it (they do
    inherit `flock`, which then outlives a killed parent).

    Raises:
        InputError: another process holds the directory, or it is not writable.
    """
    path = directory / ".lock"
    is_new = not directory.exists()

    def tidy() -> None:
        if is_new and directory.is_dir() and [child.name for child in directory.iterdir()] == [path.name]:
            # Nothing was written to the new directory (the work was refused), so remove it again.
            path.unlink()
            directory.rmdir()

    file = _open(path)  # closed in `finally` only: closing ANY descriptor of a file drops the process's locks on it
    try:
        try:
            _lock(file, path)
        except LockedError as held:
            in_use = f"{directory} is in use by {held.owner}; wait for it to end or choose another `out`"
            raise InputError(in_use) from held
        _write(file, path, f"{_me()}\n")
        with undone(tidy):
            yield
    finally:
        tidy()
        _close(file)


@contextlib.contextmanager
def owned(path: Path, *, sweeping: bool = False) -> Iterator[None]:
    """Hold the lock file `path`. Nothing else in this process may open the file: closing it would end the lock.

    Args:
        path: the lock file.
        sweeping: hold the lock only to clean up after its last owner; others wait for that.

    Raises:
        LockedError: another process, or another thread of this one, holds the lock.
        MaekitError: the lock cannot be written.
    """
    path = path.absolute()
    until = time.monotonic() + _SWEEP_SECONDS
    while True:
        try:
            _acquire(path, sweeping=sweeping)
            break
        except LockedError as held:
            if not held.owner.startswith(_SWEEPING) or time.monotonic() > until:
                raise
            time.sleep(0.05)

    def give_up() -> None:
        if still_owns(path):
            with contextlib.suppress(OSError):
                path.unlink()  # while it is held, so that no other owner's file is removed

    try:
        with undone(give_up):
            yield
    finally:
        give_up()
        with _mutex:
            file, _ = _held.pop(path, (None, ""))
        if file is not None:  # it is None in a forked child
            _close(file)


def still_owns(path: Path) -> bool:
    """Whether this process still owns a lock it took: while it was suspended, another may have taken it over."""
    path = path.absolute()
    file, text = _held.get(path, (None, ""))
    try:
        return file is not None and _is_same(file, path) and _read(file) == text.strip()
    except OSError:
        return False


def _acquire(path: Path, *, sweeping: bool) -> None:
    with _mutex, contextlib.ExitStack() as unfinished:
        if path in _held:
            raise LockedError(_me())
        file: IO[str] | None = None
        while file is None or not _is_same(file, path):  # again if its owner has just deleted it
            unfinished.close()
            file = _open(path)
            unfinished.callback(_close, file)
            _lock(file, path)
            _refuse_if_elsewhere(file, path)
        # The token distinguishes this owner from an earlier one with the same process number.
        text = f"{_SWEEPING if sweeping else ''}{_me()}\n{uuid.uuid4()}\n"
        _write(file, path, text)
        unfinished.pop_all()
        _held[path] = file, text
        _start_heart()


def _open(path: Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Append mode: the owner's text must survive until the lock is acquired.
        # O_NOFOLLOW: a link would lead out of the directory.
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        return open(os.open(path, flags, 0o666), "r+", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write to {path.parent}: {error.strerror or error}") from error


def try_lock(file: IO[str]) -> bool:
    """Take the lock of an open file without waiting; return False if another process has it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except (BlockingIOError, PermissionError):  # EAGAIN and EACCES: systems differ
        return False


def _lock(file: IO[str], path: Path) -> None:
    try:
        is_mine = try_lock(file)
    except OSError as error:
        raise InputError(f"cannot lock {path}: {error.strerror}; choose another `out`") from error
    if not is_mine:
        raise LockedError(_owner(file) or "another process")


def _refuse_if_elsewhere(file: IO[str], path: Path) -> None:
    """Refuse a lock whose owner, on another machine, seems to be alive."""
    owner = _owner(file)
    if owner and not owner.endswith(f" on {socket.gethostname()}") and _age(file, path) < STALE_SECONDS:
        # The kernel granted it, but perhaps only because this file system does not share locks between machines.
        raise LockedError(f"{owner} (its last sign is {_age(file, path):.0f} s old)")


def _me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _write(file: IO[str], path: Path, text: str) -> None:
    with files.writing(path):
        file.truncate(0)
        file.write(text)
        file.flush()


def _close(file: IO[str]) -> None:
    with contextlib.suppress(OSError):  # text that could not be flushed, as on a full disk, fails again here
        file.close()


def _owner(file: IO[str]) -> str:
    return _read(file).partition("\n")[0]


def _read(file: IO[str]) -> str:
    return os.pread(file.fileno(), 4096, 0).decode("utf-8", "replace").strip()


def _age(file: IO[str], path: Path) -> float:
    """Return how many seconds ago a lock was last touched, by the clock of the file system."""
    probe = path.with_name(f".{path.name}.{os.getpid()}.now")
    try:
        probe.touch()
        return probe.stat().st_mtime - os.fstat(file.fileno()).st_mtime
    except OSError:
        return 0.0  # no evidence that it is stale
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _is_same(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _forget() -> None:
    """Reset a forked child: it holds no lock, and a thread of its parent may have held the mutex."""
    global _mutex
    _mutex = threading.Lock()
    _held.clear()


os.register_at_fork(after_in_child=_forget)
_heart: threading.Thread | None = None


def _start_heart() -> None:
    global _heart
    if _heart is None or not _heart.is_alive():
        _heart = threading.Thread(target=_beat, name="heartbeat", daemon=True)
        _heart.start()


def _beat() -> None:
    while True:
        time.sleep(HEARTBEAT_SECONDS)
        with _mutex:
            for path in _held:
                with contextlib.suppress(OSError):
                    os.utime(path)
