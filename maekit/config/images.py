"""What several commands say of images: which member of a sample it is, and the size of the input."""

from functools import partial

from maekit.config.fields import setting

MOST_PIXELS = 8192  # of a side of the input


def parse_image(text: str) -> str:
    """Parse an extension such as `rgb.png`, or `first`.

    Raises:
        ValueError: it is no extension.
    """
    extension = text.strip().lower().lstrip(".")
    if not extension or "/" in extension:
        raise ValueError("must be an extension such as rgb.png, or first")
    return extension


image_setting = partial(
    setting,
    None,
    "Of samples with several images, the one to take: an extension such as rgb.png, or first.",
    metavar="EXTENSION",
    shown="the only one",
    parse=parse_image,
)


def parse_image_size(text: str) -> int | tuple[int, int]:
    """Parse a number of pixels, or HEIGHTxWIDTH.

    Raises:
        ValueError: it is neither.
    """
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise ValueError(f"{text!r}: must be a number of pixels, or two as in 192x256 (height x width)")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))
