"""In-memory cache of decoded images for small sets (`--cache ram`), filled once before the workers fork.

The pixels are never modified, so forked workers share the same memory pages; nothing outlives the processes.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maekit.images import Pixels, decode
from maekit.shards.read import ShardSet
from maekit.system.errors import ImageError, InputError
from maekit.system.files import describe_bytes
from maekit.system.machine import available_memory, cores
from maekit.system.parallel import map_in_threads

_UNIT = 64  # images decoded by a thread at a time


@dataclass(frozen=True)
class _Unit:
    shard: int
    first: int
    last: int


@dataclass(frozen=True)
class _Decoded:
    pixels: NDArray[np.uint8]  # all images, concatenated
    starts: NDArray[np.int64]  # `[n]`; -1 where there is no image
    sizes: NDArray[np.int32]  # (height, width), `[n, 2]`


class DecodedSet:
    """All images of a set at their full size.

    Args:
        shards: the set; remote shards are fetched.
        sharing: number of processes on this machine that each keep their own copy of the set.
        room: bytes that may be used; None means this process's share of half of the free memory.
        on_images: called with the number of images done.

    Raises:
        InputError: the set does not fit.
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        sharing: int = 1,
        room: int | None = None,
        on_images: Callable[[int], None] = lambda done: None,
    ) -> None:
        self._shards = shards
        self._room = available_memory() // 2 // sharing if room is None else room
        self._taken, self._begun, self._lock = 0, 0, threading.Lock()
        self._units: dict[tuple[int, int], _Decoded] = {}
        self.bytes, done = 0, 0
        units = [
            _Unit(shard, first, min(first + _UNIT, int(count)))
            for shard, count in enumerate(shards.counts)
            for first in range(0, int(count), _UNIT)
        ]
        threads = max(1, cores() // sharing)
        for unit, decoded in zip(units, map_in_threads(self._decode, units, threads=threads), strict=True):
            self._units[unit.shard, unit.first // _UNIT] = decoded
            self.bytes += decoded.pixels.nbytes
            done += unit.last - unit.first
            on_images(done)

    def image(self, shard: int, ordinal: int) -> Pixels | None:
        """Return an image, uint8 `[H, W, 3]`, read-only by convention; None if the sample has no readable image."""
        decoded = self._units[shard, ordinal // _UNIT]
        start = int(decoded.starts[ordinal % _UNIT])
        if start < 0:
            return None
        height, width = decoded.sizes[ordinal % _UNIT].tolist()
        return decoded.pixels[start : start + height * width * 3].reshape(height, width, 3)

    def _take(self, count: int) -> None:
        """Account for bytes before they are stored, so that the threads together do not exceed the limit."""
        with self._lock:
            self._taken += count
            self._begun += 1
            if self._taken > self._room:
                raise InputError(
                    f"`cache` = ram: the {self._shards.samples} images take about "
                    f"{describe_bytes(self._taken / self._begun * self._shards.samples)} decoded, and "
                    f"{describe_bytes(self._room)} of memory may be used; leave `cache=ram` out"
                )

    def _decode(self, unit: _Unit) -> _Decoded:
        images: list[Pixels] = []
        count = unit.last - unit.first
        starts, sizes = np.full(count, -1, np.int64), np.zeros((count, 2), np.int32)
        end = 0
        first = self._shards.number(unit.shard, unit.first)
        for number, pixels in enumerate(self._shards.images(range(first, first + count), decode)):
            if isinstance(pixels, ImageError):
                continue  # reported and replaced when training reads it
            self._take(pixels.nbytes)
            starts[number], sizes[number] = end, pixels.shape[:2]
            end += pixels.size
            images.append(pixels.reshape(-1))
        return _Decoded(np.concatenate(images) if images else np.empty(0, np.uint8), starts, sizes)
