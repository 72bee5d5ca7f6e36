"""The index of one shard: which samples it holds and where their members lie.

Building it applies the strict scan of `tar.py` plus the rules of the WebDataset format: a sample is a run of members
that share a key (the name up to the first dot of its last path component), a key occurs in one run only, and no member
occurs twice. A member that must not be read (a link, …) costs its sample alone.

With `crc=True` it also reads every member and keeps its CRC-32, so that `maekit check`, and every read of a member,
detects damage inside members too.

The file (magic "MAEKIDX2", format in columns.py): the header holds the shard's size and mtime, the digest, the probe,
extensions, ignored members, and the problem of each sample that has one (absent where none has); the columns are

    sample_start [S+1]  first member of each sample
    key_start    [S+1]  first byte of each key in `keys`
    keys         bytes, UTF-8
    member_offset [M] member_size [M] member_extension [M], and member_crc [M] if built with CRCs
"""

import contextlib
import hashlib
import mmap
import os
import re
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maekit.shards import columns as columns_file
from maekit.shards.image_choice import FIRST, is_ambiguous, ranks
from maekit.shards.image_counts import ImageCounts, count_images
from maekit.shards.tar import BLOCK, REWRITE, Member, Read, TarDamage, scan_members
from maekit.system import files
from maekit.system.errors import DamagedShard, ImageError, MaekitError

MAGIC = b"MAEKIDX2"
INDEX_SUFFIX = ".index"

# The key is the name up to the first dot of its last path component; the rest is the extension.
NAME = re.compile(r"(?P<key>(?:.*/)?[^./]+)\.(?P<extension>[^/]*)", re.DOTALL)
# Names that WebDataset reserves for its own metadata: members such as __meta__ and __meta__/x.json.
METADATA = re.compile(r"__[^/]*__($|/)")
_COLUMNS: dict[str, np.dtype[Any]] = {
    "sample_start": np.dtype("<i8"),
    "key_start": np.dtype("<i8"),
    "keys": np.dtype("u1"),
    "member_offset": np.dtype("<i8"),
    "member_size": np.dtype("<i8"),
    "member_extension": np.dtype("<u2"),
    "member_crc": np.dtype("<u4"),
}
OUTSIDE = "outside samples"  # the kind of members that belong to no sample
_NAMED = 3  # extensions named in a message
_MOST_IGNORED = 10  # names kept of members that belong to no sample
_PROBES = 8  # headers compared to tell whether an index built elsewhere belongs to a shard
_CHUNK = 1 << 20
_LOOK_AHEAD = 16 * BLOCK


@dataclass(frozen=True, slots=True)
class MemberSpan:
    """Location of one member of a sample.

    Attributes:
        extension: in lower case.
        offset: byte offset of its data.
        size: bytes of data.
        crc: CRC-32 of its data, or None if the index was built without.
    """

    extension: str
    offset: int
    size: int
    crc: int | None = None


class ShardIndex:
    """The samples of one shard, by ordinal.

    Attributes:
        path: the shard.
        samples: how many samples it holds.
        size: bytes of the shard when it was scanned.
        mtime_ns: its modification time then, in nanoseconds.
        digest: SHA-256 over keys, extensions and sizes (neither path nor times), hexadecimal.
        probe: CRC-32 over a few of its headers, which identifies another copy of the shard.
        ignored: names of members that belong to no sample (no extension, hidden, or WebDataset metadata), at most 10;
            `ignored_count` is their number.
        problems: why a sample must not be read, by its ordinal.
    """

    def __init__(self, path: Path, header: dict[str, Any], columns: columns_file.Columns) -> None:
        self.path = path
        self.size = int(header["size"])
        self.mtime_ns = int(header["mtime_ns"])
        self.digest = str(header["digest"])
        self.probe = int(header["probe"])
        self.ignored: list[str] = list(header["ignored"])
        self.ignored_count = int(header["ignored_count"])
        self.problems = {int(ordinal): str(problem) for ordinal, problem in header.get("problems", {}).items()}
        self._extensions = [str(extension) for extension in header["extensions"]]
        self._columns = columns
        self._sample_start = columns["sample_start"]
        self._key_start = columns["key_start"]
        self._keys = columns["keys"]
        self._kinds = columns["member_extension"]
        self._crc = columns.get("member_crc")
        self.samples = len(self._sample_start) - 1
        self.choice = None

    @property
    def choice(self) -> str | None:
        """The setting `image` (see image_choice.py)."""
        return self._choice

    @choice.setter
    def choice(self, image: str | None) -> None:
        self._choice = image
        self._ranks = ranks(self._extensions, image)

    @property
    def has_crc(self) -> bool:
        """Whether the index holds the CRC-32 of each member."""
        return self._crc is not None

    def key(self, ordinal: int) -> str:
        """Return the key of one sample."""
        start, end = self._key_start[ordinal], self._key_start[ordinal + 1]
        return self._keys[start:end].tobytes().decode("utf-8")

    def keys(self) -> Iterator[str]:
        """Yield all keys in tar order."""
        return (self.key(ordinal) for ordinal in range(self.samples))

    def members(self, ordinal: int) -> list[MemberSpan]:
        """Return the members of one sample in tar order."""
        return [self._member(m) for m in range(int(self._sample_start[ordinal]), int(self._sample_start[ordinal + 1]))]

    def _member(self, number: int) -> MemberSpan:
        extension = self._extensions[int(self._kinds[number])]
        offset, size = int(self._columns["member_offset"][number]), int(self._columns["member_size"][number])
        return MemberSpan(extension, offset, size, None if self._crc is None else int(self._crc[number]))

    def extensions(self) -> dict[str, int]:
        """Return how many members have each extension."""
        counts = np.bincount(self._kinds, minlength=len(self._extensions))
        return dict(zip(self._extensions, counts.tolist(), strict=True))

    def image(self, ordinal: int) -> MemberSpan:
        """Return the image of one sample, by the index's choice; the first one where several are as good.

        Raises:
            ImageError: the sample has no image, or must not be read.
        """
        if ordinal in self.problems:
            raise ImageError("bad_member", self.problems[ordinal])
        ranked = self._ranked(ordinal)
        best = max(ranked)
        if not best or (self.choice is None and ranked.count(best) > 1 and not is_ambiguous(best, 2)):
            there = ", ".join(member.extension for member in self.members(ordinal)[:_NAMED])
            what = "image extension" if self.choice in (None, FIRST) else f"extension {self.choice}"
            raise ImageError("no_image", f"no member with an {what} (there are: {there})")
        return self._member(int(self._sample_start[ordinal]) + ranked.index(best))

    def _ranked(self, ordinal: int) -> list[int]:
        kinds = self._kinds[self._sample_start[ordinal] : self._sample_start[ordinal + 1]].tolist()
        return [self._ranks[kind] for kind in kinds]

    def matches(self, status: os.stat_result) -> bool:
        """Whether the shard still has the size and modification time of the scan."""
        return (status.st_size, status.st_mtime_ns) == (self.size, self.mtime_ns)

    def adopt(self, descriptor: int) -> bool:
        """Accept an open file as the shard if its size and probed headers match, whatever its modification time.

        This recognises a copy of the shard by an index built elsewhere.
        """
        status = os.fstat(descriptor)
        if self.matches(status):
            return True
        offsets = self._columns["member_offset"]
        if status.st_size != self.size or _probe(descriptor, offsets, self.size) != self.probe:
            return False
        self.mtime_ns = status.st_mtime_ns
        return True

    def difference(self, other: "ShardIndex") -> DamagedShard | None:
        """Return how a fresh scan of the shard, `other`, differs from this index; None if it does not.

        Members are compared by CRC-32 if both indexes have it.
        """
        if (other.size, other.digest) != (self.size, self.digest):
            return DamagedShard(str(other.path), 0, "its members are not those of the index beside it")
        if self._crc is None or other._crc is None or not (differing := np.flatnonzero(self._crc != other._crc)).size:
            return None
        number = int(differing[0])
        sample = int(np.searchsorted(self._sample_start, number, "right")) - 1
        member = other._member(number)
        name = f"{self.key(sample)}.{member.extension}"
        more = f" (the first of {differing.size} members)" if differing.size > 1 else ""
        return DamagedShard(str(other.path), member.offset, f"the bytes of {name!r} are not those of its CRC-32{more}")

    def describes(self, path: Path) -> bool:
        """Whether a scan of the whole shard at `path` finds what this index says."""
        try:
            return self.difference(build_index(path, crc=self.has_crc)) is None
        except MaekitError:
            return False

    def is_ambiguous(self, ordinal: int) -> bool:
        """Whether it is open which of several images of a sample is meant."""
        if self.choice is not None or ordinal in self.problems:
            return False
        ranked = self._ranked(ordinal)
        return is_ambiguous(max(ranked), ranked.count(max(ranked)))

    def count_images(self) -> ImageCounts:
        """Return what becomes of the images of this shard by the index's choice."""
        counts = count_images(self._extensions, self._kinds, self._sample_start, list(self.problems), self.choice)
        if self.ignored_count:
            counts.unused[OUTSIDE] = self.ignored_count
        return counts

    def to_bytes(self) -> bytes:
        """Return the index as the bytes of its file."""
        names = ("size", "mtime_ns", "digest", "probe", "ignored", "ignored_count")
        header = {name: getattr(self, name) for name in names}
        header["extensions"] = self._extensions
        if self.problems:
            header["problems"] = self.problems
        return columns_file.to_bytes(MAGIC, header, self._columns)


def build_index(path: Path, *, crc: bool = False) -> ShardIndex:
    """Scan a shard strictly and return its index.

    Args:
        path: the shard.
        crc: also read every member and keep its CRC-32.

    Raises:
        DamagedShard: the archive or its samples break a rule; says which rule and where.
        MaekitError: the file cannot be read.
    """
    try:
        with files.reading(path), open(path, "rb", buffering=0) as file:
            return _collect(path, file.fileno(), crc=crc)
    except TarDamage as damage:
        raise DamagedShard(str(path), damage.offset, damage.reason) from damage


def crc32_of(descriptor: int, offset: int, size: int) -> int:
    """Return the CRC-32 of `size` bytes from `offset`, or of fewer if the file ends before."""
    crc, end = 0, offset + size
    while offset < end and (data := os.pread(descriptor, min(_CHUNK, end - offset), offset)):
        crc = zlib.crc32(data, crc)
        offset += len(data)
    return crc


def readable_name(member: Member) -> str:
    """Return the name of a member; bytes that are not UTF-8 are written as \\xfc."""
    return member.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _probe(descriptor: int, offsets: NDArray[Any], size: int) -> int:
    """Return the CRC-32 of the size and of the header blocks of a few members, including the first and the last."""
    crc = zlib.crc32(str(size).encode())
    for number in np.unique(np.linspace(0, len(offsets) - 1, min(_PROBES, len(offsets))).astype(np.int64)):
        # A member's own header is the block before its data, after any extended headers.
        crc = zlib.crc32(os.pread(descriptor, BLOCK, int(offsets[number]) - BLOCK), crc)
    return crc


def _collect(path: Path, descriptor: int, *, crc: bool) -> ShardIndex:
    """Scan an open shard, and group its members into samples."""
    status = os.fstat(descriptor)
    seen: set[str] = set()
    current: str | None = None
    in_sample: set[str] = set()
    ignored: list[str] = []
    ignored_count = 0
    extensions: dict[str, int] = {}
    sample_start, key_start, offsets, sizes, kinds, crcs = (array("q") for _ in range(6))
    keys = bytearray()
    problems: dict[int, str] = {}
    digest = hashlib.sha256()
    for member in scan_members(header_reader(descriptor), status.st_size):
        name = readable_name(member) if member.problem else member.name
        match = NAME.fullmatch(name)
        if match is None or METADATA.match(name):
            ignored_count += 1
            if len(ignored) < _MOST_IGNORED:
                ignored.append(name)
            continue
        key, extension = match["key"], match["extension"].lower()
        if key != current:
            if key in seen:
                reason = f"the key {key!r} comes again, apart from its other members"
                raise TarDamage(member.header, f"{reason} (tar --sort=name keeps them together); {REWRITE}")
            seen.add(key)
            current, in_sample = key, set()
            encoded = key.encode()
            sample_start.append(len(offsets))
            key_start.append(len(keys))
            keys += encoded
            digest.update(b"k%d:%b" % (len(encoded), encoded))
        if extension in in_sample:
            raise TarDamage(member.header, f"the member {name!r} comes twice in one sample; {REWRITE}")
        in_sample.add(extension)
        offsets.append(member.offset)
        sizes.append(member.size)
        kinds.append(extensions.setdefault(extension, len(extensions)))
        if crc:
            crcs.append(crc32_of(descriptor, member.offset, member.size))
        digest.update(b"m%d:%b:%d" % (len(extension.encode()), extension.encode(), member.size))
        if member.problem:
            problems[len(sample_start) - 1] = f"{name}: {member.problem}"
            digest.update(b"p")
    if len(extensions) > 1 << 16:
        raise TarDamage(0, f"{len(extensions)} different extensions in one shard (at most {1 << 16})")
    sample_start.append(len(offsets))
    key_start.append(len(keys))
    # In the order of _COLUMNS.
    values = [sample_start, key_start, keys, offsets, sizes, kinds, *([crcs] if crc else [])]
    columns = {name: np.array(column, _COLUMNS[name]) for name, column in zip(_COLUMNS, values, strict=False)}
    header = {
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "digest": digest.hexdigest(),
        "probe": _probe(descriptor, columns["member_offset"], status.st_size),
        "ignored": ignored,
        "ignored_count": ignored_count,
        "extensions": list(extensions),
        "problems": problems,
    }
    return ShardIndex(path, header, columns)


def header_reader(descriptor: int) -> Read:
    """Return a function that reads ahead, so that one system call reads many headers of small members."""
    start, buffer = 0, b""

    def read(offset: int, count: int) -> bytes:
        nonlocal start, buffer
        if not start <= offset <= start + len(buffer) - count:
            start, buffer = offset, os.pread(descriptor, max(count, _LOOK_AHEAD), offset)
        return buffer[offset - start : offset - start + count]

    return read


def parse_index(path: Path, data: bytes | mmap.mmap | NDArray[np.uint8]) -> ShardIndex | None:
    """Return the index of the shard at `path` from the bytes of an index file, or None if they are damaged."""
    parsed = columns_file.from_bytes(MAGIC, _COLUMNS, np.frombuffer(data, np.uint8))
    if parsed is None or not set(_COLUMNS) - {"member_crc"} <= set(parsed[1]) or not _are_consistent(parsed[1]):
        return None
    try:
        parsed[1]["keys"].tobytes().decode("utf-8")
        index = ShardIndex(path, *parsed)
    except (KeyError, TypeError, ValueError):
        return None
    ends = index._columns["member_offset"] + index._columns["member_size"]
    kinds = index._kinds
    if len(ends) and (int(ends.max()) > index.size or int(kinds.max()) >= len(index._extensions)):
        return None
    return index


def _are_consistent(columns: columns_file.Columns) -> bool:
    """Whether the columns are consistent; an index built elsewhere may hold anything."""
    members = len(columns["member_offset"])
    starts, keys = columns["sample_start"], columns["key_start"]
    return (
        all(len(column) == members for name, column in columns.items() if name.startswith("member_"))
        and 0 < len(starts) == len(keys)
        and (int(starts[0]), int(starts[-1])) == (0, members)
        and (int(keys[0]), int(keys[-1])) == (0, len(columns["keys"]))
        and bool((np.diff(starts) > 0).all() and (np.diff(keys) > 0).all())
        # No key begins inside a UTF-8 character.
        and bool((columns["keys"][keys[:-1]] & 0xC0 != 0x80).all())
        and bool((columns["member_offset"] >= BLOCK).all() and (columns["member_size"] >= 0).all())
    )


def index_path(path: Path) -> Path:
    """Return the path of the index beside a shard: `NAME.tar.index`."""
    return path.with_name(path.name + INDEX_SUFFIX)


def read_index(path: Path, file: Path) -> ShardIndex | None:
    """Return the index of the shard at `path` from an index file, or None if the file is absent or damaged."""
    try:
        with open(file, "rb", buffering=0) as opened:
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # absent, or empty (which cannot be mapped)
        return None
    return parse_index(path, mapped)


def load_index(path: Path) -> ShardIndex:
    """Return the index of a shard: the file beside it, else the cached one, else a strict scan that is then cached.

    The cached index is valid only for the size and modification time of the scan. The file beside the shard may have
    been copied together with it, so it is valid if size and probed headers match.

    Raises:
        DamagedShard, MaekitError: as `build_index`.
    """
    with files.reading(path), open(path, "rb", buffering=0) as file:
        if (index := read_index(path, index_path(path))) and index.adopt(file.fileno()):
            return index
        if (index := read_index(path, _cache_path(path))) and index.matches(os.fstat(file.fileno())):
            return index
    index = build_index(path)
    cache_index(index)
    return index


def cache_index(index: ShardIndex) -> None:
    """Cache an index for `load_index`; if the cache cannot be written, the next start merely scans again."""
    with contextlib.suppress(MaekitError):
        files.write_atomically(_cache_path(index.path), index.to_bytes())


def write_index(index: ShardIndex) -> None:
    """Write an index beside its shard as `NAME.tar.index`."""
    files.write_atomically(index_path(index.path), index.to_bytes())


def _cache_path(path: Path) -> Path:
    name = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()
    return files.cache_directory() / "index" / name[:2] / f"{name}{INDEX_SUFFIX}"
