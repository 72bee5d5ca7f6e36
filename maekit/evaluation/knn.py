"""Nearest-neighbour classification of embeddings: the quickest answer to whether they are any good."""

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1024


def knn_accuracy(
    train: NDArray[np.float32],
    train_labels: NDArray[np.int64],
    test: NDArray[np.float32],
    test_labels: NDArray[np.int64],
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Return the share of test rows whose weighted neighbours vote for their label (Wu et al. 2018, section 3.4).

    Each of the k nearest training rows by cosine votes with exp(cosine / temperature).

    Args:
        train: `[n, d]`.
        train_labels: int64 `[n]`, from 0.
        test: `[m, d]`.
        test_labels: int64 `[m]`.
        k: neighbours; all training rows where there are fewer.
        temperature: of the weights.

    Raises:
        ValueError: no rows, or labels that do not match them.
    """
    if not len(train) or not len(test) or len(train) != len(train_labels) or len(test) != len(test_labels):
        raise ValueError(f"{len(train)} rows, {len(train_labels)} labels; {len(test)} rows, {len(test_labels)} labels")
    k = min(k, len(train))
    train, test = _unit(train), _unit(test)
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    right = 0
    for start in range(0, len(test), _BLOCK):
        cosine = test[start : start + _BLOCK] @ train.T  # [b, d] @ [d, n] -> [b, n]
        nearest = np.argpartition(-cosine, k - 1, axis=1)[:, :k]
        weights = np.exp(np.take_along_axis(cosine, nearest, axis=1) / temperature)
        votes = np.zeros((len(cosine), classes))
        np.add.at(votes, (np.arange(len(cosine))[:, None], train_labels[nearest]), weights)
        right += int((votes.argmax(axis=1) == test_labels[start : start + _BLOCK]).sum())
    return right / len(test)


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    rows = np.asarray(rows, np.float32)
    unit: NDArray[np.float32] = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return unit
