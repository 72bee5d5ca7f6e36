"""Linear classification of embeddings: multinomial logistic regression, with regularisation chosen on held-out rows."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from maekit.system.errors import InputError
from maekit.vectors.nearest import Labels, Rows

CS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_HELD_OUT = 0.1
_MOST_ITERATIONS = 1000
# On the gradient of the mean loss; smaller values no longer change the accuracy.
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class LinearScore:
    """Score of a linear classifier.

    Attributes:
        accuracy: share of test rows classified correctly.
        c: the chosen inverse regularisation, as scikit-learn's C.
        held_out: for each C, the accuracy on the held-out tenth of the training set.
    """

    accuracy: float
    c: float
    held_out: dict[float, float]


class LogisticRegression:
    """Multinomial logistic regression by L-BFGS, on standardised features.

    It minimises C · Σ cross-entropy + ‖W‖² / 2, as scikit-learn does; biases are not regularised.

    Args:
        rows: float32 `[n, d]`.
        labels: int64 `[n]`, from 0.
        classes: number of classes.
        device: device to compute on.
    """

    def __init__(self, rows: Rows, labels: Labels, classes: int, device: torch.device | str) -> None:
        x = torch.from_numpy(np.ascontiguousarray(rows)).to(device)
        self._mean, std = x.mean(dim=0), x.std(dim=0, correction=0)
        # A constant feature carries no information; scaling would only amplify its rounding errors.
        self._scale = torch.where(std > 1e-6 * std.max(), 1 / std, 0)
        self._x, self._y = (x - self._mean) * self._scale, torch.from_numpy(labels).to(device)
        self._weight = torch.zeros(classes, x.shape[1], device=device, requires_grad=True)
        self._bias = torch.zeros(classes, device=device, requires_grad=True)

    def fit(self, c: float) -> None:
        """Fit to the optimum for C, starting from the last fit."""
        optimizer = torch.optim.LBFGS(
            [self._weight, self._bias],
            max_iter=_MOST_ITERATIONS,
            tolerance_grad=_TOLERANCE,
            tolerance_change=1e-9,
            history_size=10,
            line_search_fn="strong_wolfe",
        )
        decay = 1 / (2 * c * len(self._x))

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            value = functional.cross_entropy(functional.linear(self._x, self._weight, self._bias), self._y)
            value = value + decay * self._weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)

    @torch.no_grad()
    def accuracy(self, rows: Rows, labels: Labels) -> float:
        """Return the share of rows, float32 `[m, d]`, that are classified correctly."""
        x = torch.from_numpy(np.ascontiguousarray(rows)).to(self._mean.device)
        logits = functional.linear((x - self._mean) * self._scale, self._weight, self._bias)
        return float((logits.argmax(dim=1).cpu().numpy() == labels).mean())


def linear_accuracy(
    train: Rows, train_labels: Labels, test: Rows, test_labels: Labels, *, seed: int = 0, device: str = "cpu"
) -> LinearScore:
    """Choose C on a held-out tenth of the training set, refit with it on all rows, and score the test set.

    Args:
        train: float32 `[n, d]`.
        train_labels: int64 `[n]`, from 0.
        test: float32 `[m, d]`.
        test_labels: int64 `[m]`; -1 never counts as correct.
        seed: seed that draws the held-out tenth.
        device: device to compute on.

    Raises:
        InputError: too few rows to hold any out.
    """
    classes = int(train_labels.max()) + 1
    order = np.random.default_rng(seed).permutation(len(train))
    count = held_out_rows(len(train))
    held, kept = order[:count], order[count:]
    part = LogisticRegression(train[kept], train_labels[kept], classes, device)
    held_out = {}
    for c in CS:
        part.fit(c)
        held_out[c] = part.accuracy(train[held], train_labels[held])
    best = max(CS, key=lambda c: held_out[c])
    whole = LogisticRegression(train, train_labels, classes, device)
    whole.fit(best)
    return LinearScore(whole.accuracy(test, test_labels), best, held_out)


def held_out_rows(rows: int) -> int:
    """Return how many of `rows` training rows are held out to choose the regularisation.

    Raises:
        InputError: too few to hold any out.
    """
    count = int(_HELD_OUT * rows)
    if not count:
        raise InputError(f"a linear classifier needs at least 10 labelled training images, there are {rows}")
    return count
