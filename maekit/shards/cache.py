"""Remote shards: downloaded whole through fsspec into a bounded cache, verified, then read like local ones.

    CACHE/shards/ab/abcd….tar         a shard, whole
    CACHE/shards/ab/abcd….tar.index   its published index, if there is one
    CACHE/shards/ab/abcd….json        its URL without secrets, its size and version on the server
    CACHE/shards/ab/abcd….part        a running or interrupted download, to be resumed
    CACHE/shards/ab/abcd….room        how many bytes a running download has reserved

A download requests pieces and resumes after the last whole one, in this process or the next. Many processes share the
cache; one of them downloads a shard, under a lock. The least recently used shards are evicted; an evicted file that is
still open can be read on, and occupies the disk until it is closed.
"""

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from maekit.shards import download
from maekit.shards.catalogue import CatalogueRow
from maekit.shards.download import RemoteFile
from maekit.shards.index import INDEX_SUFFIX, ShardIndex, index_path, parse_index
from maekit.shards.spec import ShardFile
from maekit.system import files
from maekit.system.errors import InputError, MaekitError
from maekit.system.locks import LockedError, owned
from maekit.system.parallel import map_in_threads
from maekit.system.redaction import redacted
from maekit.system.text import count

_DEFAULT_LIMIT = 50_000_000_000
_INDEX_THREADS = 16
_LARGEST_INDEX = 1 << 30


class RemoteCache:
    """The cache of remote shards on this machine.

    Args:
        limit: maximum size of the cache in bytes.
    """

    def __init__(self, limit: int = _DEFAULT_LIMIT) -> None:
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
        there = self.describe(shard)
        with self._owner(shard.path):
            if not _is_current(shard.path, there):
                self._download(shard.path, there)
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
            if attempt > 0:
                self.fetch_as_indexed(shard, index)
            with files.reading(index.path), contextlib.suppress(FileNotFoundError):
                descriptor = os.open(index.path, os.O_RDONLY | os.O_CLOEXEC)
                if index.adopt(descriptor):
                    _touch(index.path)
                    return descriptor
                os.close(descriptor)
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
        with self._owner(shard.path, wait=wait) as is_mine:
            if not is_mine:
                return False
            if not _fits(shard.path, index):
                self._download(shard.path, self.describe(shard))
                # All members are compared once, after the download; later, each is compared when it is read.
                if not (_fits(shard.path, index) and index.describes(shard.path)):
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
            # Read, not memory-mapped: another machine that shares the cache may evict it.
            if index := parse_index(shard.path, index_path(shard.path).read_bytes()):
                return index
        return self._download_index(shard)

    def published_rows(self, shards: Sequence[ShardFile]) -> Iterator[CatalogueRow | MaekitError]:
        """Yield the summary of each shard's published index, freshly downloaded, or the error."""

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

        return map_in_threads(row, shards, threads=_INDEX_THREADS)

    def refuse_if_too_small(self, shards: int, largest: int) -> None:
        """Check that `shards` shards of `largest` bytes fit at once; otherwise they would evict each other.

        Raises:
            InputError: they do not fit.
        """
        if shards * largest > self.limit:
            needed = math.ceil(shards * largest / 1e6) / 1000
            raise InputError(
                f"up to {count('shard', shards)} of up to {files.describe_bytes(largest)} are in use at once, and the "
                f"cache has {files.describe_bytes(self.limit)}: give `cache_gb={needed:g}` or more"
            )

    def _download_index(self, shard: ShardFile) -> ShardIndex | None:
        assert shard.url is not None
        address, question, query = shard.url.partition("?")
        try:
            there = download.describe(address + INDEX_SUFFIX + question + query, self._pause)
        except download.AbsentError:
            return None
        if (there.size or 0) > _LARGEST_INDEX:
            raise MaekitError(f"{there.url}: an index of {there.size} bytes (at most {_LARGEST_INDEX} are read)")
        data = b"".join(download.pieces(there, 0, self._pause))
        index = parse_index(shard.path, data)
        if index is None:
            raise MaekitError(f"{there.url}: damaged, or made by another version of maekit")
        files.write_atomically(index_path(shard.path), data)
        return index

    def _download(self, path: Path, there: RemoteFile) -> None:
        """Download a shard to `path`, resuming what an earlier attempt left; the caller holds its lock."""
        part = path.with_suffix(".part")
        try:
            with files.writing(part):
                part.parent.mkdir(parents=True, exist_ok=True)
                _reservation(part).unlink(missing_ok=True)  # of a download that was killed
                path.unlink(missing_ok=True)
                if there.size is None or not _is_version(part, there):  # without a size no piece can be requested
                    part.unlink(missing_ok=True)
                size = there.size or 0
                if size > self.limit:
                    raise self._does_not_fit(there.url, size)
                while not self._reserve(size, part):
                    # The rest is reserved by running downloads, which can be evicted once they have ended.
                    self._pause(0.2)
                files.write_atomically(_meta(part), json.dumps(redacted(asdict(there))).encode())
                done = part.stat().st_size if part.exists() else 0
                with open(part, "ab") as file:
                    for piece in download.pieces(there, done, self._pause):
                        done += len(piece)
                        # A download of unknown size never waits for space, as two might wait for each other.
                        if there.size is None and not self._reserve(done, part):
                            part.unlink()
                            raise self._does_not_fit(there.url, done)
                        file.write(piece)
                        self._pause(0)
                    file.flush()
                    files.fsync(file)
                if download.describe(there.url, self._pause) != there:
                    part.unlink()
                    raise MaekitError(f"{there.url}: changed while it was downloaded; run the command again")
                _touch(part)
                files.rename(part, path)
        finally:
            _reservation(part).unlink(missing_ok=True)

    def _does_not_fit(self, url: str, size: int) -> MaekitError:
        needed, limit = files.describe_bytes(size), files.describe_bytes(self.limit)
        return MaekitError(f"{url}: {needed} do not fit into a cache of {limit}; give a larger `cache_gb`")

    def _reserve(self, size: int, part: Path) -> bool:
        """Reserve space for a download, and evict the least recently used shards for it.

        Return False if the space that other running downloads have reserved leaves too little.
        """
        taken = 0
        evictable: list[tuple[int, int, Path]] = []
        with self._owner(_directory() / "room"):
            for path in _directory().glob("*/*"):
                if path.stem == part.stem:
                    continue
                with contextlib.suppress(OSError, ValueError, MaekitError):
                    if path.suffix == ".room" and self._is_running(path):
                        taken += int(path.read_text())
                    elif path.suffix == ".tar" or (path.suffix == ".part" and not self._is_running(path)):
                        # A `.part` without a reservation waits for one or was abandoned; it can be downloaded again.
                        evictable.append((path.stat().st_atime_ns, path.stat().st_size, path))
            taken += size + sum(size for _, size, _ in evictable)
            for _, freed, path in sorted(evictable):
                if taken <= self.limit:
                    break
                for gone in (path, _meta(path), index_path(path.with_suffix(".tar"))):
                    gone.unlink(missing_ok=True)
                taken -= freed
            if taken <= self.limit:
                _reservation(part).write_text(str(size))
            return taken <= self.limit

    @contextlib.contextmanager
    def _owner(self, path: Path, *, wait: bool = True) -> Iterator[bool]:
        """Lock one shard against other threads and processes; yield False if it is locked and `wait` is false."""
        with contextlib.ExitStack() as held:
            while True:
                try:
                    held.enter_context(owned(path.with_suffix(".lock")))
                    break
                except LockedError:
                    if not wait:
                        yield False
                        return
                self._pause(0.05)
            yield True

    def _is_running(self, path: Path) -> bool:
        """Whether a download of this shard has reserved space and still runs, here or in another process."""
        if not _reservation(path).exists():
            return False
        with self._owner(path, wait=False) as is_mine:
            return not is_mine


def _directory() -> Path:
    return files.cache_directory() / "shards"


def _fits(path: Path, index: ShardIndex) -> bool:
    """Whether a cached shard, if there is one, has the size and probed headers of an index."""
    try:
        with open(path, "rb", buffering=0) as file:
            return index.adopt(file.fileno())
    except OSError:
        return False


def _is_current(path: Path, there: RemoteFile) -> bool:
    """Whether a cached shard is what the server has now."""
    return _is_version(path, there) and path.exists() and there.size in (None, path.stat().st_size)


def _is_version(path: Path, there: RemoteFile) -> bool:
    """Whether a cached shard or a begun download is of the version that the server has now."""
    try:
        return bool(there.version) and json.loads(_meta(path).read_text()) == redacted(asdict(there))
    except (OSError, ValueError):
        return False


def _meta(path: Path) -> Path:
    return path.with_suffix(".json")


def _reservation(part: Path) -> Path:
    """Return the file that holds the number of bytes that a running download has reserved."""
    return part.with_suffix(".room")


def _touch(path: Path) -> None:
    """Mark a cached shard as used now; keep its modification time."""
    with contextlib.suppress(OSError):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
