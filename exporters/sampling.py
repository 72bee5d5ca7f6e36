"""Batches of preprocessed images, spread evenly over the shards, for parity checks, calibration and whitening."""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from maekit.images import Pixels, Preprocess
from maekit.shards.read import open_shards
from maekit.shards.spec import find_shards
from maekit.system.errors import ImageError, InputError
from maekit.system.machine import cores
from maekit.system.parallel import batched

_SPARE = 3  # samples tried per wanted image, at most: some hold no readable image
_BATCH = 32


class Sample:
    """Readable images spread over the shards; each iteration yields the same ones.

    Args:
        specs: input specs: directories, tars, globs, brace patterns.
        preprocess: preprocessing applied to each image.
        count: number of images; all of them if the shards hold fewer.
        image: which member of a sample is its image.

    Attributes:
        digest: SHA-256 of the pixels yielded so far.

    Raises:
        InputError: no shards there.
    """

    def __init__(self, specs: Iterable[str], preprocess: Preprocess, count: int, *, image: str | None = None) -> None:
        self._specs = tuple(specs)
        self._shards = open_shards(find_shards(self._specs), image=image, skip_damaged=True)
        self._preprocess, self._count = preprocess, min(count, self._shards.samples)
        self.digest = hashlib.sha256()

    def refuse_ambiguous(self) -> None:
        """Check that each sample has one image, or that it was chosen.

        Raises:
            InputError: names a sample with several images, and the ways to choose.
        """
        self._shards.refuse_ambiguous()

    def __len__(self) -> int:
        """Return the maximum number of images."""
        return self._count

    def __iter__(self) -> Iterator[Pixels]:
        """Yield batches, uint8 `[n, H, W, 3]`.

        Raises:
            InputError: there is no readable image.
        """
        found, problem = False, "it is empty"

        def readable() -> Iterator[Pixels]:
            nonlocal found, problem
            for image in self._shards.images(self._numbers(), self._preprocess, threads=cores()):
                if isinstance(image, ImageError):
                    problem = str(image)
                else:
                    found = True
                    yield image

        for images in batched(islice(readable(), self._count), _BATCH):
            batch = np.stack(images)
            self.digest.update(batch.tobytes())
            yield batch
        if not found:
            raise InputError(f"no readable image in {', '.join(self._specs)}: {problem}")

    def _numbers(self) -> list[int]:
        """Return sample numbers; the first third already spans all shards: 0, 3, 6, …, 1, 4, 7, …"""
        total = self._shards.samples
        numbers = np.unique(np.linspace(0, total - 1, min(total, _SPARE * self._count)).astype(int)).tolist()
        return [number for start in range(_SPARE) for number in numbers[start::_SPARE]]


def sample_images(specs: Iterable[str], preprocess: Preprocess, count: int, *, image: str | None = None) -> Pixels:
    """Return up to `count` readable images spread over the shards: uint8 `[n, H, W, 3]`.

    Raises:
        InputError: no shards there, or no readable image in them.
    """
    return np.concatenate(list(Sample(specs, preprocess, count, image=image)))
