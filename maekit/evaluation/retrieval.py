"""Retrieval: does a query rank the images of its class first?"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maekit.system.errors import InputError
from maekit.vectors.nearest import Labels, Rows, unit

_BLOCK_BYTES = 256 << 20  # of cosines and ranks at a time


def retrieval_scores(
    rows: Rows, labels: Labels, queries: Rows | None, query_labels: Labels | None, *, recalls: Sequence[int]
) -> dict[str, Any]:
    """Rank all rows for each query by cosine and score the ranking; equal cosines rank in row order.

    Args:
        rows: rows to search, `[n, d]`.
        labels: labels of the rows, int64 `[n]`.
        queries: `[m, d]`; None lets each row search among the others.
        query_labels: labels of the queries, int64 `[m]`.
        recalls: the k of recall@k.

    Returns:
        means over the queries with at least one relevant row, that is, one of their class:

            map            average precision: the mean precision at the ranks of the relevant rows
            r_precision    share of relevant rows among the first R, where R is the number of relevant rows
            recall@k       for each k, whether a relevant row is among the first k (Jégou et al. 2011)
            queries        the number of these queries

    Raises:
        InputError: no query has a relevant row.
    """
    leave_one_out = queries is None or query_labels is None
    rows = unit(rows)
    searched, wanted = (rows, labels) if queries is None or query_labels is None else (unit(queries), query_labels)
    step = max(1, _BLOCK_BYTES // (16 * len(rows)))
    totals, found = np.zeros(2 + len(recalls)), 0
    for start in range(0, len(searched), step):
        cosines = searched[start : start + step] @ rows.T  # [b, d] @ [d, n] -> [b, n]
        if leave_one_out:
            itself = np.arange(len(cosines))
            cosines[itself, start + itself] = np.inf  # rank it first, then cut it off
        order = np.argsort(-cosines, axis=1, kind="stable")[:, int(leave_one_out) :]
        hits = labels[order] == wanted[start : start + step, None]
        relevant = hits.sum(axis=1)
        hits, relevant = hits[relevant > 0], relevant[relevant > 0]
        found += len(hits)
        totals += _summed(hits, relevant, recalls)
    if not found:
        raise InputError("no query has an image of its class to find")
    names = ["map", "r_precision", *(f"recall@{k}" for k in recalls)]
    return {**dict(zip(names, (totals / found).tolist(), strict=True)), "queries": found}


def _summed(hits: NDArray[np.bool_], relevant: Labels, recalls: Sequence[int]) -> NDArray[np.float64]:
    """Return the sums of average precision, R-precision and each recall over queries, float64 `[2 + recalls]`.

    Args:
        hits: whether the row at each rank is of the query's class, bool `[b, n]`.
        relevant: number of such rows per query, int64 `[b]`.
        recalls: the k of recall@k.
    """
    ranks = np.arange(1, hits.shape[1] + 1)
    so_far = hits.cumsum(axis=1)
    average = np.where(hits, so_far / ranks, 0).sum(axis=1) / relevant
    r_precision = so_far[np.arange(len(hits)), relevant - 1] / relevant
    recall = [float(hits[:, :k].any(axis=1).sum()) for k in recalls]
    return np.array([average.sum(), r_precision.sum(), *recall])
