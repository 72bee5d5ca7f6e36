"""Exact nearest neighbours by cosine: a block of queries against a block of rows at a time, so memory stays bounded."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

_BLOCK_BYTES = 64 << 20  # of cosines at once

Rows = NDArray[np.float32]


def nearest(queries: Rows, blocks: Iterable[Rows], k: int) -> tuple[Rows, NDArray[np.int64]]:
    """Return the k nearest rows of each query, equal ones in the order of their numbers.

    Args:
        queries: `[m, d]`, of any length.
        blocks: the rows, `[n, d]` each, one after the other; numbered over all of them.
        k: how many; all rows where there are fewer.

    Returns:
        cosines, float32 `[m, k]`, largest first; and the numbers of the rows, int64 `[m, k]`.
    """
    queries = unit(queries)
    cosines, numbers = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    seen = 0
    for block in blocks:
        rows = unit(block)
        step = max(1, _BLOCK_BYTES // (4 * max(1, len(queries))), k)
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            found, order = _nearest_of(queries, part, k)
            cosines, numbers = _merge(cosines, numbers, found, order + seen + first, k)
        seen += len(rows)
    return cosines, numbers


def _nearest_of(queries: Rows, rows: Rows, k: int) -> tuple[Rows, NDArray[np.int64]]:
    """Return the k nearest of a few rows, ordered, a few queries at a time."""
    k = min(k, len(rows))
    cosines, numbers = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    step = max(1, _BLOCK_BYTES // (4 * len(rows)))
    for first in range(0, len(queries), step):
        part = slice(first, first + step)
        similar = queries[part] @ rows.T  # [b, d] @ [d, n] -> [b, n]
        chosen = (
            np.argpartition(similar, len(rows) - k, axis=1)[:, len(rows) - k :]
            if k < len(rows)
            else _all(len(similar), k)
        )
        cosines[part], numbers[part] = np.take_along_axis(similar, chosen, axis=1), chosen
    return cosines, numbers


def _all(queries: int, k: int) -> NDArray[np.int64]:
    return np.tile(np.arange(k), (queries, 1))


def _merge(
    cosines: Rows, numbers: NDArray[np.int64], more: Rows, of: NDArray[np.int64], k: int
) -> tuple[Rows, NDArray[np.int64]]:
    """Return the best k of two findings, ordered by cosine and then by number."""
    cosines, numbers = np.concatenate([cosines, more], axis=1), np.concatenate([numbers, of], axis=1)
    order = np.lexsort((numbers, -cosines), axis=1)[:, :k]
    return np.take_along_axis(cosines, order, axis=1), np.take_along_axis(numbers, order, axis=1)


def unit(rows: NDArray[np.floating]) -> Rows:
    """Return rows divided by their length; those without length stay as they are."""
    rows = np.asarray(rows, np.float32)
    divided: Rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return divided
