"""Parity of an exported file with the PyTorch encoder: measured on real images at several batch sizes, then gated."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maekit.images import Pixels
from maekit.system.errors import MaekitError

BATCH_SIZES = (1, 3, 16)
IMAGES = 128
NEIGHBOURS = 10

Embeddings = NDArray[np.float32]
Encoder = Callable[[Pixels], Embeddings]


@dataclass(frozen=True)
class Parity:
    """How much two encoders' embeddings of the same images differ.

    Attributes:
        images: number of images compared.
        batch_sizes: batch sizes they were compared at.
        max_relative_difference: largest absolute difference, divided by the largest absolute value.
        min_cosine: minimum over all images and batch sizes.
        mean_cosine: mean over all images and batch sizes.
        neighbours: number of nearest neighbours by cosine compared per image.
        neighbour_agreement: mean share of those neighbours that both encoders have in common.
        provider: execution provider that ran the file.
    """

    images: int
    batch_sizes: tuple[int, ...]
    max_relative_difference: float
    min_cosine: float
    mean_cosine: float
    neighbours: int
    neighbour_agreement: float
    provider: str


@dataclass(frozen=True)
class Gate:
    """Threshold that a file of some precision must meet to be kept.

    Attributes:
        figure: name of an attribute of `Parity`.
        limit: upper bound of a difference, lower bound of a cosine.
    """

    figure: str
    limit: float

    def problem(self, parity: Parity) -> str | None:
        """Return why the file fails, or None; a NaN fails too."""
        value = getattr(parity, self.figure)
        is_difference = self.figure == "max_relative_difference"
        if value <= self.limit if is_difference else value >= self.limit:
            return None
        said = f"{value:.1e} (at most {self.limit:.0e}" if is_difference else f"{value:.5f} (at least {self.limit:g}"
        return f"{self.figure.replace('_', ' ')} {said} is accepted)"


GATES = {
    "fp32": Gate("max_relative_difference", 1e-4),
    "fp16": Gate("min_cosine", 0.999),
    "int8": Gate("mean_cosine", 0.99),
}


def in_batches(encode: Encoder, images: Pixels, batch_size: int) -> Embeddings:
    """Embed images in batches of one size, padding the last with the first images: `[n, …]` -> `[n, …]`."""
    count = -(-len(images) // batch_size) * batch_size
    filled = images[np.arange(count) % len(images)]
    rows = [encode(filled[i : i + batch_size]) for i in range(0, count, batch_size)]
    return np.concatenate(rows)[: len(images)]


def measure(encode: Encoder, images: Pixels, expected: Embeddings, *, provider: str) -> Parity:
    """Compare an encoder's output with the expected embeddings.

    All images run in batches of 16; the first 16 also run at the other batch sizes.

    Args:
        encode: images -> embeddings.
        images: uint8 `[n, H, W, 3]`.
        expected: `[n, D]` or, for tokens, `[n, N, D]`.
        provider: execution provider, recorded in the result.

    Raises:
        MaekitError: the output has another shape, or values that are not finite.
    """
    differences, cosines = [], []
    largest = max(np.abs(expected).max(), 1e-12)
    got = expected
    for batch_size in BATCH_SIZES:
        count = len(images) if batch_size == max(BATCH_SIZES) else max(BATCH_SIZES)
        got, wanted = in_batches(encode, images[:count], batch_size), expected[:count]
        if got.shape != wanted.shape:
            raise MaekitError(f"the file gives {list(got.shape)} where PyTorch gives {list(wanted.shape)}")
        if not np.isfinite(got).all():
            raise MaekitError("the file gives values that are not finite")
        differences.append(np.abs(got - wanted).max() / largest)
        cosines.append((_unit(got) * _unit(wanted)).sum(axis=-1).ravel())
    every = np.concatenate(cosines)
    neighbours = min(NEIGHBOURS, len(images) - 1)
    return Parity(
        images=len(images),
        batch_sizes=BATCH_SIZES,
        max_relative_difference=float(max(differences)),
        min_cosine=float(every.min()),
        mean_cosine=float(every.mean()),
        neighbours=neighbours,
        neighbour_agreement=_agreement(got, expected, neighbours),
        provider=provider,
    )


def _agreement(got: Embeddings, expected: Embeddings, neighbours: int) -> float:
    if neighbours < 1:
        return 1.0
    ours, theirs = (_nearest(rows.reshape(len(rows), -1), neighbours) for rows in (got, expected))
    return float(np.mean([len(set(a) & set(b)) / neighbours for a, b in zip(ours, theirs, strict=True)]))


def _nearest(rows: Embeddings, count: int) -> list[list[int]]:
    unit = _unit(rows)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    nearest: list[list[int]] = np.argsort(-cosine, axis=1, kind="stable")[:, :count].tolist()
    return nearest


def _unit(rows: Embeddings) -> NDArray[np.float64]:
    wide = rows.astype(np.float64)
    unit: NDArray[np.float64] = wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1e-12)
    return unit
