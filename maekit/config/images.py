"""The setting `image`, which several commands share: which member of a sample is its image."""

from functools import partial

from maekit.config.fields import setting


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
