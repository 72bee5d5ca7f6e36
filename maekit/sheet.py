"""Contact sheets: rows of images in one picture, for viewing. Needs no torch."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from maekit.images import Pixels

_GAP = 4
_SMALLEST = 96  # pixels; smaller images are enlarged, so that their patches can be told apart
_TITLE = 18  # pixels of height


def sheet(columns: list[list[Pixels]], titles: Sequence[str] = ()) -> Pixels:
    """Draw columns of images side by side on white.

    Args:
        columns: lists of equal length, of images uint8 `[H, W, 3]` of one size.
        titles: one title per column, drawn above it.

    Returns:
        the picture, uint8 `[H, W, 3]`.
    """
    height, width, _ = columns[0][0].shape
    factor = max(1, -(-_SMALLEST // min(height, width)))
    rows = [np.concatenate([_cell(image, factor) for image in row], axis=1) for row in zip(*columns, strict=True)]
    head = _TITLE if titles else 0
    canvas = np.pad(np.concatenate(rows), ((head, _GAP), (0, _GAP), (0, 0)), constant_values=255)
    picture = Image.fromarray(canvas)
    for number, title in enumerate(titles):
        corner = (_GAP + number * (width * factor + _GAP), 2)
        ImageDraw.Draw(picture).text(corner, title, fill="black", font=ImageFont.load_default(_TITLE - 6))
    return np.asarray(picture)


def _cell(image: Pixels, factor: int) -> Pixels:
    """Return an enlarged image with a gap above and on its left: uint8 `[H, W, 3]`."""
    return np.pad(image.repeat(factor, 0).repeat(factor, 1), ((_GAP, 0), (_GAP, 0), (0, 0)), constant_values=255)


def encode_png(picture: Pixels) -> bytes:
    """Return a picture, uint8 `[H, W, 3]`, as a PNG file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()
