"""Inputs of embedding: tar shards, or a folder of image files divided into parts. Each is a sequence of keyed images.

A `Part` has a name and is not opened yet; opening it gives `Images`, which decoding reads from. Each part of the input
becomes one piece of the output. A part has:

    name        the path relative to the input's root; it names the part in every output
    where       the path or URL, for messages
    is_remote   whether it must be fetched before it is read
    look        -> its version (None if unknown) and its size in bytes (0 if unknown), without reading it
    open        fetch, index and open it -> `Images`; MaekitError if it cannot be read or is damaged

`Images` are known by the ordinals of their samples, and have:

    number      unique number of the opened part
    samples     number of keys
    size        size in bytes
    digest      SHA-256 over its keys and sizes, hexadecimal
    version     changes with its content; None if unknown
    unused      number of images, or of files in a folder, that are the image of no sample, by kind
    descriptor  descriptor of the open file that locations refer to; None if locations are paths
    sidecar     -> a sidecar of a sample, or None if it has none; ImageError if its bytes do not match the CRC-32 in the
                index, MaekitError if it cannot be read
"""

import contextlib
import fnmatch
import hashlib
import itertools
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from maekit.shards.cache import RemoteCache
from maekit.shards.folder import FolderContents, look_into, undecoded_notes
from maekit.shards.index import ShardIndex, load_index
from maekit.shards.read import ambiguity, open_shard, read_bytes, read_file
from maekit.shards.spec import ShardFile, find_shards
from maekit.system import files
from maekit.system.errors import DamagedShard, ImageError, InputError, MaekitError

IMAGES_PER_PART = 4096
_numbers = itertools.count()


Location = tuple[int, int, int | None] | str
"""Where an image lies: (offset, bytes, CRC-32) in a shard's descriptor, or the path of a file."""


@dataclass(frozen=True)
class TarPart:
    """A tar shard.

    Attributes:
        shard: the file.
        image: which member of a sample is its image (shards/image_choice.py).
    """

    shard: ShardFile
    image: str | None = None

    @property
    def name(self) -> str:
        """Name of the shard."""
        return self.shard.name

    @property
    def where(self) -> str:
        """Its path or URL."""
        return self.shard.where

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
            index.choice = self.image
            counts = index.count_images()
            if self.image is None and counts.several:
                raise MaekitError(ambiguity(index, self.where))
            return TarImages(self, version, index, counts.unused, open_shard(index, remote))
        except DamagedShard as damage:
            raise DamagedShard(self.where, damage.offset, damage.reason) from damage

    def _index(self, remote: RemoteCache) -> tuple[str | None, ShardIndex]:
        if self.shard.url is None:
            return self.look(remote)[0], load_index(self.shard.path)
        for _ in range(3):
            version = remote.fetch(self.shard)
            if self.shard.path.exists():
                break  # else another process has just evicted it from the cache
        try:
            return version, load_index(self.shard.path)
        except DamagedShard:
            version = remote.fetch_anew(self.shard)  # only the cached copy may be damaged
            return version, load_index(self.shard.path)


class TarImages:
    """An opened shard."""

    def __init__(
        self, part: TarPart, version: str | None, index: ShardIndex, unused: dict[str, int], descriptor: int
    ) -> None:
        self.name, self.version, self.number, self.unused = part.name, version, next(_numbers), unused
        self.samples, self.size, self.digest = index.samples, index.size, index.digest
        self.descriptor: int | None = descriptor
        self._where, self._index, self._descriptor = part.where, index, descriptor

    def key(self, ordinal: int) -> str:
        """Return the key of a sample."""
        return self._index.key(ordinal)

    def location(self, ordinal: int) -> Location:
        """Return offset, size and CRC-32 of the image; `ImageError` if there is none, or it must not be read."""
        member = self._index.image(ordinal)
        return member.offset, member.size, member.crc

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
        unused: number of files of the folder that are no images, by kind; the first part has them all.
    """

    name: str
    root: Path
    paths: tuple[str, ...]
    keep: tuple[str, ...] = ()
    unused: Mapping[str, int] = field(default_factory=dict)
    is_remote: ClassVar[bool] = False

    @property
    def where(self) -> str:
        """The folder, and its first and last image."""
        return f"{self.root} ({self.paths[0]} to {self.paths[-1]})"

    def look(self, remote: RemoteCache) -> tuple[str | None, int]:
        """Return a digest of names, sizes and times, and the images' total size."""
        return self.version(), sum(size for _, size, _ in self._status(self.paths))

    def version(self) -> str:
        """Return a digest of the names, sizes and times of images and sidecars."""
        beside = [str(Path(path).with_suffix(f".{extension}")) for extension in self.keep for path in self.paths]
        return _digest(f"{path}\0{size} {changed}\n" for path, size, changed in self._status([*self.paths, *beside]))

    def open(self, remote: RemoteCache) -> "FolderImages":
        """List the images; each is opened when it is read."""
        version, size = self.look(remote)
        digest = _digest(f"{path}\0{size}\n" for path, size, _ in self._status(self.paths))
        return FolderImages(self, version, size, digest)

    def _status(self, paths: Sequence[str]) -> Iterator[tuple[str, int, int]]:
        """Yield path, size and modification time of each file; zeros if it cannot be read, which is reported later."""
        for path in paths:
            try:
                status = os.stat(self.root / path)
                yield path, status.st_size, status.st_mtime_ns
            except OSError:
                yield path, 0, 0


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode())
    return digest.hexdigest()


class FolderImages:
    """The images of a part of a folder."""

    descriptor: int | None = None

    def __init__(self, part: FolderPart, version: str | None, size: int, digest: str) -> None:
        self.name, self.version, self.size, self.digest = part.name, version, size, digest
        self.number, self.samples, self.unused = next(_numbers), len(part.paths), dict(part.unused)
        self._part = part

    def key(self, ordinal: int) -> str:
        """Return the path of an image relative to the folder."""
        return self._part.paths[ordinal]

    def location(self, ordinal: int) -> Location:
        """Return the path of an image."""
        return str(self._part.root / self._part.paths[ordinal])

    def sidecar(self, ordinal: int, extension: str) -> bytes | None:
        """Return the file of the same name with this extension; None if there is none."""
        path = Path(str(self.location(ordinal))).with_suffix(f".{extension}")
        return read_file(str(path)) if path.is_file() else None

    def changed(self) -> str | None:
        """Return a message if names, sizes or times have changed, else None."""
        if self._part.version() == self.version:
            return None
        return f"{self._part.where}: changed while it was embedded; run the command again"

    def close(self) -> None:
        """Nothing is open."""


Part = TarPart | FolderPart
Images = TarImages | FolderImages


def find_inputs(
    specs: Sequence[str],
    keep: tuple[str, ...] = (),
    *,
    image: str | None = None,
    on_note: Callable[[str], None] = lambda text: None,
) -> list[Part]:
    """Return the parts that the input specs name, sorted by name.

    Args:
        specs: directories, tar files, globs, brace patterns and URLs, or one directory of images.
        keep: extensions of the sidecars to store.
        image: which member of a sample of a shard is its image.
        on_note: called for each format of images in a folder that is not decoded.

    Raises:
        InputError: nothing found (says what exists), or other inputs beside a folder of images.
    """
    folders = {spec: found for spec in specs if os.path.isdir(spec) and (found := look_into(Path(spec))).images}
    for spec, found in folders.items():
        found.refuse_mixture(Path(spec))
    if not folders:
        return [TarPart(shard, image) for shard in find_shards(specs)]
    if len(specs) > 1:
        raise InputError(f"{next(iter(folders))} is a folder of images: give it alone, or `maekit pack` it into shards")
    for text in undecoded_notes(folders[specs[0]]):
        on_note(text)
    return _folder_parts(Path(specs[0]), folders[specs[0]], keep)


def _folder_parts(folder: Path, contents: FolderContents, keep: tuple[str, ...]) -> list[Part]:
    paths = [path.relative_to(folder).as_posix() for path in contents.images]
    for path in paths:
        files.require_utf8(Path(path))
    kept = {str(Path(path).with_suffix(f".{extension}")) for path in paths for extension in keep}
    unused = Counter(kind for path, kind in contents.others.items() if path.relative_to(folder).as_posix() not in kept)
    root = Path(os.path.abspath(folder))
    return [
        FolderPart(
            f"images-{start // IMAGES_PER_PART:05d}",
            root,
            tuple(paths[start : start + IMAGES_PER_PART]),
            keep,
            {} if start else dict(unused),
        )
        for start in range(0, len(paths), IMAGES_PER_PART)
    ]


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


@dataclass(frozen=True)
class PlannedPart:
    """A part to embed, as it was when the run began.

    Attributes:
        part: the part.
        version: its version; None if unknown.
        size: its size in bytes; 0 if unknown.
        scope: which of its samples to embed.
        is_retried: whether to embed it although it is committed and unchanged.
    """

    part: Part
    version: str | None
    size: int
    scope: Scope
    is_retried: bool = False

    @property
    def name(self) -> str:
        """Name of the part."""
        return self.part.name

    def has_version(self, version: str | None) -> bool:
        """Whether a recorded version proves that the part is unchanged."""
        return bool(self.version) and self.version == version


@dataclass
class OpenPart:
    """An open part, ready to be embedded.

    Attributes:
        planned: the part.
        images: its images.
        ordinals: ordinals of the samples to embed.
        resources: closes the images and releases the part's lock.
    """

    planned: PlannedPart
    images: Images
    ordinals: Sequence[int]
    resources: contextlib.ExitStack


def content_of(
    images: Images,
    ordinals: Sequence[int],
    keep: Sequence[str],
    stopped: Callable[[], object] = lambda: None,
    *,
    without: Container[int] = (),
) -> int:
    """Return the CRC-32 over the CRC-32s of all images, followed by those of all stored sidecars.

    Args:
        images: the images.
        ordinals: which of them.
        keep: extensions of the stored sidecars.
        stopped: returns whether to stop.
        without: ordinals of images that count as unreadable.

    Raises:
        MaekitError: a shard cannot be read, or `stopped` returned true.
    """
    crcs = np.zeros((1 + len(keep), len(ordinals)), "<u4")
    for position, ordinal in enumerate(ordinals):
        if stopped():
            raise MaekitError("stopped while reading")
        with contextlib.suppress(ImageError):  # stays 0, as in the commit record
            if ordinal not in without:
                crcs[0, position] = zlib.crc32(read_image(images.descriptor, images.name, images.location(ordinal)))
        for row, extension in enumerate(keep, 1):
            crcs[row, position] = sidecar_crc(images, ordinal, extension)
    return zlib.crc32(crcs.tobytes())


def sidecar_crc(images: Images, ordinal: int, extension: str) -> int:
    """Return the CRC-32 of a sidecar; 0 if there is none or it cannot be read."""
    try:
        return zlib.crc32(images.sidecar(ordinal, extension) or b"")
    except ImageError:
        return 0


def read_image(descriptor: int | None, name: str, location: Location) -> bytes:
    """Return the bytes of an image.

    Args:
        descriptor: descriptor of the open shard; None if the location is a path.
        name: name of the shard, for messages.
        location: where the image lies.

    Raises:
        ImageError: it is too large, cannot be read, or does not match the index.
        MaekitError: the shard cannot be read.
    """
    if isinstance(location, str):
        return read_file(location)
    assert descriptor is not None
    return read_bytes(descriptor, name, *location)
