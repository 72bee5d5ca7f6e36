"""Embeds samples of a set of shards, and makes thumbnails of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maekit.images import Pixels
from maekit.pages.thumbnails import nearest_others, thumbnail
from maekit.pretrained.load import TrainedEncoder
from maekit.pretrained.torch_embedder import reference_embeddings
from maekit.shards.read import ShardSet
from maekit.system.errors import ImageError, InputError
from maekit.system.parallel import batched
from maekit.system.progress import Progress
from maekit.vectors.whitening import whiten_sample

_THUMBNAIL = 96  # pixels, the longer side
_BATCH = 32
_LONGEST_LABEL = 60


@dataclass(frozen=True)
class Picture:
    """What a page shows of a sample.

    Attributes:
        name: SHARD:KEY.
        label: its class by its `cls` member, as a name if `classes.txt` lies beside the shard; None without a class.
        thumbnail: uint8 `[h, w, 3]`.
    """

    name: str
    label: str | None
    thumbnail: Pixels

    @property
    def caption(self) -> str:
        """Name and class."""
        return self.name if self.label is None else f"{self.name}, {self.label}"


@dataclass(frozen=True)
class Samples:
    """Samples, in the order of their shards.

    Attributes:
        pictures: what to show of each.
        vectors: float32 `[n, d]`, of unit length.
        whitened: number of directions that the whitening kept; None if no whitening could be fitted.
    """

    pictures: list[Picture]
    vectors: NDArray[np.float32]
    whitened: int | None

    def neighbours(self, queries: Sequence[int], k: int) -> list[list[tuple[Picture, float]]]:
        """Return the k nearest neighbours of each query and their cosines, without the query itself."""
        found = nearest_others(self.vectors[list(queries)], queries, [self.vectors], k)
        return [[(self.pictures[number], cosine) for number, cosine in near] for near in found]


def embed_samples(trained: TrainedEncoder, shards: ShardSet, count: int, progress: Progress) -> Samples:
    """Embed samples spread evenly over the shards: mean of the patch tokens, whitening fitted on the same samples.

    Args:
        trained: the encoder, on the device it should run on.
        shards: the shards to sample from.
        count: maximum number of samples.
        progress: receives progress updates, and the number of unreadable samples.

    Raises:
        InputError: fewer than two samples hold a readable image.
        MaekitError: a shard can no longer be read.
    """
    pictures: list[Picture] = []
    rows: list[NDArray[np.float32]] = []
    numbers = shards.spread(count)
    read = zip(numbers, shards.images(numbers, trained.preprocess), shards.labels(numbers), strict=True)
    readable = ((number, image, label) for number, image, label in read if not isinstance(image, ImageError))
    progress.start("embed", len(numbers))
    try:
        for batch in batched(readable, _BATCH):
            rows.append(reference_embeddings(trained, np.stack([image for _, image, _ in batch]), normalize=False))
            for number, image, label in batch:
                name, in_words = ":".join(shards.name(number)), shards.in_words(number, label)[:_LONGEST_LABEL] or None
                pictures.append(Picture(name, in_words, thumbnail(image, _THUMBNAIL)))
            progress.advance(len(pictures))
    finally:
        progress.stop()
    if len(pictures) < len(numbers):
        progress.note(f"{len(numbers) - len(pictures)} of {len(numbers)} samples hold no readable image")
    if len(pictures) < 2:
        raise InputError(f"{len(pictures)} of {len(numbers)} samples hold a readable image; two are needed")
    vectors = np.concatenate(rows)
    if not np.isfinite(vectors).all():
        raise InputError("the model gives values that are not finite")
    return Samples(pictures, *whiten_sample(vectors))
