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
    places = TSNE(init="pca", random_state=0, perplexity=perplexity).fit_transform(padded)
    return np.asarray(places, np.float32)


def assign_cells(places: NDArray[np.float32], side: int, farthest: float = _FARTHEST) -> list[tuple[int, int] | None]:
    """Return the (row, column) of each sample on a grid: the nearest free cell, or None if that is too far.

    Args:
        places: positions, `[n, 2]`.
        side: cells along each side of the grid.
        farthest: maximum distance to the cell, in cells.
    """
    low, span = places.min(axis=0), np.ptp(places, axis=0)
    wanted = (places - low) / np.where(span > 0, span, 1) * (side - 1)
    free = np.ones((side, side), bool)
    rows, columns = np.mgrid[:side, :side]
    cells: list[tuple[int, int] | None] = []
    for column, row in wanted:
        distances = np.where(free, np.hypot(rows - row, columns - column), np.inf)
        nearest = int(distances.argmin())
        cell = (nearest // side, nearest % side)
        if distances[cell] > farthest:
            cells.append(None)
            continue
        free[cell] = False
        cells.append(cell)
    return cells


def draw_map(
    thumbnails: Sequence[Pixels], places: NDArray[np.float32], colours: Sequence[tuple[int, int, int]] | None = None
) -> tuple[Pixels, int]:
    """Draw a map.

    Args:
        thumbnails: uint8 `[h, w, 3]` each.
        places: positions, `[n, 2]`.
        colours: colour of the frame around each thumbnail; None draws no frames.

    Returns:
        the picture, uint8 `[H, W, 3]`, and the number of samples on it.
    """
    side = math.ceil(math.sqrt(2 * len(thumbnails)))
    cell = min(max(_SIDE // side, _CELLS[0]), _CELLS[1])
    frame = 0 if colours is None else max(1, min(_FRAME, cell // 10))
    canvas = Image.new("RGB", (side * cell, side * cell), _BACKGROUND)
    drawn = 0
    for number, place in enumerate(assign_cells(places, side)):
        if place is None:
            continue
        drawn += 1
        top, left = place[0] * cell, place[1] * cell
        inner = cell - 1 - 2 * frame  # one free pixel between neighbours
        if colours is not None:
            canvas.paste(colours[number], (left, top, left + cell - 1, top + cell - 1))
        image = Image.fromarray(thumbnails[number]).resize((inner, inner), Image.Resampling.LANCZOS)
        canvas.paste(image, (left + frame, top + frame))
    return np.asarray(canvas), drawn
