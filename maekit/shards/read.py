"""Random access to samples: the set of shards, and positional reads of their members."""

import contextlib
import hashlib
import itertools
import os
import threading
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from maekit.shards import catalogue
from maekit.shards.cache import RemoteCache
from maekit.shards.catalogue import CatalogueRow
from maekit.shards.image_choice import FIRST, may_be_image
from maekit.shards.index import MemberSpan, ShardIndex, load_index
from maekit.shards.spec import ShardFile
from maekit.system import files
from maekit.system.errors import DamagedShard, ImageError, InputError, MaekitError
from maekit.system.machine import cores
from maekit.system.parallel import Workers, batched, map_in_threads
from maekit.system.text import count, first_few

# Nobody trains on an image larger than this; it would only fill the memory.
MAX_MEMBER_BYTES = 256 << 20
# Below this many bytes, scanning is finished before other processes have started.
_WORTH_PROCESSES = 16 << 20
# Far below the 65,530 maps that Linux grants a process, far above any window of shards.
_OPEN_INDEXES = 1024
_OPEN_SHARDS = 64  # of one reader
LABEL, CLASS_NAMES = "cls", "classes.txt"
_LONGEST_LABEL = 1000  # bytes
_CHUNK = 32  # images per work item of a thread

Image = TypeVar("Image")


class ShardSet:
    """Many shards as one sequence of samples.

    The index of a shard is opened when it is first needed, and a bounded number of them stays open.

    Attributes:
        shards: the shards, sorted by name.
        counts: number of samples in each shard, int64 `[shards]`.
        samples: total number of samples.
        digest: SHA-256 over the names and digests of all shards and the choice of images, hexadecimal; it identifies
            the data, wherever stored.
        remote: the cache that remote shards are fetched into; None if all are local.
    """

    def __init__(
        self,
        shards: Sequence[ShardFile],
        rows: Sequence[CatalogueRow],
        remote: RemoteCache | None = None,
        *,
        image: str | None = None,
        known_digest: str | None = None,
    ) -> None:
        self.shards = tuple(shards)
        self.remote = remote
        self._rows = tuple(rows)
        self.counts: NDArray[np.int64] = np.array([row.samples for row in rows], np.int64)
        self.samples = int(self.counts.sum())
        digest = hashlib.sha256()
        for shard, row in zip(shards, rows, strict=True):
            digest.update(f"{shard.name}\0{row.digest}\n".encode())
        changed = sum(row.several + row.changed for row in rows)
        if image is None and changed and known_digest == digest.hexdigest():
            image = FIRST  # the run was started before there was a choice
        if image not in (None, FIRST) or (image is None and changed):
            digest.update(f"image={image}".encode())
        self._choice = image
        self.digest = digest.hexdigest()
        self._ends = self.counts.cumsum()
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._class_names: dict[Path, tuple[str, ...]] = {}
        self._lock = threading.Lock()

    def locate(self, number: int) -> tuple[int, int]:
        """Return (shard, ordinal) of a sample by its number in the whole sequence."""
        shard = int(np.searchsorted(self._ends, number, "right"))
        return shard, int(number - (self._ends[shard] - self.counts[shard]))

    def number(self, shard: int, ordinal: int) -> int:
        """Return the number of a sample in the whole sequence."""
        return int(self._ends[shard] - self.counts[shard]) + ordinal

    def spread(self, count: int) -> list[int]:
        """Return the numbers of at most `count` evenly spaced samples; of a remote set, from its first non-empty shard.

        Looking at a few images thus does not download many shards.
        """
        samples = int(self.counts[self.counts > 0][0]) if self.remote else self.samples
        count = min(count, samples)
        return [samples * i // count for i in range(count)]

    def index(self, shard: int) -> ShardIndex:
        """Return the index of a shard by its number.

        Raises:
            MaekitError: the shard has changed since the set was opened.
        """
        with self._lock:
            if shard not in self._indexes:
                self._indexes[shard] = self._open_index(shard)
                if len(self._indexes) > _OPEN_INDEXES:
                    self._indexes.popitem(last=False)
            self._indexes.move_to_end(shard)
            return self._indexes[shard]

    def _open_index(self, shard: int) -> ShardIndex:
        file = self.shards[shard]
        index = self.remote.published_index(file) if file.url and self.remote else load_index(file.path)
        if index is None or index.digest != self._rows[shard].digest:
            raise MaekitError(f"{file.where}: changed since it was indexed; run the command again")
        index.choice = self._choice
        return index

    @property
    def unused(self) -> dict[str, int]:
        """Number of images that are not the image of their sample, by extension."""
        if self._choice is None:
            counts = (row.unused for row in self._rows)
        else:  # the summaries know nothing of choices
            counts = (self.index(shard).count_images().unused for shard in range(len(self.shards)))
        return dict(sum(map(Counter, counts), Counter()))

    def refuse_ambiguous(self) -> None:
        """Check that each sample has one image, or that it was chosen.

        Raises:
            InputError: names a sample with several images, and the ways to choose.
        """
        ambiguous = [number for number, row in enumerate(self._rows) if row.several]
        if self._choice is None and ambiguous:
            several = sum(self._rows[number].several for number in ambiguous)
            said = ambiguity(self.index(ambiguous[0]), self.shards[ambiguous[0]].where)
            raise InputError(f"{said} ({several} such samples in all)")

    def fetch(self, shard: int) -> bool:
        """Bring a shard onto this machine; return False if another process is downloading it.

        Raises:
            MaekitError: it cannot be downloaded.
        """
        file = self.shards[shard]
        if file.url is None or self.remote is None:
            return True
        return self.remote.fetch_as_indexed(file, self.index(shard), wait=False)

    def bytes_of(self, shard: int) -> int:
        """Return the size of a shard in bytes."""
        return self._rows[shard].size

    def reader(self) -> "MemberReader":
        """Return a new reader for these shards; each thread or process needs its own."""
        return MemberReader(self.remote)

    def name(self, number: int) -> tuple[str, str]:
        """Return (name of the shard, key) of a sample."""
        shard, ordinal = self.locate(number)
        return self.shards[shard].name, self.index(shard).key(ordinal)

    def images(
        self, numbers: Iterable[int], prepare: Callable[[bytes], Image], *, threads: int = 0
    ) -> Iterator[Image | ImageError]:
        """Yield the prepared image of each sample in turn, or the `ImageError` that says why there is none.

        Args:
            numbers: the numbers of the samples in the whole sequence.
            prepare: bytes of an image -> image; an `ImageError` that it raises is yielded.
            threads: number of threads that read and prepare ahead, in chunks; 0 reads nothing ahead, for a few images.

        Raises:
            MaekitError: a shard cannot be read, or has changed since it was indexed.
        """

        def read(chunk: Sequence[int]) -> list[Image | ImageError]:
            # One reader per chunk: it is only a few open files, and threads must not share it.
            with contextlib.closing(self.reader()) as reader:
                return [self._image(reader, number, prepare) for number in chunk]

        if threads:
            yield from itertools.chain.from_iterable(map_in_threads(read, batched(numbers, _CHUNK), threads=threads))
            return
        with contextlib.closing(self.reader()) as reader:
            yield from (self._image(reader, number, prepare) for number in numbers)

    def _image(self, reader: "MemberReader", number: int, prepare: Callable[[bytes], Image]) -> Image | ImageError:
        shard, ordinal = self.locate(number)
        try:
            return prepare(reader.read_image(self.index(shard), ordinal))
        except ImageError as error:
            return error

    def labels(self, numbers: Iterable[int]) -> Iterator[str]:
        """Yield the text of each sample's `cls` member; empty if the member is missing, too long or damaged.

        Raises:
            MaekitError: as `images`.
        """
        with contextlib.closing(self.reader()) as reader:
            for number in numbers:
                shard, ordinal = self.locate(number)
                yield self._label(reader, self.index(shard), ordinal)

    def _label(self, reader: "MemberReader", index: ShardIndex, ordinal: int) -> str:
        for member in index.members(ordinal):
            if member.extension == LABEL and member.size <= _LONGEST_LABEL:
                with contextlib.suppress(ImageError):  # the bytes do not match the CRC-32
                    return reader.read(index, member).decode("utf-8", errors="replace").strip()
        return ""

    def class_names(self, shard: int) -> tuple[str, ...]:
        """Return the class names that `maekit pack` wrote beside a shard, by label; empty if there are none."""
        folder = self.index(shard).path.parent
        if folder not in self._class_names:
            text = ""
            with contextlib.suppress(OSError, ValueError):
                text = (folder / CLASS_NAMES).read_text(encoding="utf-8")
            self._class_names[folder] = tuple(text.splitlines())
        return self._class_names[folder]

    def in_words(self, number: int, label: str) -> str:
        """Return the class name of a sample's label if `maekit pack` wrote names beside the shard, else the label."""
        names = self.class_names(self.locate(number)[0])
        is_known = label.isascii() and label.isdigit() and int(label) < len(names)
        return names[int(label)] if is_known else label


def ambiguity(index: ShardIndex, where: str) -> str:
    """Return the message for a shard in which samples have several images, with the ways to choose one."""
    ordinal = next(n for n in range(index.samples) if index.is_ambiguous(n))
    found = [member.extension for member in index.members(ordinal) if may_be_image(member.extension)]
    return (
        f"{where}: the sample {index.key(ordinal)!r} has several images ({first_few(found)}): choose one by "
        f"`image={found[0]}`, or `image=first`; or `maekit pack` makes a sample of each, with `key_by=name`"
    )


def open_shards(
    shards: Sequence[ShardFile],
    *,
    image: str | None = None,
    known_digest: str | None = None,
    skip_damaged: bool = False,
    remote: RemoteCache | None = None,
    workers: int | None = None,
    on_shard: Callable[[ShardFile], None] = lambda shard: None,
    on_damage: Callable[[DamagedShard], None] = lambda damage: None,
) -> ShardSet:
    """Index all shards: reuse what is cached and current, scan the rest in parallel.

    Args:
        shards: the shard files, as `find_shards` returns them.
        image: which member of a sample is its image (image_choice.py).
        known_digest: digest of the data that a run to be resumed was started with.
        skip_damaged: leave damaged shards out (each is still passed to `on_damage`).
        remote: the cache for remote shards, which need published indexes.
        workers: number of processes that scan; None is one per CPU core.
        on_shard: called after each shard, for progress.
        on_damage: called for each damaged shard.

    Raises:
        InputError: shards are damaged and not skipped, a shard cannot be read, or no shard holds a sample.
    """
    remote = (remote or RemoteCache()) if any(shard.url for shard in shards) else None
    found = _summaries(shards, remote, workers=workers or cores(), on_shard=on_shard)
    rows: dict[ShardFile, CatalogueRow] = {}
    damaged: list[DamagedShard] = []
    for shard in shards:
        result = found[shard]
        if isinstance(result, CatalogueRow):
            rows[shard] = result
        elif isinstance(result, DamagedShard):
            damaged.append(result)
            on_damage(result)
        else:
            raise InputError(str(result)) from result
    if damaged and not skip_damaged:
        of = count("shard", len(shards))
        raise InputError(f"{len(damaged)} of {of} damaged: {first_few(damaged)} (`skip_damaged` leaves them out)")
    shard_set = ShardSet(list(rows), list(rows.values()), remote, image=image, known_digest=known_digest)
    if not shard_set.samples:
        raise InputError(f"the {count('shard holds', len(shards), 'shards hold')} no sample at all")
    return shard_set


def _summaries(
    shards: Sequence[ShardFile], remote: RemoteCache | None, *, workers: int, on_shard: Callable[[ShardFile], None]
) -> dict[ShardFile, CatalogueRow | MaekitError]:
    """Return the summary of each shard's index, or the error that says why there is none."""
    found: dict[ShardFile, CatalogueRow | MaekitError] = {}

    def add(shards: Sequence[ShardFile], results: Iterable[CatalogueRow | MaekitError]) -> None:
        for shard, result in zip(shards, results, strict=True):
            found[shard] = result
            on_shard(shard)

    local = [shard for shard in shards if shard.url is None]
    recalled = zip(local, catalogue.recall([shard.path for shard in local]), strict=True)
    known = {shard: row for shard, row in recalled if row is not None}
    add(list(known), known.values())
    unknown = [shard for shard in local if shard not in known]
    with Workers(worth_processes([shard.path for shard in unknown], workers)) as pool:
        # In batches: sending a single cached index to a process would cost more than reading it.
        size = max(1, min(64, len(unknown) // (8 * pool.count)))
        add(unknown, itertools.chain.from_iterable(pool.map(_rows, batched(unknown, size))))
    if remote is not None:
        distant = [shard for shard in shards if shard.url is not None]
        add(distant, remote.published_rows(distant))
    rows = [row for row in map(found.get, shards) if isinstance(row, CatalogueRow)]
    if unknown and len(rows) == len(shards) == len(local):
        catalogue.remember([shard.path for shard in shards], rows)
    return found


def _rows(shards: Sequence[ShardFile]) -> list[CatalogueRow | MaekitError]:
    rows: list[CatalogueRow | MaekitError] = []
    for shard in shards:
        try:
            rows.append(CatalogueRow.of(load_index(shard.path)))
        except MaekitError as error:
            rows.append(error)
    return rows


def worth_processes(paths: Sequence[Path], workers: int) -> int:
    """Return how many of `workers` processes are worth starting to read these files (at least 1)."""
    totals = itertools.accumulate(path.stat().st_size for path in paths if path.exists())
    return max(1, min(workers, len(paths))) if any(total > _WORTH_PROCESSES for total in totals) else 1


class MemberReader:
    """Reads members of shards by offset and keeps a few files open. Each thread or process needs its own.

    Args:
        remote: the cache that holds the remote shards.
    """

    def __init__(self, remote: RemoteCache | None = None) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._remote = remote

    def read(self, index: ShardIndex, member: MemberSpan) -> bytes:
        """Return the bytes of one member.

        Raises:
            ImageError: the member is larger than 256 MiB, or its bytes do not match the CRC-32 in the index.
            MaekitError: the shard cannot be read, or has changed since it was indexed.
        """
        return read_bytes(self._descriptor(index), str(index.path), member.offset, member.size, member.crc)

    def read_image(self, index: ShardIndex, ordinal: int) -> bytes:
        """Return the bytes of a sample's image.

        Raises:
            ImageError: the sample holds no image or must not be read, or as `read`.
            MaekitError: as `read`.
        """
        return self.read(index, index.image(ordinal))

    def _descriptor(self, index: ShardIndex) -> int:
        path = index.path
        if path not in self._open:
            self._open[path] = open_shard(index, self._remote)
            if len(self._open) > _OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
        elif not os.fstat(self._open[path]).st_nlink and not (self._remote and self._remote.owns(path)):
            # Its bytes could still be read, but after a stop no run could resume on the same data.
            raise MaekitError(f"{path}: deleted or replaced since it was indexed")
        self._open.move_to_end(path)
        return self._open[path]

    def close(self) -> None:
        """Close all files."""
        while self._open:
            os.close(self._open.popitem()[1])


def open_shard(index: ShardIndex, remote: RemoteCache | None = None) -> int:
    """Return a descriptor of the shard that was indexed; a remote one is fetched if needed.

    Raises:
        MaekitError: it cannot be read, or has changed since it was indexed.
    """
    if remote is not None and remote.owns(index.path):
        return remote.open(index)
    with files.reading(index.path):
        descriptor = os.open(index.path, os.O_RDONLY | os.O_CLOEXEC)
    if not index.matches(os.fstat(descriptor)):
        os.close(descriptor)
        raise MaekitError(f"{index.path}: changed since it was indexed; run the command again")
    return descriptor


def read_bytes(descriptor: int, name: str, offset: int, size: int, crc: int | None) -> bytes:
    """Return the bytes of one member of an open shard.

    Args:
        descriptor: file descriptor of the shard.
        name: name of the shard, for messages.
        offset: byte offset of the data.
        size: bytes of data.
        crc: the CRC-32 from the index, or None.

    Raises:
        ImageError: the member is larger than 256 MiB, or its bytes do not match the CRC-32.
        MaekitError: the shard cannot be read.
    """
    if size > MAX_MEMBER_BYTES:
        raise ImageError("too_large", f"a member of {size} bytes (at most {MAX_MEMBER_BYTES} are read)")
    try:
        data = os.pread(descriptor, size, offset)
        while len(data) < size:  # network file systems may return less than was asked for
            more = os.pread(descriptor, size - len(data), offset + len(data))
            if not more:
                raise MaekitError(f"{name}: shorter than when it was indexed")
            data += more
    except OSError as error:
        raise files.read_failure(name, error) from error
    if crc is not None and zlib.crc32(data) != crc:
        raise ImageError("checksum", "the bytes are not those of the CRC-32 in the index")
    return data


def read_file(path: str) -> bytes:
    """Return the bytes of an image file outside any shard.

    Raises:
        ImageError: it is larger than 256 MiB, or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_MEMBER_BYTES:
                raise ImageError("too_large", f"a file of {size} bytes (at most {MAX_MEMBER_BYTES} are read)")
            return file.read()
    except OSError as error:
        raise ImageError("unreadable", f"{error.strerror or error}") from error
