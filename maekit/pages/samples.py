"""Embeds samples of a set of shards, and makes thumbnails of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from maekit.images import Pixels
from maekit.pages.thumbnails import thumbnail, without
from maekit.pretrained.load import TrainedEncoder
from maekit.pretrained.torch_embedder import reference_embeddings
from maekit.shards.read import ShardSet
from maekit.system.errors import ImageError, InputError
from maekit.system.progress import Progress
from maekit.vectors.nearest import nearest, unit
from maekit.vectors.whitening import fit_whitening

_THUMBNAIL = 96  # pixels, the longer side
_BATCH = 32
# A whitening with as many directions as images would make all images equally dissimilar.
_IMAGES_PER_DIRECTION = 10
_LONGEST_LABEL = 60


@dataclass(frozen=True)
class Samples:
    """Samples, in the order of their shards.

    Attributes:
        names: SHARD:KEY of each.
        thumbnails: uint8 `[h, w, 3]` each.
        labels: class of each by its `cls` member, as a name if `classes.txt` lies beside the shard; None without a
            class.
        vectors: float32 `[n, d]`, of unit length.
        whitened: number of directions that the whitening kept; None if no whitening could be fitted.
    """

    names: list[str]
    thumbnails: list[Pixels]
    labels: list[str | None]
    vectors: NDArray[np.float32]
    whitened: int | None


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
    names: list[str] = []
    labels: list[str | None] = []
    thumbnails: list[Pixels] = []
    rows: list[NDArray[np.float32]] = []
    batch: list[Pixels] = []
    numbers = shards.spread(count)
    unreadable = 0
    progress.start("embed", len(numbers))
    try:
        read = zip(numbers, shards.images(numbers, trained.preprocess), shards.labels(numbers), strict=True)
        for done, (number, pixels, label) in enumerate(read, 1):
            if isinstance(pixels, ImageError):
                unreadable += 1
                continue
            names.append(":".join(shards.name(number)))
            labels.append(_class_of(shards, number, label))
            thumbnails.append(thumbnail(pixels, _THUMBNAIL))
            batch.append(pixels)
            if len(batch) == _BATCH:
                rows.append(reference_embeddings(trained, np.stack(batch), normalize=False))
                batch = []
            progress.advance(done)
        if batch:
            rows.append(reference_embeddings(trained, np.stack(batch), normalize=False))
    finally:
        progress.stop()
    if unreadable:
        progress.note(f"{unreadable} of {len(numbers)} samples hold no readable image")
    if len(names) < 2:
        raise InputError(f"{len(names)} of {len(numbers)} samples hold a readable image; two are needed")
    vectors = np.concatenate(rows)
    if not np.isfinite(vectors).all():
        raise InputError("the model gives values that are not finite")
    return Samples(names, thumbnails, labels, *_whiten(vectors))


def _whiten(vectors: NDArray[np.float32]) -> tuple[NDArray[np.float32], int | None]:
    """Return the whitened vectors, of unit length, and the number of directions kept."""
    dim = max(2, min(len(vectors) // _IMAGES_PER_DIRECTION, vectors.shape[1]))
    try:
        whitening = fit_whitening([vectors], dim, sha256())
    except InputError:  # they hardly differ
        return unit(vectors), None
    return unit(vectors @ whitening.matrix.T + whitening.bias), whitening.dim


def _class_of(shards: ShardSet, number: int, label: str) -> str | None:
    """Return the class of a label, as a name if `maekit pack` wrote names beside the shard."""
    names = shards.class_names(shards.locate(number)[0])
    is_known = label.isascii() and label.isdigit() and int(label) < len(names)
    return (names[int(label)] if is_known else label)[:_LONGEST_LABEL] or None


def neighbours_within(vectors: NDArray[np.float32], queries: Sequence[int], k: int) -> list[list[tuple[int, float]]]:
    """Return (number, cosine) of the k nearest neighbours of each query, without the query itself."""
    cosines, numbers = nearest(vectors[list(queries)], [vectors], k + 1)
    return [without(query, n, c, k) for query, n, c in zip(queries, numbers, cosines, strict=True)]
