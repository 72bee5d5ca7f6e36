"""Which member of a sample is its image, by the members' extensions and the setting `image`.

not set    the only image of the sample. Members named as masks (a.mask.png) are no images. A sample without a known
image extension has its only member of an unknown kind as its image: the bytes decide. Samples with
several images are ambiguous, and where rows come from them, they are refused.
first      the first member with an image extension, as maekit did before there was this setting
rgb.png    the member with this extension
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

FIRST = "first"
_EARLIER = frozenset(
    ("jpg", "jpeg", "jpe", "png", "webp", "tif", "tiff", "bmp", "gif", "avif", "ppm", "pgm", "pbm", "pnm")
)
IMAGE_EXTENSIONS = _EARLIER | {"jfif", "jfi", "jif", "pjpeg", "pjp", "apng", "dib"}
_MASKS = frozenset(("mask", "masks", "seg", "segmentation"))
# Members beside an image that are certainly none; anything else may be one under an unusual name.
_SIDECARS = frozenset(
    (
        *("json", "jsonl", "txt", "text", "caption", "cls", "cls2", "id", "index", "inx", "url", "md", "csv", "tsv"),
        *("xml", "yaml", "yml", "toml", "html", "htm", "log", "sha256", "md5", "npy", "npz", "pth", "pt", "pkl"),
        *("pickle", "pyd", "ten", "tb", "safetensors", "parquet", "arrow", "h5", "hdf5", "msgpack", "mp", "bin"),
        *("mp4", "mkv", "avi", "webm", "mov", "mp3", "wav", "flac", "ogg", "m4a", "pdf", "zip", "gz", "tar"),
    )
)
_NONE, _PERHAPS, _IMAGE = range(3)


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


def ranks(extensions: Sequence[str], image: str | None) -> list[int]:
    """Return how good an image a member with each extension is: 0 for none; the best of a sample is its image.

    Args:
        extensions: in lower case.
        image: the setting.
    """
    if image is None:
        return [_rank(extension) for extension in extensions]
    if image == FIRST:
        return [_earlier_rank(extension) for extension in extensions]
    return [_IMAGE if extension == image else _NONE for extension in extensions]


@functools.lru_cache(maxsize=1 << 12)
def _rank(extension: str) -> int:
    *words, last = extension.split(".")
    if last in _SIDECARS or not _MASKS.isdisjoint(words):
        return _NONE
    return _IMAGE if last in IMAGE_EXTENSIONS else _PERHAPS


def _earlier_rank(extension: str) -> int:
    # A whole extension (`jpg`) takes precedence over the last part of a longer one (`left.jpg`).
    return (extension in _EARLIER) + (extension.rpartition(".")[2] in _EARLIER)


def is_ambiguous(rank: int, members: int) -> bool:
    """Whether `members` members of this rank, the best of their sample, leave open which one is the image."""
    return rank == _IMAGE and members > 1


def may_be_image(extension: str) -> bool:
    """Whether a member with this extension is an image, a mask included, or may be one."""
    last = extension.rpartition(".")[2]
    return last in IMAGE_EXTENSIONS or last not in _SIDECARS


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
    several = (best == _IMAGE) & (count > 1) & (image is None)
    is_none = (best == _NONE) | ((count > 1) & ~several & (image is None))
    is_none[list(bad)], several[list(bad)] = True, False
    return np.where(is_none, -1, first), int(several.sum())
