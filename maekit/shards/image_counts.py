"""What becomes of the images of a whole shard by a choice (image_choice.py)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from maekit.shards.image_choice import FIRST, IMAGE, NONE, may_be_image, ranks


class ImageCounts(NamedTuple):
    """What becomes of the images of a shard.

    Attributes:
        without: samples without an image.
        several: samples of which it is open which of several images is meant.
        changed: samples whose image is another one than by the choice `first`.
        unused: number of members that are images, or may be, and are not the image of their sample, by extension; and
            of members that belong to no sample.
    """

    without: int
    several: int
    changed: int
    unused: dict[str, int]


def count_images(
    extensions: Sequence[str],
    kinds: NDArray[Any],
    sample_start: NDArray[np.int64],
    bad: Sequence[int],
    image: str | None,
) -> ImageCounts:
    """Return what becomes of the images of a whole shard.

    Args:
        extensions: in lower case.
        kinds: of each member, the number of its extension, integer `[M]`.
        sample_start: the first member of each sample, and the number of members, int64 `[S+1]`.
        bad: samples that must not be read.
        image: the setting.
    """
    if not len(kinds):
        return ImageCounts(0, 0, 0, {})
    chosen, several = _choose(extensions, kinds, sample_start, bad, image)
    changed = 0
    if image != FIRST:
        changed = int((chosen != _choose(extensions, kinds, sample_start, bad, FIRST)[0]).sum())
    is_unused = np.array([may_be_image(extension) for extension in extensions])[kinds]
    is_unused[chosen[chosen >= 0]] = False
    for ordinal in bad:  # an error already
        is_unused[sample_start[ordinal] : sample_start[ordinal + 1]] = False
    counts = np.bincount(kinds[is_unused], minlength=len(extensions)).tolist()
    unused = {extension: count for extension, count in zip(extensions, counts, strict=True) if count}
    return ImageCounts(int((chosen < 0).sum()), several, changed, unused)


def _choose(
    extensions: Sequence[str],
    kinds: NDArray[Any],
    sample_start: NDArray[np.int64],
    bad: Sequence[int],
    image: str | None,
) -> tuple[NDArray[np.int64], int]:
    """Return the member that is each sample's image, int64 `[S]`, -1 for none; and how many samples are ambiguous.

    The same as `ShardIndex.image`, for all samples at once.
    """
    starts = sample_start[:-1]
    rank = np.array(ranks(extensions, image))[kinds]
    best = np.maximum.reduceat(rank, starts)
    is_best = rank == np.repeat(best, np.diff(sample_start))
    count = np.add.reduceat(is_best.astype(np.int64), starts)
    first = np.flatnonzero(is_best)[np.cumsum(count) - count]
    several = (best == IMAGE) & (count > 1) & (image is None)
    is_none = (best == NONE) | ((count > 1) & ~several & (image is None))
    is_none[list(bad)], several[list(bad)] = True, False
    return np.where(is_none, -1, first), int(several.sum())
