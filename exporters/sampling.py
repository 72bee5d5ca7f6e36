"""Images out of shards for measuring and fitting: evenly spread, prepared for the model, in batches."""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from maekit.images import Pixels, Preprocess
from maekit.shards.read import MemberReader, open_shards
from maekit.shards.spec import find_shards
from maekit.system.errors import ImageError, InputError
from maekit.system.machine import cores

_SPARE = 3  # places looked at for each image wanted, at most: some may hold none
_BATCH = 32


class Sample:
    """Readable images spread over the shards, the same ones each time.

    Args:
        specs: input specs: directories, tars, globs, brace patterns.
        preprocess: prepares them.
        count: how many; all there are where there are fewer.

    Attributes:
        digest: of the pixels given so far.

    Raises:
        InputError: no shards there.
    """

    def __init__(self, specs: Iterable[str], preprocess: Preprocess, count: int) -> None:
        self._specs = tuple(specs)
        self._shards = open_shards(find_shards(self._specs), skip_damaged=True)
        self._preprocess, self._count = preprocess, min(count, self._shards.samples)
        self.digest = hashlib.sha256()

    def __len__(self) -> int:
        """How many images there are at most."""
        return self._count

    def __iter__(self) -> Iterator[Pixels]:
        """Yield batches, uint8 `[n, H, W, 3]`.

        Raises:
            InputError: there is no readable image.
        """
        found, problem = 0, ""
        pending: list[Pixels] = []
        with ThreadPoolExecutor(cores()) as pool:
            for place in self._prepared(pool):
                if isinstance(place, str):
                    problem = place
                    continue
                pending.append(place)
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

    def _prepared(self, pool: ThreadPoolExecutor) -> Iterator[Pixels | str]:
        """Yield the image of each place in turn, or why there is none; decoded some ahead, by several threads."""
        reader = self._shards.reader()
        total = self._shards.samples
        places = np.unique(np.linspace(0, total - 1, min(total, _SPARE * self._count)).astype(int))
        # 0, 3, 6, …, 1, 4, 7, …: the first third is spread over the whole.
        order = np.concatenate([places[start::_SPARE] for start in range(_SPARE)])
        try:
            for first in range(0, len(order), _BATCH):
                data = [self._read(reader, int(number)) for number in order[first : first + _BATCH]]
                yield from pool.map(self._prepare, data)
        finally:
            reader.close()

    def _read(self, reader: MemberReader, number: int) -> bytes | str:
        shard, ordinal = self._shards.locate(number)
        try:
            return reader.read_image(self._shards.index(shard), ordinal)
        except ImageError as error:
            return str(error)

    def _prepare(self, data: bytes | str) -> Pixels | str:
        if isinstance(data, str):
            return data
        try:
            return self._preprocess(data)
        except ImageError as error:
            return str(error)


def sample_images(specs: Iterable[str], preprocess: Preprocess, count: int) -> Pixels:
    """Return up to `count` readable images spread over the shards: uint8 `[n, H, W, 3]`.

    Raises:
        InputError: no shards there, or no readable image in them.
    """
    return np.concatenate(list(Sample(specs, preprocess, count)))
