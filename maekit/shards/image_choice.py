"""Which member of a sample is its image, by the members' extensions and the setting `image`.

The setting says:

    not set    the only image of the sample. Members named as masks (a.mask.png) are no images. A sample without a known
               image extension has its only member of an unknown kind as its image: the bytes decide. Samples with
               several images are ambiguous, and where rows come from them, they are refused.
    first      the first member with an image extension, as maekit did before there was this setting
    rgb.png    the member with this extension
"""

import functools
from collections.abc import Sequence

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
NONE, PERHAPS, IMAGE = range(3)  # ranks, where the choice is not set


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
    return [IMAGE if extension == image else NONE for extension in extensions]


@functools.lru_cache(maxsize=1 << 12)
def _rank(extension: str) -> int:
    *words, last = extension.split(".")
    if last in _SIDECARS or not _MASKS.isdisjoint(words):
        return NONE
    return IMAGE if last in IMAGE_EXTENSIONS else PERHAPS


def _earlier_rank(extension: str) -> int:
    # A whole extension (`jpg`) takes precedence over the last part of a longer one (`left.jpg`).
    return (extension in _EARLIER) + (extension.rpartition(".")[2] in _EARLIER)


def is_ambiguous(rank: int, members: int) -> bool:
    """Whether `members` members of this rank, the best of their sample, leave open which one is the image."""
    return rank == IMAGE and members > 1


def may_be_image(extension: str) -> bool:
    """Whether a member with this extension is an image, a mask included, or may be one."""
    last = extension.rpartition(".")[2]
    return last in IMAGE_EXTENSIONS or last not in _SIDECARS
