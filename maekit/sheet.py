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
    height, width = height * factor, width * factor
    rows, head = len(columns[0]), _TITLE if titles else 0
    canvas = np.full((head + rows * (height + _GAP) + _GAP, len(columns) * (width + _GAP) + _GAP, 3), 255, np.uint8)
    for x, column in enumerate(columns):
        for y, image in enumerate(column):
            top, left = head + _GAP + y * (height + _GAP), _GAP + x * (width + _GAP)
            canvas[top : top + height, left : left + width] = image.repeat(factor, 0).repeat(factor, 1)
    return _with_titles(canvas, titles, width + _GAP) if titles else canvas


def _with_titles(canvas: Pixels, titles: Sequence[str], step: int) -> Pixels:
    image = Image.fromarray(canvas)
    draw = ImageDraw.Draw(image)
    for number, title in enumerate(titles):
        draw.text((_GAP + number * step, 2), title, fill="black", font=ImageFont.load_default(_TITLE - 6))
    return np.asarray(image)


def encode_png(picture: Pixels) -> bytes:
    """Return a picture, uint8 `[H, W, 3]`, as a PNG file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()
