"""In-memory cache of decoded images for small sets (`--cache ram`), filled once before the workers fork.

The pixels are never modified, so forked workers share the same memory pages; nothing outlives the processes.
"""

import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from maekit.images import Pixels, decode
from maekit.shards.read import ShardSet
from maekit.system.errors import ImageError, InputError
from maekit.system.files import describe_bytes
from maekit.system.machine import available_memory, cores
from maekit.system.parallel import map_in_threads

_UNIT = 64  # images that a thread decodes at a time and stores as one array


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
        # By number of the sample: (height, width), and the start of its pixels within its unit; -1 without an image.
        self._sizes = np.zeros((shards.samples, 2), np.int32)
        self._starts = np.full(shards.samples, -1, np.int64)
        self._units: list[NDArray[np.uint8]] = []
        firsts = range(0, shards.samples, _UNIT)
        for pixels in map_in_threads(self._decode, firsts, threads=max(1, cores() // sharing)):
            self._units.append(pixels)
            on_images(min(len(self._units) * _UNIT, shards.samples))
        self.bytes = sum(pixels.nbytes for pixels in self._units)

    def image(self, shard: int, ordinal: int) -> Pixels | None:
        """Return an image, uint8 `[H, W, 3]`, read-only by convention; None if the sample has no readable image."""
        number = self._shards.number(shard, ordinal)
        start, (height, width) = int(self._starts[number]), self._sizes[number].tolist()
        if start < 0:
            return None
        return self._units[number // _UNIT][start : start + height * width * 3].reshape(height, width, 3)

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

    def _decode(self, first: int) -> NDArray[np.uint8]:
        """Decode the images of one unit; return their pixels, concatenated."""
        images: list[Pixels] = [np.empty(0, np.uint8)]
        end = 0
        numbers = range(first, min(first + _UNIT, self._shards.samples))
        for number, pixels in zip(numbers, self._shards.images(numbers, decode), strict=True):
            if isinstance(pixels, ImageError):
                continue  # reported and replaced when training reads it
            self._take(pixels.nbytes)
            self._starts[number], self._sizes[number] = end, pixels.shape[:2]
            end += pixels.size
            images.append(pixels.reshape(-1))
        return np.concatenate(images)
