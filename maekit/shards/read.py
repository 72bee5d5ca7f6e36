"""Reading samples by position: the set of shards, and positional reads of their members."""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maekit.errors import DamagedShard, ImageError, InputError, MaekitError
from maekit.shards.index import MemberSpan, ShardIndex, load_index
from maekit.shards.spec import ShardFile

# A member larger than this is no image that anybody trains on; it would only fill the memory.
MAX_MEMBER_BYTES = 256 << 20


class ShardSet:
    """Many shards as one sequence of samples.

    Attributes:
        shards: the shards, sorted by name.
        indexes: the index of each.
        counts: samples in each, int64 `[shards]`.
        samples: samples in all.
        digest: SHA-256 over the names and digests of all shards, hexadecimal: it names the data, wherever it lies.
    """

    def __init__(self, shards: Sequence[ShardFile], indexes: Sequence[ShardIndex]) -> None:
        self.shards = tuple(shards)
        self.indexes = tuple(indexes)
        self.counts: NDArray[np.int64] = np.array([index.samples for index in indexes], np.int64)
        self.samples = int(self.counts.sum())
        digest = hashlib.sha256()
        for shard, index in zip(shards, indexes, strict=True):
            digest.update(f"{shard.name}\0{index.digest}\n".encode())
        self.digest = digest.hexdigest()
        self._ends = self.counts.cumsum()

    def locate(self, number: int) -> tuple[int, int]:
        """Return (shard, ordinal) of a sample by its number in the whole sequence."""
        shard = int(np.searchsorted(self._ends, number, "right"))
        return shard, int(number - (self._ends[shard] - self.counts[shard]))


def open_shards(
    shards: Sequence[ShardFile],
    *,
    skip_damaged: bool = False,
    on_shard: Callable[[ShardFile], None] = lambda shard: None,
    on_damage: Callable[[DamagedShard], None] = lambda damage: None,
) -> ShardSet:
    """Index all shards, from the cache where it is current.

    Args:
        shards: the shard files, as `find_shards` returns them.
        skip_damaged: leave damaged shards out (each is still passed to `on_damage`).
        on_shard: called after each shard, for progress.
        on_damage: called for each damaged shard.

    Raises:
        InputError: shards are damaged and not skipped, or no sample is left.
    """
    good: list[ShardFile] = []
    indexes: list[ShardIndex] = []
    damaged: list[DamagedShard] = []
    for shard in shards:
        try:
            indexes.append(load_index(shard.path))
            good.append(shard)
        except DamagedShard as damage:
            damaged.append(damage)
            on_damage(damage)
        except MaekitError as error:
            raise InputError(str(error)) from error
        on_shard(shard)
    if damaged and not skip_damaged:
        named = "; ".join(str(d) for d in damaged[:3]) + ("; …" if len(damaged) > 3 else "")
        raise InputError(f"{len(damaged)} of {len(shards)} shards damaged: {named} (--skip-damaged leaves them out)")
    shard_set = ShardSet(good, indexes)
    if not shard_set.samples:
        raise InputError(f"the {len(shards)} shards hold no sample at all")
    return shard_set


class MemberReader:
    """Reads members of shards by offset, keeping a few files open. One per thread or process.

    Args:
        max_open: how many shards stay open at once.
    """

    def __init__(self, max_open: int = 64) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._max_open = max_open

    def read(self, index: ShardIndex, member: MemberSpan) -> bytes:
        """Return the bytes of one member.

        Raises:
            ImageError: the member is larger than 256 MiB.
            MaekitError: the shard cannot be read, or is no longer the file that was indexed.
        """
        descriptor = self._descriptor(index)
        if member.size > MAX_MEMBER_BYTES:
            raise ImageError("too_large", f"a member of {member.size} bytes (at most {MAX_MEMBER_BYTES} are read)")
        try:
            data = os.pread(descriptor, member.size, member.offset)
            while len(data) < member.size:  # network file systems may return less than was asked for
                more = os.pread(descriptor, member.size - len(data), member.offset + len(data))
                if not more:
                    raise MaekitError(f"{index.path}: shorter than when it was indexed")
                data += more
        except OSError as error:
            raise MaekitError(f"cannot read {index.path}: {error.strerror or error}") from error
        return data

    def read_image(self, index: ShardIndex, ordinal: int) -> bytes:
        """Return the bytes of a sample's image.

        Raises:
            ImageError: the sample holds no image, or one of more than 256 MiB.
            MaekitError: as `read`.
        """
        member = index.image(ordinal)
        if member is None:
            raise ImageError("no_image", "no member with an image extension")
        return self.read(index, member)

    def _descriptor(self, index: ShardIndex) -> int:
        descriptor = self._open.get(index.path)
        if descriptor is not None:
            self._open.move_to_end(index.path)
            return descriptor
        try:
            descriptor = os.open(index.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise MaekitError(f"cannot read {index.path}: {error.strerror or error}") from error
        if not index.matches(os.fstat(descriptor)):
            os.close(descriptor)
            raise MaekitError(f"{index.path}: changed since it was indexed; run the command again")
        self._open[index.path] = descriptor
        if len(self._open) > self._max_open:
            os.close(self._open.popitem(last=False)[1])
        return descriptor

    def close(self) -> None:
        """Close all files."""
        while self._open:
            os.close(self._open.popitem()[1])
