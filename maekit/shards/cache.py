"""Remote shards: downloaded whole through fsspec into a bounded cache, verified, then read like local ones.

    CACHE/shards/ab/abcd….tar         a shard, whole
    CACHE/shards/ab/abcd….tar.index   its published index, if there is one
    CACHE/shards/ab/abcd….json        its URL, and its size and version on the server
    CACHE/shards/ab/abcd….part        a running or interrupted download, to be resumed
    CACHE/shards/ab/abcd….room        how many bytes a running download has reserved

A download requests pieces and resumes after the last whole one, in this process or the next. Many processes share the
cache; one of them downloads a shard, under a lock. The least recently used shards are evicted; an evicted file that is
still open can be read on, and occupies the disk until it is closed.
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO

import numpy as np

from maekit.shards import download
from maekit.shards.catalogue import CatalogueRow
from maekit.shards.download import RemoteFile
from maekit.shards.index import INDEX_SUFFIX, ShardIndex, build_index, index_path, parse_index
from maekit.shards.spec import ShardFile
from maekit.system import files
from maekit.system.errors import InputError, MaekitError
from maekit.system.parallel import map_in_threads

DEFAULT_LIMIT = 50_000_000_000
_INDEX_THREADS = 16
_LARGEST_INDEX = 1 << 30
# One mutex per lock file, between the threads of this process: `lockf` locks only distinguish processes.
_BUSY: dict[str, threading.Lock] = {}
os.register_at_fork(after_in_child=_BUSY.clear)


class RemoteCache:
    """The cache of remote shards on this machine.

    Args:
        limit: maximum size of the cache in bytes.
    """

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self.limit = limit
        self._stopped = threading.Event()
        self._known: dict[Path, ShardFile] = {}

    def stop(self) -> None:
        """Make downloads stop after the current piece; what they have is kept."""
        self._stopped.set()

    @property
    def is_stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped.is_set()

    def _pause(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise MaekitError("stopped while fetching; what was fetched is kept")

    def owns(self, path: Path) -> bool:
        """Whether this path is the cache file of a known remote shard."""
        return path in self._known

    def fetch(self, shard: ShardFile) -> str:
        """Bring the server's current version of a shard into the cache; return that version's identifier.

        Raises:
            MaekitError: it cannot be downloaded.
        """
        self._known[shard.path] = shard
        assert shard.url is not None
        there = download.describe(shard.url, self._pause)
        with self._owner(shard.path):
            if not self._is_current(shard, there):
                self._download(shard, there)
                # A kept index may belong to another version; a fresh one brings the CRC-32s.
                index_path(shard.path).unlink(missing_ok=True)
                with contextlib.suppress(MaekitError):  # without an index the shard is scanned
                    self._download_index(shard)
            _touch(shard.path)
        return there.version

    def fetch_anew(self, shard: ShardFile) -> str:
        """Download a shard again because its cached copy is damaged; the new copy may be sound.

        Raises:
            MaekitError: it cannot be downloaded.
        """
        with self._owner(shard.path):
            shard.path.unlink(missing_ok=True)
        return self.fetch(shard)

    def describe(self, shard: ShardFile) -> RemoteFile:
        """Return what the server reports about a shard now.

        Raises:
            MaekitError: the shard does not exist, or the server does not answer.
        """
        assert shard.url is not None
        return download.describe(shard.url, self._pause)

    def open(self, index: ShardIndex) -> int:
        """Return a descriptor of a shard that matches its index, downloading it if needed.

        Raises:
            MaekitError: it cannot be downloaded, or the server's copy does not match the index.
        """
        shard = self._known[index.path]
        for attempt in range(3):  # between fetching and opening, another process may evict it
            try:
                descriptor = os.open(index.path, os.O_RDONLY | os.O_CLOEXEC)
                if index.adopt(descriptor):
                    _touch(index.path)
                    return descriptor
                os.close(descriptor)
            except FileNotFoundError:
                pass
            except OSError as error:
                raise MaekitError(f"cannot read {index.path}: {error.strerror}") from error
            if attempt < 2:
                self.fetch_as_indexed(shard, index)
        raise MaekitError(f"{shard.url}: evicted before it could be read; give a larger `cache_gb`")

    def fetch_as_indexed(self, shard: ShardFile, index: ShardIndex, *, wait: bool = True) -> bool:
        """Bring the shard that an index describes into the cache; return False if another process is downloading it.

        Args:
            shard: the shard.
            index: what the shard must match: size, headers, and the CRC-32 of all members if the index has them.
            wait: wait for another process that is downloading it.

        Raises:
            MaekitError: it cannot be downloaded, or does not match the index.
        """
        self._known[shard.path] = shard
        assert shard.url is not None
        with self._owner(shard.path, wait=wait) as is_mine:
            if not is_mine:
                return False
            # All members are compared once, after the download; later, each is compared when it is read.
            if not _fits(shard, index, thoroughly=False):
                self._download(shard, download.describe(shard.url, self._pause))
                if not _fits(shard, index, thoroughly=True):
                    shard.path.unlink(missing_ok=True)
                    raise MaekitError(
                        f"{shard.url}: not what its published index describes; publish shards and indexes together"
                    )
            _touch(shard.path)
            return True

    def published_index(self, shard: ShardFile) -> ShardIndex | None:
        """Return the index published beside a remote shard, from the cache or downloaded; None if there is none.

        Raises:
            MaekitError: it cannot be downloaded.
        """
        self._known[shard.path] = shard
        with contextlib.suppress(OSError):
            index = _parse(shard, index_path(shard.path).read_bytes())
            if index is not None:
                return index
        return self._download_index(shard)

    def published_rows(self, shards: Sequence[ShardFile]) -> Iterator[tuple[ShardFile, CatalogueRow | MaekitError]]:
        """Yield each shard with a summary of its published index, freshly downloaded, or with the error."""

        def row(shard: ShardFile) -> CatalogueRow | MaekitError:
            self._known[shard.path] = shard
            try:
                index = self._download_index(shard)
            except MaekitError as error:
                return error
            if index is None:
                return InputError(
                    f"{shard.url} has no published index, which pre-training on remote shards needs: "
                    "`maekit check` with `write_index=true` and `crc=true` makes NAME.tar.index beside local shards; "
                    "upload both"
                )
            return CatalogueRow.of(index)

        yield from zip(shards, map_in_threads(row, shards, threads=_INDEX_THREADS), strict=True)

    def refuse_if_too_small(self, shards: int, largest: int) -> None:
        """Check that `shards` shards of `largest` bytes fit at once; otherwise they would evict each other.

        Raises:
            InputError: they do not fit.
        """
        if shards * largest > self.limit:
            needed = math.ceil(shards * largest / 1e6) / 1000
            raise InputError(
                f"up to {shards} shards of up to {files.describe_bytes(largest)} are in use at once, and the cache has "
                f"{files.describe_bytes(self.limit)}: give `cache_gb={needed:g}` or more"
            )

    def _download_index(self, shard: ShardFile) -> ShardIndex | None:
        assert shard.url is not None
        address, question, query = shard.url.partition("?")
        try:
            there = download.describe(address + INDEX_SUFFIX + question + query, self._pause)
        except FileNotFoundError:
            return None
        if (there.size or 0) > _LARGEST_INDEX:
            raise MaekitError(f"{there.url}: an index of {there.size} bytes (at most {_LARGEST_INDEX} are read)")
        data = b"".join(download.pieces(there, 0, self._pause))
        index = _parse(shard, data)
        if index is None:
            raise MaekitError(f"{there.url}: damaged, or made by another version of maekit")
        files.write_atomically(index_path(shard.path), data)
        return index

    def _is_current(self, shard: ShardFile, there: RemoteFile) -> bool:
        try:
            kept = json.loads(_meta(shard.path).read_text())
        except (OSError, ValueError):
            return False
        if not there.version or kept != asdict(there) or not shard.path.exists():
            return False
        return there.size is None or shard.path.stat().st_size == there.size

    def _download(self, shard: ShardFile, there: RemoteFile) -> None:
        """Download a shard, resuming what an earlier attempt left; the caller holds its lock."""
        part = shard.path.with_suffix(".part")
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            _room(part).unlink(missing_ok=True)  # of a download that was killed
            shard.path.unlink(missing_ok=True)
            if not self._is_part_of(_meta(part), there):
                part.unlink(missing_ok=True)
            self._make_room(there, part)
            files.write_atomically(_meta(part), json.dumps(asdict(there)).encode())
            done = part.stat().st_size if part.exists() else 0
            with open(part, "ab") as file:
                for piece in download.pieces(there, done, self._pause):
                    done += len(piece)
                    if there.size is None and not self._grow(part, done):
                        part.unlink()
                        raise self._does_not_fit(there.url, done)
                    file.write(piece)
                    self._pause(0)
                file.flush()
                os.fsync(file.fileno())
            if download.describe(there.url, self._pause) != there:
                part.unlink()
                raise MaekitError(f"{there.url}: changed while it was downloaded; run the command again")
            _touch(part)
            os.replace(part, shard.path)
        except MaekitError:
            raise
        except OSError as error:
            raise files.write_failure(part, error) from error
        finally:
            _room(part).unlink(missing_ok=True)

    def _is_part_of(self, meta: Path, there: RemoteFile) -> bool:
        # Without a size no piece can be requested, so such a download starts over.
        try:
            return bool(there.version) and there.size is not None and json.loads(meta.read_text()) == asdict(there)
        except (OSError, ValueError):
            return False

    def _does_not_fit(self, url: str, size: int) -> MaekitError:
        has = files.describe_bytes(self.limit)
        return MaekitError(
            f"{url}: {files.describe_bytes(size)} do not fit into a cache of {has}; give a larger `cache_gb`"
        )

    def _make_room(self, there: RemoteFile, part: Path) -> None:
        """Evict the least recently used shards until this one fits, and reserve that space for its download."""
        size = there.size or 0
        if size > self.limit:
            raise self._does_not_fit(there.url, size)
        while True:
            with self._owner(_directory() / "room"):
                if self._evict(size, part):
                    _room(part).write_text(str(size))
                    return
            # The rest is reserved by running downloads, which can be evicted once they have ended.
            self._pause(0.2)

    def _grow(self, part: Path, size: int) -> bool:
        """Extend the reservation of a download of unknown size; never wait, as two might wait for each other."""
        with self._owner(_directory() / "room"):
            if not self._evict(size, part):
                return False
            _room(part).write_text(str(size))
            return True

    def _evict(self, needed: int, keep: Path) -> bool:
        """Evict the least recently used shards until `needed` bytes fit; return False if they cannot."""
        taken = 0
        evictable: list[tuple[int, int, Path]] = []
        for path in _directory().glob("*/*"):
            with contextlib.suppress(OSError, ValueError):
                if path.suffix == ".room" and path != _room(keep) and _is_held(path):
                    taken += int(path.read_text())
                elif path.suffix == ".tar" or (path.suffix == ".part" and path != keep and not _has_room(path)):
                    # A `.part` without a reservation waits for one or was abandoned; evicted, it is downloaded again.
                    evictable.append((path.stat().st_atime_ns, path.stat().st_size, path))
        total = taken + sum(size for _, size, _ in evictable)
        for _, size, path in sorted(evictable):
            if total + needed <= self.limit:
                break
            for gone in (path, _meta(path), index_path(path.with_suffix(".tar"))):
                gone.unlink(missing_ok=True)
            total -= size
        return total + needed <= self.limit

    @contextlib.contextmanager
    def _owner(self, path: Path, *, wait: bool = True) -> Iterator[bool]:
        """Lock one shard against other threads and processes; yield False if it is locked and `wait` is false."""
        # `lockf` locks belong to the process, so a mutex decides among threads; one descriptor is open at a time.
        lock = path.with_suffix(".lock")
        mutex = _BUSY.setdefault(str(lock), threading.Lock())
        if not mutex.acquire(blocking=wait):
            yield False
            return
        try:
            try:
                lock.parent.mkdir(parents=True, exist_ok=True)
                file = open(lock, "w")  # noqa: SIM115 (closed below, after the lock)
            except OSError as error:
                raise files.write_failure(lock, error) from error
            with file:
                # Polled, because the kernel only knows processes: when threads of two processes wait for each other's
                # locks, it reports a deadlock where there is none.
                while not (is_mine := _try_lock(file, lock)) and wait:
                    self._pause(0.05)
                yield is_mine
        finally:
            mutex.release()


def _try_lock(file: IO[str], name: Path) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise files.write_failure(name, error) from error
        return False
    return True


def _is_held(path: Path) -> bool:
    """Whether a thread of this process or another process holds the lock of a shard."""
    # The mutex is taken first, because closing the file drops any lock that this process has on it.
    mutex = _BUSY.setdefault(str(path.with_suffix(".lock")), threading.Lock())
    if not mutex.acquire(blocking=False):
        return True
    try:
        with open(path.with_suffix(".lock"), "r+") as file:
            return not _try_lock(file, path)
    except OSError:
        return False
    finally:
        mutex.release()


def _directory() -> Path:
    return files.cache_directory() / "shards"


def _fits(shard: ShardFile, index: ShardIndex, *, thoroughly: bool) -> bool:
    """Whether a cached shard matches its index; `thoroughly` scans all of it, once after the download."""
    try:
        descriptor = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if not index.adopt(descriptor):
            return False
    finally:
        os.close(descriptor)
    try:
        return not thoroughly or index.difference(build_index(shard.path, crc=index.has_crc)) is None
    except MaekitError:
        return False


def _meta(path: Path) -> Path:
    return path.with_suffix(".json")


def _room(part: Path) -> Path:
    """Return the file that holds the number of bytes that a running download has reserved."""
    return part.with_suffix(".room")


def _has_room(part: Path) -> bool:
    return _room(part).exists() and _is_held(part)


def _touch(path: Path) -> None:
    """Mark a cached shard as used now; keep its modification time."""
    with contextlib.suppress(OSError):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def _parse(shard: ShardFile, data: bytes) -> ShardIndex | None:
    return parse_index(shard.path, np.frombuffer(data, np.uint8))
