"""Makes thumbnails, and finds the neighbours that a page shows. Needs no torch."""

from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from maekit.images import Pixels
from maekit.vectors.nearest import Rows, nearest


def thumbnail(pixels: Pixels, side: int) -> Pixels:
    """Shrink an image, uint8 `[H, W, 3]`, so that its longer side is at most `side` pixels."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=None)
    return np.asarray(image)


def nearest_others(
    queries: Rows, own: Sequence[int | None], blocks: Iterable[Rows], k: int
) -> list[list[tuple[int, float]]]:
    """Return (number, cosine) of the k nearest rows of each query, without the query itself.

    Args:
        queries: `[m, d]`.
        own: number of each query among the rows; None if it is none of them.
        blocks: the rows, in blocks `[n, d]`.
        k: number of neighbours.
    """
    cosines, numbers = nearest(queries, blocks, k + 1)
    found = zip(own, numbers.tolist(), cosines.tolist(), strict=True)
    return [[pair for pair in zip(*near, strict=True) if pair[0] != number][:k] for number, *near in found]
