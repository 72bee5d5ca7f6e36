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
    classes = int(train_labels.max()) + 1
    right = np.zeros(len(ks), np.int64)
    cosines, rows = nearest(test, [train], max(ks))
    for start in range(0, len(test), _ROWS):
        part = slice(start, start + _ROWS)
        # Divide by the nearest row's weight, so that the largest is 1: no exponential can overflow.
        weights = np.exp((cosines[part].astype(np.float64) - cosines[part, :1]) / temperature)
        voters = train_labels[rows[part]]
        for number, k in enumerate(ks):
            votes = np.zeros((len(voters), classes))
            np.add.at(votes, (np.arange(len(voters))[:, None], voters[:, :k]), weights[:, :k])
            right[number] += int((votes.argmax(axis=1) == test_labels[part]).sum())
    shares: list[float] = (right / len(test)).tolist()
    return shares
