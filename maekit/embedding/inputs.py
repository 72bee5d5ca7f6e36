"""Inputs of embedding: tar shards, or a folder of image files divided into parts. Each is a sequence of keyed images.

A `Part` has a name and is not opened yet; opening it gives `Images`, which decoding reads from.
"""

import contextlib
import fnmatch
import hashlib
import itertools
import os
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from maekit.embedding.decode_pool import Place
from maekit.shards.cache import RemoteCache
from maekit.shards.index import IMAGE_EXTENSIONS, ShardIndex, load_index
from maekit.shards.read import open_shard, read_bytes, read_file
from maekit.shards.spec import ShardFile, find_shards, is_shard
from maekit.system import files
from maekit.system.errors import DamagedShard, ImageError, InputError, MaekitError

IMAGES_PER_PART = 4096
_numbers = itertools.count()


class Images(Protocol):
    """The images of an opened part, by ordinal. Also a `Source` for decoding.

    Attributes:
        name: name of the part.
        number: unique number of the opened part.
        samples: number of keys.
        size: size in bytes.
        digest: SHA-256 over its keys and sizes, hexadecimal.
        version: changes with its content; None if unknown.
        descriptor: descriptor of an open file; None if images are separate files.
    """

    name: str
    number: int
    samples: int
    size: int
    digest: str
    version: str | None

    @property
    def descriptor(self) -> int | None:
        """Descriptor of the open file that places refer to; None if places are paths."""

    def key(self, ordinal: int) -> str:
        """Return the key of a sample."""

    def place(self, ordinal: int) -> Place | None:
        """Return the location of a sample's image; None if it has none."""

    def sidecar(self, ordinal: int, extension: str) -> bytes | None:
        """Return a sidecar of a sample; None if it has none.

        Raises:
            ImageError: its bytes do not match the CRC-32 in the index.
            MaekitError: it cannot be read.
        """

    def changed(self) -> str | None:
        """Return a message if the part has changed since it was opened, else None."""

    def close(self) -> None:
        """Close the open file, if any."""


class Part(Protocol):
    """A piece of the input that becomes one piece of the output: a shard, or some images of a folder."""

    @property
    def name(self) -> str:
        """The path relative to the input's root; it names the part in every output."""

    @property
    def where(self) -> str:
        """The path or URL, for messages."""

    @property
    def is_remote(self) -> bool:
        """Whether it must be fetched before it is read."""

    def look(self, remote: RemoteCache) -> tuple[str | None, int]:
        """Return its version (None if unknown) and its size in bytes (0 if unknown), without reading it."""

    def open(self, remote: RemoteCache) -> Images:
        """Fetch, index and open it.

        Raises:
            MaekitError: it cannot be read or is damaged.
        """


def find_inputs(specs: Sequence[str], keep: tuple[str, ...] = ()) -> list[Part]:
    """Return the parts that the input specs name, sorted by name.

    Args:
        specs: directories, tar files, globs, brace patterns and URLs, or one directory of images.
        keep: extensions of the sidecars to store.

    Raises:
        InputError: nothing found (says what exists), or other inputs beside a folder of images.
    """
    folders = {spec: found for spec in specs if os.path.isdir(spec) and (found := _pictures(Path(spec)))}
    if not folders:
        return [TarPart(shard) for shard in find_shards(specs)]
    if len(specs) > 1:
        raise InputError(f"{next(iter(folders))} is a folder of images: give it alone, or `maekit pack` it into shards")
    root = Path(os.path.abspath(specs[0]))
    found = folders[specs[0]]
    for name in found:
        files.require_utf8(Path(name))
    return [
        FolderPart(f"images-{start // IMAGES_PER_PART:05d}", root, tuple(found[start : start + IMAGES_PER_PART]), keep)
        for start in range(0, len(found), IMAGES_PER_PART)
    ]


@dataclass(frozen=True)
class TarPart:
    """A tar shard."""

    shard: ShardFile

    @property
    def name(self) -> str:
        """Name of the shard."""
        return self.shard.name

    @property
    def where(self) -> str:
        """Its path or URL."""
        return self.shard.url or str(self.shard.path)

    @property
    def is_remote(self) -> bool:
        """Whether it has a URL."""
        return self.shard.url is not None

    def look(self, remote: RemoteCache) -> tuple[str | None, int]:
        """Query the file system or the server."""
        try:
            if self.shard.url is not None:
                there = remote.describe(self.shard)
                return there.version or None, there.size or 0
            status = self.shard.path.stat()
            return f"{status.st_size} bytes, {status.st_mtime_ns} ns", status.st_size
        except (MaekitError, OSError):
            return None, 0  # reported when its turn comes

    def open(self, remote: RemoteCache) -> "TarImages":
        """Fetch, index and open the shard."""
        try:
            version, index = self._index(remote)
            return TarImages(self.name, self.where, version, index, open_shard(index, remote))
        except DamagedShard as damage:
            raise DamagedShard(self.where, damage.offset, damage.reason) from damage

    def _index(self, remote: RemoteCache) -> tuple[str | None, ShardIndex]:
        if self.shard.url is None:
            return self.look(remote)[0], load_index(self.shard.path)
        for attempt in range(3):
            version = remote.fetch(self.shard)
            if self.shard.path.exists() or attempt == 2:
                break  # else another process has just evicted it from the cache
        try:
            return version, load_index(self.shard.path)
        except DamagedShard:
            version = remote.fetch_anew(self.shard)  # only the cached copy may be damaged
            return version, load_index(self.shard.path)


class TarImages:
    """An opened shard."""

    def __init__(self, name: str, where: str, version: str | None, index: ShardIndex, descriptor: int) -> None:
        self.name, self.version, self.number = name, version, next(_numbers)
        self.samples, self.size, self.digest = index.samples, index.size, index.digest
        self.descriptor: int | None = descriptor
        self._where, self._index, self._descriptor = where, index, descriptor

    def key(self, ordinal: int) -> str:
        """Return the key of a sample."""
        return self._index.key(ordinal)

    def place(self, ordinal: int) -> Place | None:
        """Return offset, size and CRC-32 of the image; None if there is none."""
        member = self._index.image(ordinal)
        return None if member is None else (member.offset, member.size, member.crc)

    def sidecar(self, ordinal: int, extension: str) -> bytes | None:
        """Return the member with this extension; None if there is none."""
        for member in self._index.members(ordinal):
            if member.extension == extension:
                return read_bytes(self._descriptor, self._where, member.offset, member.size, member.crc)
        return None

    def changed(self) -> str | None:
        """Return a message if the open file has been modified, else None."""
        if self._index.matches(os.fstat(self._descriptor)):
            return None
        return f"{self._where}: changed since it was indexed; run the command again"

    def close(self) -> None:
        """Close the shard."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


@dataclass(frozen=True)
class FolderPart:
    """Some images of a folder.

    Attributes:
        name: `images-` and the part's number.
        root: the folder.
        paths: paths of the images relative to the folder, in order; they are the keys.
        keep: extensions of the sidecars to store.
    """

    name: str
    root: Path
    paths: tuple[str, ...]
    keep: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The folder, and its first and last image."""
        return f"{self.root} ({self.paths[0]} to {self.paths[-1]})"

    @property
    def is_remote(self) -> bool:
        """Never."""
        return False

    def look(self, remote: RemoteCache) -> tuple[str | None, int]:
        """Return a digest of names, sizes and times, and the images' total size."""
        return self.version(), sum(self._status(self.paths)[0])

    def version(self) -> str:
        """Return a digest of the names, sizes and times of images and sidecars."""
        beside = [str(Path(path).with_suffix(f".{extension}")) for extension in self.keep for path in self.paths]
        paths = [*self.paths, *beside]
        digest = hashlib.sha256()
        for path, size, changed in zip(paths, *self._status(paths), strict=True):
            digest.update(f"{path}\0{size} {changed}\n".encode())
        return digest.hexdigest()

    def open(self, remote: RemoteCache) -> "FolderImages":
        """List the images; each is opened when it is read."""
        version, size = self.look(remote)
        digest = hashlib.sha256()
        for path, bytes_ in zip(self.paths, self._status(self.paths)[0], strict=True):
            digest.update(f"{path}\0{bytes_}\n".encode())
        return FolderImages(self, version, size, digest.hexdigest())

    def _status(self, paths: Sequence[str]) -> tuple[list[int], list[int]]:
        sizes, times = [], []
        for path in paths:
            try:
                status = os.stat(self.root / path)
                sizes.append(status.st_size)
                times.append(status.st_mtime_ns)
            except OSError:  # reported when it is read
                sizes.append(0)
                times.append(0)
        return sizes, times


class FolderImages:
    """The images of a part of a folder."""

    descriptor: int | None = None

    def __init__(self, part: FolderPart, version: str | None, size: int, digest: str) -> None:
        self.name, self.version, self.size, self.digest = part.name, version, size, digest
        self.number, self.samples = next(_numbers), len(part.paths)
        self._part = part

    def key(self, ordinal: int) -> str:
        """Return the path of an image relative to the folder."""
        return self._part.paths[ordinal]

    def place(self, ordinal: int) -> Place | None:
        """Return the path of an image."""
        return str(self._part.root / self._part.paths[ordinal])

    def sidecar(self, ordinal: int, extension: str) -> bytes | None:
        """Return the file of the same name with this extension; None if there is none."""
        path = Path(str(self.place(ordinal))).with_suffix(f".{extension}")
        return read_file(str(path)) if path.is_file() else None

    def changed(self) -> str | None:
        """Return a message if names, sizes or times have changed, else None."""
        if self._part.version() == self.version:
            return None
        return f"{self._part.where}: changed while it was embedded; run the command again"

    def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True)
class Scope:
    """Which samples of a part to embed.

    Attributes:
        select: a glob that keys must match, or None for all.
        first: at most N of them, or None for all.
    """

    select: str | None = None
    first: int | None = None

    def ordinals(self, images: Images) -> Sequence[int]:
        """Return the ordinals of the selected samples, in order."""
        chosen: Sequence[int] = range(images.samples)
        if self.select is not None:
            matches = re.compile(fnmatch.translate(self.select)).match
            chosen = [ordinal for ordinal in chosen if matches(images.key(ordinal))]
        return chosen if self.first is None else chosen[: self.first]


def content_of(
    images: Images, ordinals: Sequence[int], keep: Sequence[str], stopped: Callable[[], object] = lambda: None
) -> int:
    """Return the CRC-32 over the CRC-32s of all images, followed by those of all stored sidecars.

    Raises:
        MaekitError: a shard cannot be read, or `stopped` returned true.
    """
    crcs = np.zeros((1 + len(keep), len(ordinals)), "<u4")
    for position, ordinal in enumerate(ordinals):
        if stopped():
            raise MaekitError("stopped while reading")
        place = images.place(ordinal)
        if place is not None:
            with contextlib.suppress(ImageError):  # stays 0, as in the commit record
                crcs[0, position] = zlib.crc32(read_place(images, place))
        for row, extension in enumerate(keep, 1):
            crcs[row, position] = riding_crc(images, ordinal, extension)
    return zlib.crc32(crcs.tobytes())


def riding_crc(images: Images, ordinal: int, extension: str) -> int:
    """Return the CRC-32 of a sidecar; 0 if there is none or it cannot be read."""
    try:
        return zlib.crc32(images.sidecar(ordinal, extension) or b"")
    except ImageError:
        return 0


def read_place(images: Images, place: Place) -> bytes:
    """Return the bytes of an image.

    Raises:
        ImageError: it is too large, cannot be read, or does not match the index.
        MaekitError: the shard cannot be read.
    """
    if isinstance(place, str):
        return read_file(place)
    assert images.descriptor is not None
    return read_bytes(images.descriptor, images.name, *place)


def _pictures(folder: Path) -> list[str]:
    """Return the paths of the images in a folder, relative to it; empty if it holds shards."""
    found = list(files.walk_files(folder))
    if any(is_shard(path.name) for path in found):
        return []
    return [path.relative_to(folder).as_posix() for path in found if _is_image(path.name)]


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS
