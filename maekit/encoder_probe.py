"""Synthetic images and the embeddings an exported file recorded for them, so that any machine can re-check it.

The images come from integer arithmetic: they are identical everywhere, and free of anyone's rights.
"""

import base64
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maekit.images import Pixels

_IMAGES = 8

Embeddings = NDArray[np.float32]


def probe_images(size: tuple[int, int]) -> Pixels:
    """Return the images, waves and edges of several sizes: uint8 `[8, H, W, 3]`."""
    y, x = np.mgrid[: size[0], : size[1], :1].astype(np.int64)[:2]  # 2 x [H, W, 1]
    channel = np.arange(1, 4)
    images = []
    for number in range(1, _IMAGES + 1):
        ramp = (x * number * channel + y * (9 - number)) % 256
        waves = (x * x * channel + y * y * number + x * y) // (16 * channel) % 256
        blocks = ((x // (4 * number) + y // (4 * channel)) % 2) * 128
        images.append(((ramp + waves + blocks) // 3 * 6 // 5 % 256).astype(np.uint8))
    return np.stack(images)


def rows_to_json(rows: Embeddings) -> dict[str, Any]:
    """Return embeddings as JSON values; tokens are averaged first."""
    pooled = pooled_rows(rows)
    return {"shape": list(pooled.shape), "float32": base64.b64encode(pooled.astype("<f4").tobytes()).decode()}


def rows_from_json(value: dict[str, Any]) -> Embeddings:
    """Decode the value that `rows_to_json` wrote: float32 `[8, D]`.

    Raises:
        ValueError: the value is damaged.
        KeyError: a key is missing.
    """
    data = np.frombuffer(base64.b64decode(value["float32"], validate=True), "<f4")
    rows: Embeddings = data.reshape(value["shape"]).astype(np.float32)
    return rows


def pooled_rows(rows: Embeddings) -> Embeddings:
    """Return one row per image: embeddings unchanged, tokens averaged."""
    return rows if rows.ndim == 2 else rows.mean(axis=1, dtype=np.float64).astype(np.float32)
