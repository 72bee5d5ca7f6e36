"""The order of samples as a pure function of (seed, epoch, index digest).

In each epoch the shards are permuted, then the samples within each window of consecutive shards, so that reads touch
only a few files at a time. A global batch is a slice of the endless sequence of epochs; ranks and workers only divide
it. Memory: the shard list, and one permutation per window in use (two while a batch crosses a window boundary).
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maekit.config import WINDOW_SHARDS
from maekit.system.draws import Purpose, permutation


@dataclass(frozen=True, slots=True)
class SampleSlice:
    """Consecutive samples of the order, one entry per sample.

    Attributes:
        epochs: epoch, int64 `[n]`.
        positions: position within the epoch, int64 `[n]`; with `epochs` it keys all random numbers of the sample.
        shards: number of the shard, int64 `[n]`.
        ordinals: number of the sample within the shard, int64 `[n]`.
    """

    epochs: NDArray[np.int64]
    positions: NDArray[np.int64]
    shards: NDArray[np.int64]
    ordinals: NDArray[np.int64]


class SampleOrder:
    """The shuffled order of all samples, epoch after epoch, readable from any position.

    Args:
        counts: samples in each shard, int64 `[shards]`.
        seed: the run's seed.
        digest: the digest of the shard set, hexadecimal.
        window: number of shards whose samples are shuffled together.
    """

    def __init__(self, counts: NDArray[np.int64], *, seed: int, digest: str, window: int = WINDOW_SHARDS) -> None:
        self.samples = int(counts.sum())
        self._counts, self._seed, self._salt, self._window = counts, seed, int(digest[:16], 16), window
        self._epochs: OrderedDict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = OrderedDict()
        self._permutations: OrderedDict[tuple[int, int], NDArray[np.int64]] = OrderedDict()

    def slice(self, start: int, stop: int) -> SampleSlice:
        """Return the positions [start, stop) of the endless sequence of epochs; position 0 begins epoch 0."""
        parts = []
        while start < stop:
            epoch, position = divmod(start, self.samples)
            count = min(stop - start, self.samples - position)
            parts.append(self._within_epoch(epoch, position, position + count))
            start += count
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        return SampleSlice(*columns)

    def window_number(self, start: int) -> int:
        """Return the number of the window that contains a position of the endless sequence; window 0 begins epoch 0."""
        epoch, position = divmod(start, self.samples)
        starts = self._epoch(epoch)[1]
        return epoch * (len(starts) - 1) + int(np.searchsorted(starts, position, "right")) - 1

    def windows(self, start: int) -> Iterator[list[int]]:
        """Yield the shards of the window that contains a position, then those of each later window, without end."""
        per_epoch = -(-len(self._counts) // self._window)
        for number in itertools.count(self.window_number(start)):
            epoch, window = divmod(number, per_epoch)
            shard_order = self._shard_order(epoch)
            yield shard_order[window * self._window : (window + 1) * self._window].tolist()

    def _shard_order(self, epoch: int) -> NDArray[np.int64]:
        return permutation(len(self._counts), Purpose.SHARD_ORDER, seed=self._seed, salt=self._salt, epoch=epoch)

    def _within_epoch(self, epoch: int, start: int, stop: int) -> tuple[NDArray[np.int64], ...]:
        shard_order, window_starts = self._epoch(epoch)
        shards, ordinals = [], []
        window = int(np.searchsorted(window_starts, start, "right")) - 1
        at = start
        while at < stop:
            first = int(window_starts[window])
            last = int(window_starts[window + 1])
            shuffled = self._permutation(epoch, window, last - first)
            taken = shuffled[at - first : min(stop, last) - first]
            in_window = shard_order[window * self._window : (window + 1) * self._window]
            ends = np.cumsum(self._counts[in_window])
            which = np.searchsorted(ends, taken, "right")
            shards.append(in_window[which])
            ordinals.append(taken - (ends - self._counts[in_window])[which])
            at = min(stop, last)
            window += 1
        positions = np.arange(start, stop, dtype=np.int64)
        return np.full(stop - start, epoch, np.int64), positions, np.concatenate(shards), np.concatenate(ordinals)

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the permuted shards, and the position where each window starts (plus the end of the last one)."""
        if epoch not in self._epochs:
            shard_order = self._shard_order(epoch)
            ends = np.cumsum(self._counts[shard_order])
            window_starts = np.concatenate([[0], ends[self._window - 1 : -1 : self._window], ends[-1:]])
            self._epochs[epoch] = shard_order, window_starts
            while len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _permutation(self, epoch: int, window: int, count: int) -> NDArray[np.int64]:
        key = (epoch, window)
        if key not in self._permutations:
            self._permutations[key] = permutation(
                count, Purpose.SAMPLE_ORDER, seed=self._seed, salt=self._salt, epoch=epoch, position=window
            )
            while len(self._permutations) > 2:
                self._permutations.popitem(last=False)
        return self._permutations[key]
