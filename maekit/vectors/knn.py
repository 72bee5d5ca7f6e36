"""Nearest-neighbour classification of embeddings: the quickest test of their quality."""

from collections.abc import Sequence

import numpy as np

from maekit.vectors.nearest import Labels, Rows, nearest

_ROWS = 1024


def knn_accuracy(
    train: Rows, train_labels: Labels, test: Rows, test_labels: Labels, *, k: int = 20, temperature: float = 0.07
) -> float:
    """Return the share of test rows that weighted kNN classifies correctly; see `knn_accuracies`."""
    return knn_accuracies(train, train_labels, test, test_labels, ks=[k], temperature=temperature)[0]


def knn_accuracies(
    train: Rows, train_labels: Labels, test: Rows, test_labels: Labels, *, ks: Sequence[int], temperature: float = 0.07
) -> list[float]:
    """Return the share of test rows that weighted kNN classifies correctly (Wu et al. 2018, section 3.4), for each k.

    Each of the k nearest training rows by cosine votes with weight exp(cosine / temperature). On a tie the smaller
    label wins.

    Args:
        train: `[n, d]`.
        train_labels: int64 `[n]`, from 0.
        test: `[m, d]`.
        test_labels: int64 `[m]`; -1 never counts as correct.
        ks: numbers of neighbours; a k above n means all training rows.
        temperature: temperature of the weights.

    Raises:
        ValueError: no rows, or the numbers of rows and labels differ.
    """
    if not len(train) or not len(test) or len(train) != len(train_labels) or len(test) != len(test_labels):
        raise ValueError(f"{len(train)} rows, {len(train_labels)} labels; {len(test)} rows, {len(test_labels)} labels")
    cosines, rows = nearest(test, [train], max(ks))
    right = _right(cosines, train_labels[rows], test_labels, ks, temperature)
    shares: list[float] = (right / len(test)).tolist()
    return shares


def leave_one_out_accuracy(rows: Rows, labels: Labels, *, k: int = 20, temperature: float = 0.07) -> float:
    """Return the share of rows that weighted kNN among all other rows classifies correctly; see `knn_accuracies`.

    Args:
        rows: `[n, d]`; n is at least 2.
        labels: int64 `[n]`, from 0.
        k: number of neighbours.
        temperature: temperature of the weights.

    Raises:
        ValueError: fewer than 2 rows, or the numbers of rows and labels differ.
    """
    if len(rows) < 2 or len(rows) != len(labels):
        raise ValueError(f"{len(rows)} rows, {len(labels)} labels")
    cosines, found = nearest(rows, [rows], k + 1)
    # Every row is among its own nearest, unless more than k others are the same vector: then the last one goes.
    others = found != np.arange(len(rows))[:, None]
    others[others.all(axis=1), -1] = False
    cosines, found = (kept[others].reshape(len(rows), -1) for kept in (cosines, found))
    return float(_right(cosines, labels[found], labels, [k], temperature)[0] / len(rows))


def _right(cosines: Rows, voters: Labels, labels: Labels, ks: Sequence[int], temperature: float) -> Labels:
    """Return how many rows are classified correctly, for each k.

    Args:
        cosines: of the neighbours, the nearest first, `[m, max(ks)]`.
        voters: their labels, `[m, max(ks)]`.
        labels: those of the rows, `[m]`.
        ks: numbers of neighbours.
        temperature: temperature of the weights.
    """
    right = np.zeros(len(ks), np.int64)
    classes = int(voters.max()) + 1
    for start in range(0, len(labels), _ROWS):
        part = slice(start, start + _ROWS)
        # Divide by the nearest row's weight, so that the largest is 1: no exponential can overflow.
        weights = np.exp((cosines[part].astype(np.float64) - cosines[part, :1]) / temperature)
        for number, k in enumerate(ks):
            votes = np.zeros((len(weights), classes))
            np.add.at(votes, (np.arange(len(weights))[:, None], voters[part, :k]), weights[:, :k])
            right[number] += int((votes.argmax(axis=1) == labels[part]).sum())
    return right
