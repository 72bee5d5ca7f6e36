"""Remote shards: downloaded whole through fsspec into a bounded cache, verified, and then treated as local.

    CACHE/shards/ab/abcd….tar         a shard, whole
    CACHE/shards/ab/abcd….tar.index   its published index, where it has one
    CACHE/shards/ab/abcd….json        its URL, size and version there
    CACHE/shards/ab/abcd….part        a download that is under way or was interrupted, and goes on
    CACHE/shards/ab/abcd….room        how many bytes it may take, while it is under way

A download asks for pieces and goes on behind the last whole one, in this process or the next. Many processes share the
cache: a shard is downloaded by one of them under a lock. The least recently used shards give way; a file that is open
somewhere can still be read there, and takes its room on the disk until it is closed.
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
# Which places threads of this process hold; the locks of `lockf` know processes only.
_BUSY: dict[str, threading.Lock] = {}
os.register_at_fork(after_in_child=_BUSY.clear)


class RemoteCache:
    """Where remote shards are kept on this machine.

    Args:
        limit: bytes that the cache may hold.
    """

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self.limit = limit
        self._stopped = threading.Event()
        self._known: dict[Path, ShardFile] = {}

    def stop(self) -> None:
        """Make downloads give up after the piece under way; what they have is kept."""
        self._stopped.set()

    @property
    def is_stopped(self) -> bool:
        """Whether downloads give up."""
        return self._stopped.is_set()

    def _pause(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise MaekitError("stopped while fetching; what was fetched is kept")

    def owns(self, path: Path) -> bool:
        """Whether this path is a remote shard's place in the cache."""
        return path in self._known

    def fetch(self, shard: ShardFile) -> str:
        """Have a shard in the cache, whole and as it is there now; return the mark of its version.

        Raises:
            MaekitError: it cannot be downloaded.
        """
        self._known[shard.path] = shard
        assert shard.url is not None
        there = download.describe(shard.url, self._pause)
        with self._owner(shard.path):
            if not self._is_current(shard, there):
                self._download(shard, there)
                # One that was kept may be of another version; a fresh one brings the CRC-32s.
                index_path(shard.path).unlink(missing_ok=True)
                with contextlib.suppress(MaekitError):  # where there is none to be had, the shard is scanned
                    self._download_index(shard)
            _touch(shard.path)
        return there.version

    def fetch_anew(self, shard: ShardFile) -> str:
        """Have a shard in the cache whose copy there turned out damaged: fetched once more, it may be sound.

        Raises:
            MaekitError: it cannot be downloaded.
        """
        with self._owner(shard.path):
            shard.path.unlink(missing_ok=True)
        return self.fetch(shard)

    def describe(self, shard: ShardFile) -> RemoteFile:
        """Return what the far side says of a shard now.

        Raises:
            MaekitError: it is not there, or does not answer.
        """
        assert shard.url is not None
        return download.describe(shard.url, self._pause)

    def open(self, index: ShardIndex) -> int:
        """Return a descriptor of a shard that fits its index, downloading it where need be.

        Raises:
            MaekitError: it cannot be downloaded, or what is there is not what was indexed.
        """
        shard = self._known[index.path]
        for attempt in range(3):  # between fetching and opening, another process may need the room
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
        """Have the shard that an index describes in the cache; return False where another process is at it.

        Args:
            shard: the shard.
            index: what it must be: size, headers, and the CRC-32 of all members where the index has them.
            wait: for another process that is downloading it.

        Raises:
            MaekitError: it cannot be downloaded, or is another one.
        """
        self._known[shard.path] = shard
        assert shard.url is not None
        with self._owner(shard.path, wait=wait) as is_mine:
            if not is_mine:
                return False
            # Members are compared once, when they come; afterwards each is when it is read.
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
        """Return the index that lies beside a remote shard, downloaded where it is not cached; None if there is none.

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
        """Yield each shard with what its published index, as it is there now, says in short; or with what is wrong."""

        def row(shard: ShardFile) -> CatalogueRow | MaekitError:
            self._known[shard.path] = shard
            try:
                index = self._download_index(shard)
            except MaekitError as error:
                return error
            if index is None:
                return InputError(
                    f"{shard.url} has no published index, which pre-training on remote shards needs: "
                    "`maekit check --write-index --crc` makes NAME.tar.index beside local shards; upload both"
                )
            return CatalogueRow.of(index)

        yield from zip(shards, map_in_threads(row, shards, threads=_INDEX_THREADS), strict=True)

    def refuse_if_too_small(self, shards: int, largest: int) -> None:
        """See that so many shards of this size fit at once; else they would drive each other out.

        Raises:
            InputError: they do not.
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
        """Download a shard, going on behind what an earlier attempt left; the caller owns its place."""
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
        # A far side that tells no size can give no piece: such a download starts anew.
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
        """Evict the least recently used shards until this one fits; its room is its own until it has come."""
        size = there.size or 0
        if size > self.limit:
            raise self._does_not_fit(there.url, size)
        while True:
            with self._owner(_directory() / "room"):
                if self._evict(size, part):
                    _room(part).write_text(str(size))
                    return
            # The rest belongs to downloads under way, which end, and can be evicted then.
            self._pause(0.2)

    def _grow(self, part: Path, size: int) -> bool:
        """Take room for a download of unknown size as it grows. It does not wait: two of them might for each other."""
        with self._owner(_directory() / "room"):
            if not self._evict(size, part):
                return False
            _room(part).write_text(str(size))
            return True

    def _evict(self, needed: int, keep: Path) -> bool:
        """Evict the least recently used shards until `needed` bytes fit; False where they cannot."""
        taken = 0
        evictable: list[tuple[int, int, Path]] = []
        for path in _directory().glob("*/*"):
            with contextlib.suppress(OSError, ValueError):
                if path.suffix == ".room" and path != _room(keep) and _is_held(path):
                    taken += int(path.read_text())
                elif path.suffix == ".tar" or (path.suffix == ".part" and path != keep and not _has_room(path)):
                    # A part without room waits for it, or was given up; what is taken from it comes again.
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
        """Hold the place of one shard against other threads and processes; False where it is held and `wait` is not."""
        # Locks of `lockf` belong to the process: among its threads a mutex decides, one descriptor is open at a time.
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
                # Asked again and again: where the threads of two processes wait for each other's locks, the kernel,
                # which knows processes only, sees a deadlock that is none.
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
    """Whether a thread of this process or another process holds the place of a shard."""
    # Held meanwhile: closing the file drops whatever lock this process has on it.
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
    """Whether a cached shard is the one that was indexed; thoroughly once, when it comes, by scanning all of it."""
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
    """Return the file that says how many bytes a download under way may take."""
    return part.with_suffix(".room")


def _has_room(part: Path) -> bool:
    return _room(part).exists() and _is_held(part)


def _touch(path: Path) -> None:
    """Mark a cached shard as used now; its modification time stays."""
    with contextlib.suppress(OSError):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def _parse(shard: ShardFile, data: bytes) -> ShardIndex | None:
    return parse_index(shard.path, np.frombuffer(data, np.uint8))
