"""Exact nearest neighbours by cosine, one block of queries against one block of rows at a time to bound memory."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

_QUERIES, _ROWS = 1024, 16384  # per block: 64 MB of cosines

Rows = NDArray[np.float32]
Labels = NDArray[np.int64]
Numbers = NDArray[np.int64]


def nearest(queries: Rows, blocks: Iterable[Rows], k: int) -> tuple[Rows, Numbers]:
    """Return the k nearest rows of each query; equal cosines are ordered by row number.

    Args:
        queries: `[m, d]`, of any norm.
        blocks: the rows, in blocks `[n, d]`; they are numbered across all blocks.
        k: number of neighbours; all rows if there are fewer.

    Returns:
        Cosines, float32 `[m, k]`, largest first; and the numbers of the rows, int64 `[m, k]`.
    """
    queries = unit(queries)
    cosines, numbers = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    seen = 0
    for block in blocks:
        for first in range(0, len(block), max(_ROWS, k)):
            rows = unit(block[first : first + max(_ROWS, k)])
            merged = []
            for start in range(0, max(1, len(queries)), _QUERIES):
                some = slice(start, start + _QUERIES)
                near, order = _nearest_of(queries[some], rows, k)
                merged.append(_merge(cosines[some], numbers[some], near, order + seen, k))
            cosines, numbers = (np.concatenate(column) for column in zip(*merged, strict=True))
            seen += len(rows)
    return cosines, numbers


def _nearest_of(queries: Rows, rows: Rows, k: int) -> tuple[Rows, Numbers]:
    """Return the k nearest rows of a block, unordered; of equal cosines at the boundary the first rows win."""
    similar = queries @ rows.T  # [b, d] @ [d, n] -> [b, n]
    if k >= len(rows):
        return similar, np.tile(np.arange(len(rows)), (len(queries), 1))
    chosen = np.argpartition(similar, len(rows) - k, axis=1)[:, len(rows) - k :]
    cosines = np.take_along_axis(similar, chosen, axis=1)
    # If several rows tie for the k-th position, argpartition picks any of them.
    worst = cosines.min(axis=1)
    shared = np.flatnonzero((similar >= worst[:, None]).sum(axis=1) > k)
    for query in shared.tolist():
        chosen[query] = np.argsort(-similar[query], kind="stable")[:k]
        cosines[query] = similar[query, chosen[query]]
    return cosines, chosen


def _merge(cosines: Rows, numbers: Numbers, more: Rows, of: Numbers, k: int) -> tuple[Rows, Numbers]:
    """Return the best k of two results, ordered by cosine and then by row number."""
    cosines, numbers = np.concatenate([cosines, more], axis=1), np.concatenate([numbers, of], axis=1)
    order = np.lexsort((numbers, -cosines), axis=1)[:, :k]
    return np.take_along_axis(cosines, order, axis=1), np.take_along_axis(numbers, order, axis=1)


def unit(rows: NDArray[np.floating]) -> Rows:
    """Return rows divided by their norm; zero rows stay zero."""
    rows = np.asarray(rows, np.float32)
    divided: Rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return divided
