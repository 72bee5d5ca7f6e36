"""`maekit check`: the strict scan of a whole set of shards, the decoding of its images, and a report of both.

    shards -> fetched (remote ones) -> scanned -> chunks of samples -> decoded (`images`) -> one report

Processes scan and decode a bounded number of shards ahead; results arrive in order.
"""

import contextlib
import functools
import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maekit.config.check import CheckConfig
from maekit.images import Examined, examine
from maekit.shards.cache import RemoteCache
from maekit.shards.catalogue import CatalogueRow
from maekit.shards.index import OUTSIDE, ShardIndex, build_index, cache_index, index_path, read_index, write_index
from maekit.shards.read import ShardSet, worth_processes
from maekit.shards.spec import ShardFile, find_shards
from maekit.system.errors import DamagedShard, ImageError, InputError, MaekitError
from maekit.system.machine import cores
from maekit.system.parallel import Workers, map_in_threads
from maekit.system.progress import Progress, Silent

_CHUNK = 64  # images per work item of a process
_FETCH_THREADS = 4
_FAILURES_KEPT = 1000
_LEVELS = np.arange(256) / 255


@dataclass
class ShardReport:
    """What the scan of one shard found.

    Attributes:
        name: name of the shard.
        samples: number of samples.
        bytes: size of the shard.
        extensions: number of members with each extension.
        without_image: number of samples without a member that has an image extension.
        refused: number of samples with a member that must not be read (a link, a name that is not UTF-8, …).
        several: number of samples of which it is open which of several images is meant.
        unused: number of images that are not the image of their sample, by extension.
        ignored: number of members that belong to no sample.
        stale_index: whether the index file beside it does not match it.
        verified: whether its members were compared with the CRC-32 in the index beside it.
        damage: what is wrong, or None; a shard that cannot be read counts as damaged at byte 0.
        unreadable: whether it could not be fetched or read at all.
        digest: digest of its index.
        key_hashes: a 64-bit hash of each key, uint64 `[samples]`: 8 bytes per key, whatever its length.
    """

    name: str
    samples: int = 0
    bytes: int = 0
    extensions: dict[str, int] = field(default_factory=dict)
    without_image: int = 0
    refused: int = 0
    several: int = 0
    unused: dict[str, int] = field(default_factory=dict)
    ignored: int = 0
    stale_index: bool = False
    verified: bool = False
    damage: DamagedShard | None = None
    unreadable: bool = False
    digest: str = ""
    key_hashes: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64), repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class ImageFailure:
    """A sample whose image cannot be decoded: its shard and key, a reason code, and the error message."""

    shard: str
    key: str
    reason: str
    detail: str


@dataclass
class ImageReport:
    """What decoding the images found.

    Attributes:
        decoded: number of images decoded.
        failures: number of samples not decoded per reason code, including samples without an image.
        examples: the first thousand failures.
        formats: number of decoded images of each file format.
        modes: number of decoded images of each pixel mode, before conversion to RGB.
        widths: number of decoded images of each width in pixels, upright.
        heights: number of decoded images of each height in pixels, upright.
        sums: sum over images of each channel's mean, float64 `[3]`, for values in [0, 1].
        squares: sum over images of each channel's mean square, float64 `[3]`, for values in [0, 1].
    """

    decoded: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    examples: list[ImageFailure] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    widths: Counter[int] = field(default_factory=Counter)
    heights: Counter[int] = field(default_factory=Counter)
    sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))
    squares: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))

    @property
    def failed(self) -> int:
        """Number of images that were not decoded."""
        return self.failures.total()

    @property
    def mean(self) -> list[float]:
        """Mean of each channel, for values in [0, 1]; every image has the same weight, whatever its size."""
        return [float(value) for value in self.sums / self.decoded]

    @property
    def std(self) -> list[float]:
        """Standard deviation of each channel about `mean`; every image has the same weight, whatever its size."""
        mean = self.sums / self.decoded
        return [float(value) for value in np.sqrt(np.maximum(self.squares / self.decoded - mean**2, 0))]

    def add_image(self, image: Examined) -> None:
        """Add an image that was decoded."""
        self.decoded += 1
        self.formats[image.format] += 1
        self.modes[image.mode] += 1
        self.widths[image.rgb.width] += 1
        self.heights[image.rgb.height] += 1
        counts = np.array(image.rgb.histogram(), np.float64).reshape(3, 256) / (image.rgb.width * image.rgb.height)
        self.sums += counts @ _LEVELS
        self.squares += counts @ _LEVELS**2

    def add(self, other: "ImageReport") -> None:
        """Add the report of another process."""
        self.decoded += other.decoded
        self.examples += other.examples[: _FAILURES_KEPT - len(self.examples)]
        for name in ("failures", "formats", "modes", "widths", "heights"):
            getattr(self, name).update(getattr(other, name))
        self.sums, self.squares = self.sums + other.sums, self.squares + other.squares

    def summary(self) -> dict[str, object]:
        """Return the object that `--json` prints under `images`."""
        counters = {"failures": self.failures, "formats": self.formats, "modes": self.modes}
        return {
            "decoded": self.decoded,
            "failed": self.failed,
            **{name: dict(counts.most_common()) for name, counts in counters.items()},
            "width": _spread(self.widths),
            "height": _spread(self.heights),
            "examples": [asdict(failure) for failure in self.examples],
        }


@dataclass
class CheckReport:
    """What the scan of all shards found.

    Attributes:
        shards: one report per shard, in order.
        duplicates: number of keys in more than one shard (not damage: shard and ordinal identify a sample).
        images: what decoding found; None if it was not requested.
    """

    shards: list[ShardReport] = field(default_factory=list)
    duplicates: int = 0
    images: ImageReport | None = None

    @property
    def samples(self) -> int:
        """Number of samples in the sound shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Total size of all shards."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def damaged(self) -> list[ShardReport]:
        """The damaged shards."""
        return [shard for shard in self.shards if shard.damage]

    @property
    def unused(self) -> Counter[str]:
        """Number of images that are not the image of their sample, by extension."""
        return sum((Counter(shard.unused) for shard in self.shards), Counter())

    @property
    def extensions(self) -> Counter[str]:
        """Number of members with each extension."""
        return sum((Counter(shard.extensions) for shard in self.shards), Counter())

    def summary(self) -> dict[str, object]:
        """Return the object that `--json` prints."""
        totals = {"stale_indexes": "stale_index"}
        names = ("without_image", "refused", "several", "ignored", "unreadable", "stale_indexes", "verified")
        summary: dict[str, object] = {
            "samples": self.samples,
            "shards": len(self.shards),
            "bytes": self.bytes,
            "damaged": len(self.damaged),
            "duplicates": self.duplicates,
            **{name: sum(getattr(shard, totals.get(name, name)) for shard in self.shards) for name in names},
            "unused_images": self.unused.total() - self.unused[OUTSIDE],
            "unused": dict(self.unused.most_common()),
            "extensions": dict(self.extensions.most_common()),
            "damage": [
                {"shard": shard.name, "offset": shard.damage.offset, "reason": shard.damage.reason}
                for shard in self.shards
                if shard.damage
            ],
        }
        if self.images is not None:
            summary["images"] = self.images.summary()
            if self.images.decoded:
                summary["stats"] = {"mean": self.images.mean, "std": self.images.std}
        return summary


def check(config: CheckConfig, progress: Progress | None = None) -> CheckReport:
    """Scan every shard of the input specs; see `check_shards`.

    Raises:
        InputError: the settings are impossible, there are no shards, or indexes would be written beside remote ones.
        MaekitError: an index cannot be written.
    """
    config.validate()
    return check_shards(
        find_shards(config.shards),
        write_indexes=config.write_index,
        crc=config.crc,
        image=config.image,
        images=config.images or config.stats,
        workers=config.workers,
        remote=RemoteCache(int(config.cache_gb * 1e9)),
        progress=progress,
    )


def check_shards(
    shards: Sequence[ShardFile],
    *,
    write_indexes: bool = False,
    crc: bool = False,
    image: str | None = None,
    images: bool = False,
    workers: int | None = None,
    remote: RemoteCache | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Scan every shard from its first byte to its last; no cached index is trusted.

    If an index with CRC-32s lies beside a shard, the shard must match it.

    Args:
        shards: the shard files, as `find_shards` returns them.
        write_indexes: write `NAME.tar.index` beside each sound shard.
        crc: include the CRC-32 of every member in the index.
        image: which member of a sample is its image.
        images: also decode every image.
        workers: number of processes; None is one per CPU core.
        remote: the cache that remote shards are fetched into.
        progress: receives progress updates.

    Raises:
        InputError: `write_indexes` is set for remote shards, or the cache is too small.
        MaekitError: an index cannot be written.
    """
    progress = progress or Silent()
    are_remote = any(shard.url is not None for shard in shards)
    if write_indexes and are_remote:
        raise InputError("`write_index` writes beside local shards; index a local copy, then upload both")
    remote = remote or RemoteCache()
    weights = [1 if are_remote else _size(shard.path) for shard in shards]
    report = CheckReport(images=ImageReport() if images else None)
    workers = workers or cores()
    count = workers if are_remote else worth_processes([shard.path for shard in shards], workers)
    scan = functools.partial(_scan, crc=crc, image=image, write=write_indexes, cache_limit=remote.limit)
    decode = functools.partial(_decode, image=image, cache_limit=remote.limit)
    done, started = 0.0, time.perf_counter()
    progress.start("check", sum(weights), unit="" if are_remote else "bytes")
    try:
        with Workers(count) as pool:
            # Few remote shards ahead, because they must still be in the cache when their images are decoded.
            scanned = pool.map(scan, _fetched(shards, remote), ahead=2 if are_remote else None)
            chunks = _chunks(zip(shards, scanned, strict=True), report)
            for chunk, found in pool.map(decode, chunks) if images else ((chunk, ImageReport()) for chunk in chunks):
                if isinstance(found, str):
                    shard = report.shards[chunk.number]
                    shard.damage, shard.unreadable = DamagedShard(shard.name, 0, found), True
                elif report.images is not None:
                    report.images.add(found)
                    progress.figures({"images_per_second": report.images.decoded / (time.perf_counter() - started)})
                done += chunk.share * weights[chunk.number]
                progress.advance(round(done))
    finally:
        progress.stop()
    keys = np.concatenate([np.empty(0, np.uint64), *(shard.key_hashes for shard in report.shards)])
    _, counts = np.unique(keys, return_counts=True)
    report.duplicates = int((counts > 1).sum())
    return report


def _fetched(shards: Sequence[ShardFile], remote: RemoteCache) -> Iterator[tuple[ShardFile, MaekitError | None]]:
    """Yield each shard once it is on this machine, with None or with the error of its download."""
    sizes = [0]

    def fetch(shard: ShardFile) -> MaekitError | None:
        try:
            if shard.url is not None:
                remote.fetch(shard)
                sizes.append(_size(shard.path))
                remote.refuse_if_too_small(min(len(shards), 2 * _FETCH_THREADS), max(sizes))
        except InputError:
            raise
        except MaekitError as error:
            return error
        return None

    are_remote = any(shard.url is not None for shard in shards)
    failures = map_in_threads(fetch, shards, threads=_FETCH_THREADS) if are_remote else itertools.repeat(None)
    return zip(shards, failures, strict=are_remote)


def _have(shard: ShardFile, cache_limit: int) -> None:
    """Fetch a remote shard again if it was evicted from the cache since it was fetched."""
    for _ in range(3):
        if shard.url is not None and not shard.path.exists():
            RemoteCache(cache_limit).fetch(shard)


def _scan(
    fetched: tuple[ShardFile, MaekitError | None], *, crc: bool, image: str | None, write: bool, cache_limit: int
) -> ShardReport:
    """Scan one shard; its damage becomes part of the report."""
    shard, failure = fetched
    report = ShardReport(shard.name)
    try:
        if failure is not None:
            raise failure
        _have(shard, cache_limit)
        index = _verified_index(shard, report, crc=crc, cache_limit=cache_limit)
    except MaekitError as error:  # an unreadable shard counts as damaged; the others are still checked
        report.unreadable = not isinstance(error, DamagedShard)
        whole = DamagedShard(shard.where, 0, str(error))
        report.damage = error if isinstance(error, DamagedShard) else whole
        return report
    finally:
        report.bytes = _size(shard.path)
    if write:
        write_index(index)
        report.stale_index = False
    else:
        cache_index(index)
    report.samples, report.digest, report.key_hashes = index.samples, index.digest, _key_hashes(index)
    report.extensions, report.ignored = index.extensions(), index.ignored_count
    index.choice = image
    images = index.count_images()
    report.without_image, report.several, report.unused = images.without, images.several, images.unused
    report.refused = len(index.problems)
    return report


def _verified_index(shard: ShardFile, report: ShardReport, *, crc: bool, cache_limit: int) -> ShardIndex:
    """Build the index of a shard, and compare it with the one beside the shard."""
    file = index_path(shard.path)
    beside = read_index(shard.path, file)
    verified = beside if beside is not None and beside.has_crc else None
    with_crc = crc or verified is not None
    try:
        index = build_index(shard.path, crc=with_crc)
    except DamagedShard:
        if shard.url is None:
            raise
        RemoteCache(cache_limit).fetch_anew(shard)  # perhaps only the cached copy is damaged
        index = build_index(shard.path, crc=with_crc)
    is_current = beside is not None and (beside.size, beside.digest) == (index.size, index.digest)
    report.stale_index = file.exists() and not is_current
    if verified is not None:
        if (damage := verified.difference(index)) is not None:
            hint = f"if it was made anew on purpose, delete {file.name}"
            if shard.url is not None:
                hint = "publish shards and their indexes together"
            raise DamagedShard(damage.path, damage.offset, f"{damage.reason}; {hint}")
        report.verified = True
    return index


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Samples [start, stop) of the shard with this number; `share` is their fraction of all its samples."""

    number: int
    shard: ShardFile
    row: CatalogueRow
    start: int
    stop: int
    share: float


def _chunks(scanned: Iterable[tuple[ShardFile, ShardReport]], report: CheckReport) -> Iterator[_Chunk]:
    """Add each shard to the report and yield its chunks of samples; a shard without samples yields an empty one."""
    for number, (shard, found) in enumerate(scanned):
        report.shards.append(found)
        row = CatalogueRow(found.bytes, 0, found.samples, 0, 0, found.digest, {})
        for start in range(0, found.samples or 1, _CHUNK):
            stop = min(start + _CHUNK, found.samples)
            share = (stop - start) / found.samples if found.samples else 1.0
            yield _Chunk(number, shard, row, start, stop, share)


def _decode(chunk: _Chunk, *, image: str | None, cache_limit: int) -> tuple[_Chunk, ImageReport | str]:
    """Decode the images of one chunk; return the report, or why the shard can no longer be read."""
    report = ImageReport()
    numbers = range(chunk.start, chunk.stop)
    if not numbers:
        return chunk, report
    try:
        _have(chunk.shard, cache_limit)
        # Its index was just cached by the scan, and a remote shard is a local file now.
        shards = ShardSet([ShardFile(chunk.shard.name, chunk.shard.path)], [chunk.row], image=image)
        for number, found in zip(numbers, shards.images(numbers, examine), strict=True):
            if isinstance(found, ImageError):
                report.failures[found.reason] += 1
                report.examples.append(ImageFailure(*shards.name(number), found.reason, str(found)))
            else:
                report.add_image(found)
    except MaekitError as error:
        return chunk, str(error)
    return chunk, report


def _key_hashes(index: ShardIndex) -> NDArray[np.uint64]:
    """Return a 64-bit hash of each key: uint64 `[samples]`."""
    keys = map(index.key, range(index.samples))
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, np.uint64)


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _spread(counts: Counter[int]) -> dict[str, Any] | None:
    """Return the minimum, median and maximum of the counted values."""
    if not counts:
        return None
    values = sorted(counts)
    ends = np.cumsum([counts[value] for value in values])
    middle = values[int(np.searchsorted(ends, (ends[-1] + 1) // 2))]
    return {"min": values[0], "median": middle, "max": values[-1]}
