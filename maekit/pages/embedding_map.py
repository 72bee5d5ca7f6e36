"""A 2-D map of embeddings, drawn as thumbnails that do not overlap."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maekit.images import Pixels

SMALLEST = 5  # samples; fewer make no map
_PERPLEXITY = 30.0  # t-SNE's usual number of neighbours (van der Maaten and Hinton 2008)
_SIDE = 1400  # pixels
_CELLS = (16, 64)  # pixels
_FRAME = 3  # pixels
_BACKGROUND = (24, 26, 30)
# In cells: maximum distance from a sample's position to the cell it gets. Samples farther away are left out.
_FARTHEST = 3.0


def lay_out(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return 2-D positions by t-SNE; the result is deterministic.

    Args:
        vectors: `[n, d]`, of unit length, so that distances rank like cosines; n is at least `SMALLEST`.

    Returns:
        float32 `[n, 2]`.
    """
    from sklearn.manifold import TSNE  # a second to import

    perplexity = min(_PERPLEXITY, (len(vectors) - 1) / 3)
    # At least two columns: t-SNE is initialised with the first two principal components.
    padded = np.pad(vectors, ((0, 0), (0, max(0, 2 - vectors.shape[1]))))
    return np.asarray(TSNE(init="pca", random_state=0, perplexity=perplexity).fit_transform(padded), np.float32)


def assign_cells(
    positions: NDArray[np.float32], side: int, farthest: float = _FARTHEST
) -> list[tuple[int, int] | None]:
    """Return the (row, column) of each sample on a grid: the nearest free cell, or None if that is too far.

    Args:
        positions: 2-D positions of the samples, `[n, 2]`.
        side: cells along each side of the grid.
        farthest: maximum distance to the cell, in cells.
    """
    low, span = positions.min(axis=0), np.ptp(positions, axis=0)
    wanted = (positions - low) / np.where(span > 0, span, 1) * (side - 1)
    free = np.ones((side, side), bool)
    rows, columns = np.mgrid[:side, :side]
    cells: list[tuple[int, int] | None] = []
    for x, y in wanted:
        distances = np.where(free, np.hypot(rows - y, columns - x), np.inf)
        row, column = divmod(int(distances.argmin()), side)
        is_near = distances[row, column] <= farthest
        if is_near:
            free[row, column] = False
        cells.append((row, column) if is_near else None)
    return cells


def draw_map(
    thumbnails: Sequence[Pixels], positions: NDArray[np.float32], colours: Sequence[str] | None = None
) -> tuple[Pixels, int]:
    """Draw a map.

    Args:
        thumbnails: uint8 `[h, w, 3]` each.
        positions: 2-D positions of the samples, `[n, 2]`.
        colours: colour of the frame around each thumbnail, as `#rrggbb`; None draws no frames.

    Returns:
        the picture, uint8 `[H, W, 3]`, and the number of samples on it.
    """
    side = math.ceil(math.sqrt(2 * len(thumbnails)))
    cell = min(max(_SIDE // side, _CELLS[0]), _CELLS[1])
    frame = 0 if colours is None else max(1, min(_FRAME, cell // 10))
    inner = cell - 1 - 2 * frame  # one free pixel between neighbours
    canvas = Image.new("RGB", (side * cell, side * cell), _BACKGROUND)
    drawn = [(number, found) for number, found in enumerate(assign_cells(positions, side)) if found is not None]
    for number, (row, column) in drawn:
        top, left = row * cell, column * cell
        if colours is not None:
            canvas.paste(colours[number], (left, top, left + cell - 1, top + cell - 1))
        image = Image.fromarray(thumbnails[number]).resize((inner, inner), Image.Resampling.LANCZOS)
        canvas.paste(image, (left + frame, top + frame))
    return np.asarray(canvas), len(drawn)
