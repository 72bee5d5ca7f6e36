"""Batches of preprocessed images, spread evenly over the shards, for parity checks, calibration and whitening."""

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np

from maekit.images import Pixels, Preprocess
from maekit.shards.read import open_shards
from maekit.shards.spec import find_shards
from maekit.system.errors import ImageError, InputError
from maekit.system.machine import cores

_SPARE = 3  # positions tried per wanted image, at most: some hold no readable image
_BATCH = 32


class Sample:
    """Readable images spread over the shards; each iteration yields the same ones.

    Args:
        specs: input specs: directories, tars, globs, brace patterns.
        preprocess: preprocessing applied to each image.
        count: number of images; all of them if the shards hold fewer.

    Attributes:
        digest: SHA-256 of the pixels yielded so far.

    Raises:
        InputError: no shards there.
    """

    def __init__(self, specs: Iterable[str], preprocess: Preprocess, count: int) -> None:
        self._specs = tuple(specs)
        self._shards = open_shards(find_shards(self._specs), skip_damaged=True)
        self._preprocess, self._count = preprocess, min(count, self._shards.samples)
        self.digest = hashlib.sha256()

    def __len__(self) -> int:
        """Return the maximum number of images."""
        return self._count

    def __iter__(self) -> Iterator[Pixels]:
        """Yield batches, uint8 `[n, H, W, 3]`.

        Raises:
            InputError: there is no readable image.
        """
        found, problem = 0, ""
        pending: list[Pixels] = []
        for image in self._shards.images(self._places(), self._preprocess, threads=cores()):
            if isinstance(image, ImageError):
                problem = str(image)
                continue
            pending.append(image)
            found += 1
            if len(pending) == _BATCH or found == self._count:
                yield self._digested(pending)
                pending = []
            if found == self._count:
                return
        if pending:
            yield self._digested(pending)
        if not found:
            raise InputError(f"no readable image in {', '.join(self._specs)}: {problem or 'it is empty'}")

    def _digested(self, images: list[Pixels]) -> Pixels:
        batch = np.stack(images)
        self.digest.update(batch.tobytes())
        return batch

    def _places(self) -> list[int]:
        """Return sample numbers; the first third already spans all shards: 0, 3, 6, …, 1, 4, 7, …"""
        total = self._shards.samples
        places = np.unique(np.linspace(0, total - 1, min(total, _SPARE * self._count)).astype(int))
        return [int(place) for start in range(_SPARE) for place in places[start::_SPARE]]


def sample_images(specs: Iterable[str], preprocess: Preprocess, count: int) -> Pixels:
    """Return up to `count` readable images spread over the shards: uint8 `[n, H, W, 3]`.

    Raises:
        InputError: no shards there, or no readable image in them.
    """
    return np.concatenate(list(Sample(specs, preprocess, count)))
