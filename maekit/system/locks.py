"""Locks on an output directory shared by processes and machines: one per run, and one per shard.

On one machine the kernel decides (`lockf`): a lock ends with its process, and forked workers do not inherit it. If the
file system does not share locks between machines, a heartbeat decides: the modification time of the lock file, compared
with the clock of the file system itself. A file system may have no locks at all (Lustre without `flock`, NFS without
lockd, some FUSE mounts): then the owner is who the file names, and it is dead if its process is, or its heartbeat old.
"""

import contextlib
import errno
import fcntl
import os
import re
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
_NO_LOCKS = files.LACKING | {errno.ENOLCK}
_BORN = "born "
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
    path = (directory / ".lock").absolute()
    is_new = not directory.exists()

    def tidy() -> None:
        if is_new and directory.is_dir() and [child.name for child in directory.iterdir()] == [path.name]:
            # Nothing was written to the new directory (the work was refused), so remove it again.
            path.unlink()
            directory.rmdir()

    try:
        _acquire(path, f"{_me()}\n", judge=False)
    except LockedError as held:
        in_use = f"{directory} is in use by {held.owner}; wait for it to end or choose another `out`"
        raise InputError(in_use) from held
    try:
        with undone(tidy):
            yield
    finally:
        tidy()
        _release(path)


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
            # The token distinguishes this owner from an earlier one with the same process number.
            _acquire(path, f"{_SWEEPING if sweeping else ''}{_me()}\n{uuid.uuid4()}\n", judge=True)
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
        _release(path)


def still_owns(path: Path) -> bool:
    """Whether this process still owns a lock it took: while it was suspended, another may have taken it over."""
    path = path.absolute()
    file, text = _held.get(path, (None, ""))
    try:
        return file is not None and _is_same(file, path) and _read(file) == text.strip()
    except OSError:
        return False


def _acquire(path: Path, text: str, *, judge: bool) -> None:
    """Take a lock and write its owner into the file.

    Args:
        path: the lock file.
        text: the owner, and what tells it from others.
        judge: whether an owner on another machine may hold a lock that the kernel grants.
    """
    with _mutex, contextlib.ExitStack() as unfinished:
        if path in _held:
            raise LockedError(_me())
        file: IO[str] | None = None
        while file is None or not _is_same(file, path):  # again if its owner has just deleted it
            unfinished.close()
            file = _open(path)
            unfinished.callback(_close, file)
            if not _lock(file, path):
                text = f"{text.partition(_BORN)[0]}{_born(os.getpid())}\n"
                _claim(file, path, text)
                continue
            if judge:
                _refuse_if_elsewhere(file, path)
            _write(file, path, text)
        unfinished.pop_all()
        _held[path] = file, text
        _start_heart()


def _release(path: Path) -> None:
    if still_owns(path):
        with contextlib.suppress(OSError):
            os.truncate(path, 0)  # or this process would be taken for the owner as long as it lives
    with _mutex:
        file, _ = _held.pop(path, (None, ""))
    if file is not None:  # it is None in a forked child
        _close(file)


def _open(path: Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Append mode: the owner's text must survive until the lock is acquired.
        # O_NOFOLLOW: a link would lead out of the directory.
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        return open(os.open(path, flags, 0o666), "r+", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write to {path.parent}: {error.strerror or error}") from error


def _lock(file: IO[str], path: Path) -> bool:
    """Take the kernel's lock of an open file; return False if the file system has no locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except (BlockingIOError, PermissionError) as held:  # EAGAIN and EACCES: systems differ
        raise LockedError(_owner(file) or "another process") from held
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise InputError(f"cannot lock {path}: {error.strerror}; choose another `out`") from error
    return False


def _claim(file: IO[str], path: Path, text: str) -> None:
    """Become the owner where the kernel knows of none, unless the one that the file names lives."""
    files.tell_once(
        "locks",
        f"the file system of {path.parent} has no locks: a run shows by a sign every {HEARTBEAT_SECONDS:.0f} s that it "
        f"has its output; where a machine dies, others can go on after {STALE_SECONDS:.0f} s",
    )
    with files.writing(path), files.claimed(path):
        if _lives(file, path):
            raise LockedError(f"{_owner(file)} (its last sign is {_age(file, path):.0f} s old)")
        _write(file, path, text)


def _lives(file: IO[str], path: Path) -> bool:
    """Whether the owner that a lock file names is alive, as its process says on this machine, or else its heartbeat."""
    first, *rest = _read(file).splitlines() or [""]
    named = re.fullmatch(rf"(?:{_SWEEPING})?process (\d+) on (.*)", first)
    if named and named[2] == socket.gethostname():
        number, theirs, own = int(named[1]), rest[-1] if rest else "", _born(os.getpid())
        # In another container of the same host name, the number means another process.
        if theirs.rpartition(" ")[2] == own.rpartition(" ")[2]:
            if now := _born(number):
                return now == theirs and number != os.getpid()  # this process has let it go
            try:
                os.kill(number, 0)
            except ProcessLookupError:
                return False
            except PermissionError:
                pass  # of another user, whose processes the system hides
    return bool(first) and _age(file, path) < STALE_SECONDS


def _born(number: int) -> str:
    """Return what tells a process from others of its number: its start, and its container; empty if not known."""
    try:
        state, *fields = Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        container = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return ""
    return "dead" if state in "ZX" else f"{_BORN}{fields[18]} in {container}"


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
