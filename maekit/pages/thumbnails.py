"""Makes thumbnails, and removes a query from its own neighbours. Needs no torch."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maekit.images import Pixels


def thumbnail(pixels: Pixels, side: int) -> Pixels:
    """Shrink an image, uint8 `[H, W, 3]`, so that its longer side is at most `side` pixels."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=None)
    return np.asarray(image)


def without(
    own: int | None, numbers: NDArray[np.int64], cosines: NDArray[np.float32], k: int
) -> list[tuple[int, float]]:
    """Return (number, cosine) of k among the k + 1 nearest, without the query itself."""
    found = zip(numbers.tolist(), cosines.tolist(), strict=True)
    return [(number, cosine) for number, cosine in found if number != own][:k]
