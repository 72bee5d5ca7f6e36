"""Pictures for people: rows of images on one sheet. Needs no torch."""

import base64
import html
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from maekit.images import Pixels

_GAP = 4
_SMALLEST = 96  # pixels; smaller images are enlarged, so that their patches can be told apart
_TITLE = 18  # pixels of height
_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2em; color: #222; background: #fff; }}
h1 {{ font-size: 1.3em; margin: 0; }}
table {{ border-spacing: 4px 0; margin-top: 1em; }}
th {{ text-align: left; font-weight: 600; font-size: 12px; }}
td {{ padding: 0; }}
img {{ display: block; image-rendering: pixelated; }}
.caption {{ color: #666; font-size: 13px; padding: 2px 0 12px; }}
</style>
<h1>{title}</h1>
<p>{about}</p>
<table>
<tr>{heads}</tr>
{body}
</table>
</html>
"""


class Captioned(NamedTuple):
    """A row of images, uint8 `[H, W, 3]` each, and what is said of it."""

    caption: str
    images: Sequence[Pixels]


def sheet(columns: list[list[Pixels]], titles: Sequence[str] = ()) -> Pixels:
    """Draw columns of images beside each other, on white.

    Args:
        columns: each a list of uint8 `[H, W, 3]`, all of one size and number.
        titles: of the columns, above them.

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


def page(title: str, about: str, titles: Sequence[str], rows: Sequence[Captioned]) -> str:
    """Return an HTML page with rows of images, all in the one file.

    Args:
        title: of the page.
        about: a line below it.
        titles: of the columns.
        rows: each with as many images as there are titles.
    """
    heads = "".join(f"<th>{html.escape(text)}</th>" for text in titles)
    body = "\n".join(
        f"<tr>{''.join(f'<td>{_image(pixels)}</td>' for pixels in row.images)}</tr>\n"
        f'<tr><td class="caption" colspan="{len(titles)}">{html.escape(row.caption)}</td></tr>'
        for row in rows
    )
    return _PAGE.format(title=html.escape(title), about=html.escape(about), heads=heads, body=body)


def _image(pixels: Pixels) -> str:
    # Small images are enlarged by whole factors, so that their patches can be told apart.
    factor = max(1, -(-_SMALLEST // min(pixels.shape[:2])))
    data = base64.b64encode(encode_png(pixels)).decode()
    height, width = pixels.shape[0] * factor, pixels.shape[1] * factor
    return f'<img width="{width}" height="{height}" alt="" src="data:image/png;base64,{data}">'


def encode_png(picture: Pixels) -> bytes:
    """Return a picture, uint8 `[H, W, 3]`, as a PNG file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()
