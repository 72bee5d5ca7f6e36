"""The index of one shard: which samples it holds and where their members lie.

Building it is the strict scan of `tar.py` plus the rules of the WebDataset form: a sample is the run of members that
share a key (the name up to the first dot of its last path part), a key comes in one run, and no member twice.

File format, little-endian, memory-mapped, columns aligned to 8 bytes:

    8 bytes   magic "MAEKIDX1"
    uint32    length of the JSON header      uint32   CRC-32 of the JSON header and all columns
    JSON      shard size and mtime, digest, counts, extensions, ignored members, and for each column its dtype,
              offset (from the first column) and length
    columns   sample_start [S+1]  first member of each sample
              key_start    [S+1]  first byte of each key in `keys`
              keys         bytes, UTF-8
              member_offset [M] member_size [M] member_extension [M]
"""

import contextlib
import hashlib
import json
import os
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maekit import files
from maekit.errors import DamagedShard, MaekitError
from maekit.shards.tar import BLOCK, Member, TarDamage, scan_members

MAGIC = b"MAEKIDX1"
INDEX_SUFFIX = ".index"
IMAGE_EXTENSIONS = frozenset(
    ("jpg", "jpeg", "jpe", "png", "webp", "tif", "tiff", "bmp", "gif", "avif", "ppm", "pgm", "pbm", "pnm")
)

# The key is the name up to the first dot of its last path part; the rest is the extension.
_NAME = re.compile(r"(?P<key>(?:.*/)?[^./]+)\.(?P<extension>[^/]*)", re.DOTALL)
# What WebDataset sets aside as its own metadata: members such as __meta__ and __meta__/x.json.
METADATA = re.compile(r"__[^/]*__($|/)")
_COLUMNS: dict[str, np.dtype[Any]] = {
    "sample_start": np.dtype("<i8"),
    "key_start": np.dtype("<i8"),
    "keys": np.dtype("u1"),
    "member_offset": np.dtype("<i8"),
    "member_size": np.dtype("<i8"),
    "member_extension": np.dtype("<u2"),
}


@dataclass(frozen=True, slots=True)
class MemberSpan:
    """Where one member of a sample lies: extension (lower case), byte offset of its data, bytes of data."""

    extension: str
    offset: int
    size: int


class ShardIndex:
    """The samples of one shard, by ordinal.

    Attributes:
        path: the shard.
        samples: how many samples it holds.
        size: bytes of the shard when it was scanned.
        mtime_ns: its modification time then, in nanoseconds.
        digest: SHA-256 over keys, extensions and sizes (neither path nor times), hexadecimal.
        ignored: names of members that belong to no sample (no extension, hidden, or WebDataset metadata), at most 10,
            and in `ignored_count` how many there are.
    """

    def __init__(self, path: Path, header: dict[str, Any], columns: dict[str, NDArray[Any]]) -> None:
        self.path = path
        self.size = int(header["size"])
        self.mtime_ns = int(header["mtime_ns"])
        self.digest = str(header["digest"])
        self.ignored: list[str] = list(header["ignored"])
        self.ignored_count = int(header["ignored_count"])
        self._extensions: list[str] = list(header["extensions"])
        self._columns = columns
        self._sample_start = columns["sample_start"]
        self._key_start = columns["key_start"]
        self._keys = columns["keys"]
        self.samples = len(self._sample_start) - 1

    def key(self, ordinal: int) -> str:
        """Return the key of one sample."""
        start, end = self._key_start[ordinal], self._key_start[ordinal + 1]
        return self._keys[start:end].tobytes().decode("utf-8")

    def keys(self) -> Iterator[str]:
        """Yield all keys in tar order."""
        return (self.key(ordinal) for ordinal in range(self.samples))

    def members(self, ordinal: int) -> list[MemberSpan]:
        """Return the members of one sample in tar order."""
        span = range(int(self._sample_start[ordinal]), int(self._sample_start[ordinal + 1]))
        offsets, sizes = self._columns["member_offset"], self._columns["member_size"]
        extensions = self._columns["member_extension"]
        return [MemberSpan(self._extensions[int(extensions[m])], int(offsets[m]), int(sizes[m])) for m in span]

    def image(self, ordinal: int) -> MemberSpan | None:
        """Return the image of one sample: the first member with an image extension.

        A whole extension (`jpg`) goes before the last part of a longer one (`left.jpg`).
        """
        members = self.members(ordinal)
        for member in members:
            if member.extension in IMAGE_EXTENSIONS:
                return member
        for member in members:
            if member.extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
                return member
        return None

    def matches(self, status: os.stat_result) -> bool:
        """Whether the shard still has the size and modification time that were scanned."""
        return (status.st_size, status.st_mtime_ns) == (self.size, self.mtime_ns)

    def to_bytes(self) -> bytes:
        """Return the index as the bytes of its file."""
        table, body = {}, b""
        for name, dtype in _COLUMNS.items():
            raw = np.ascontiguousarray(self._columns[name], dtype).tobytes()
            table[name] = [dtype.str, len(body), len(raw) // dtype.itemsize]
            body += raw + bytes(-len(raw) % 8)
        header = {
            "size": self.size,
            "mtime_ns": self.mtime_ns,
            "digest": self.digest,
            "ignored": self.ignored,
            "ignored_count": self.ignored_count,
            "extensions": self._extensions,
            "columns": table,
        }
        head = json.dumps(header, ensure_ascii=False).encode()
        head += b" " * (-len(head) % 8)
        return MAGIC + struct.pack("<II", len(head), zlib.crc32(body, zlib.crc32(head))) + head + body


def build_index(path: Path) -> ShardIndex:
    """Scan a shard strictly and return its index.

    Raises:
        DamagedShard: the archive or its samples break a rule; says where and which.
        MaekitError: the file cannot be read.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            reader = _HeaderReader(file.fileno())
            return _collect(path, status, scan_members(reader.read, status.st_size))
    except TarDamage as damage:
        raise DamagedShard(str(path), damage.offset, damage.reason) from damage
    except OSError as error:
        raise MaekitError(f"cannot read {path}: {error.strerror or error}") from error


def _collect(path: Path, status: os.stat_result, members: Iterator[Member]) -> ShardIndex:
    """Group members into samples."""
    seen: set[str] = set()
    current: str | None = None
    in_sample: set[str] = set()
    ignored: list[str] = []
    ignored_count = 0
    extensions: dict[str, int] = {}
    sample_start: list[int] = []
    key_start = [0]
    keys: list[bytes] = []
    offsets: list[int] = []
    sizes: list[int] = []
    kinds: list[int] = []
    digest = hashlib.sha256()
    for member in members:
        match = _NAME.fullmatch(member.name)
        if match is None or METADATA.match(member.name):
            ignored_count += 1
            if len(ignored) < 10:
                ignored.append(member.name)
            continue
        key, extension = match["key"], match["extension"].lower()
        if key != current:
            if key in seen:
                raise TarDamage(member.header, f"the key {key!r} comes again, apart from its other members")
            seen.add(key)
            current, in_sample = key, set()
            encoded = key.encode()
            sample_start.append(len(offsets))
            keys.append(encoded)
            key_start.append(key_start[-1] + len(encoded))
            digest.update(b"k%d:%b" % (len(encoded), encoded))
        if extension in in_sample:
            raise TarDamage(member.header, f"the member {member.name!r} comes twice in one sample")
        in_sample.add(extension)
        offsets.append(member.offset)
        sizes.append(member.size)
        kinds.append(extensions.setdefault(extension, len(extensions)))
        digest.update(b"m%d:%b:%d" % (len(extension.encode()), extension.encode(), member.size))
    if len(extensions) > 1 << 16:
        raise TarDamage(0, f"{len(extensions)} different extensions in one shard (at most {1 << 16})")
    header: dict[str, Any] = {
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "digest": digest.hexdigest(),
        "ignored": ignored,
        "ignored_count": ignored_count,
        "extensions": list(extensions),
    }
    columns = {
        "sample_start": np.array([*sample_start, len(offsets)], "<i8"),
        "key_start": np.array(key_start, "<i8"),
        "keys": np.frombuffer(b"".join(keys), "u1"),
        "member_offset": np.array(offsets, "<i8"),
        "member_size": np.array(sizes, "<i8"),
        "member_extension": np.array(kinds, "<u2"),
    }
    return ShardIndex(path, header, columns)


class _HeaderReader:
    """Positional reads with a small look-ahead: headers of small members come many to a system call."""

    _LOOK_AHEAD = 16 * BLOCK

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._start = 0
        self._buffer = b""

    def read(self, offset: int, count: int) -> bytes:
        at = offset - self._start
        if not 0 <= at <= len(self._buffer) - count:
            self._buffer = os.pread(self._descriptor, max(count, self._LOOK_AHEAD), offset)
            self._start, at = offset, 0
        return self._buffer[at : at + count]


def parse_index(path: Path, raw: NDArray[np.uint8]) -> ShardIndex | None:
    """Return the index of the shard at `path` from the bytes of an index file, or None if they are damaged."""
    prefix = len(MAGIC) + 8
    if len(raw) < prefix or raw[: len(MAGIC)].tobytes() != MAGIC:
        return None
    length, crc = struct.unpack("<II", raw[len(MAGIC) : prefix].tobytes())
    if zlib.crc32(raw[prefix:].data) != crc:
        return None
    header = json.loads(raw[prefix : prefix + length].tobytes())
    body = raw[prefix + length :]
    columns: dict[str, NDArray[Any]] = {}
    for name, (dtype, start, count) in header["columns"].items():
        columns[name] = body[start : start + count * np.dtype(dtype).itemsize].view(dtype)
    return ShardIndex(path, header, columns)


def load_index(path: Path) -> ShardIndex:
    """Return the index of a shard: the file beside it, else the cached one, else a strict scan that is then cached.

    An index counts only for the size and modification time of the shard that it was made from.

    Raises:
        DamagedShard, MaekitError: as `build_index`.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise MaekitError(f"cannot read {path}: {error.strerror or error}") from error
    cached = _cache_path(path)
    for candidate in (path.with_name(path.name + INDEX_SUFFIX), cached):
        index = _open_index(path, candidate)
        if index is not None and index.matches(status):
            return index
    index = build_index(path)
    # A cache that cannot be written costs the next start a scan, nothing else.
    with contextlib.suppress(MaekitError):
        files.write_atomically(cached, index.to_bytes())
    return index


def write_index(index: ShardIndex) -> Path:
    """Write an index beside its shard as `NAME.tar.index`; return that path."""
    target = index.path.with_name(index.path.name + INDEX_SUFFIX)
    files.write_atomically(target, index.to_bytes())
    return target


def _open_index(path: Path, candidate: Path) -> ShardIndex | None:
    try:
        raw = np.memmap(candidate, np.uint8, "r")
    except (OSError, ValueError):  # absent, or empty (which cannot be mapped)
        return None
    return parse_index(path, raw)


def _cache_path(path: Path) -> Path:
    name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()
    return cache_directory() / "index" / name[:2] / f"{name}{INDEX_SUFFIX}"


def cache_directory() -> Path:
    """Return where maekit caches what it can make again: $MAEKIT_CACHE, else $XDG_CACHE_HOME/maekit, else ~/.cache."""
    if own := os.environ.get("MAEKIT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maekit"
