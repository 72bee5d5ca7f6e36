"""PCA whitening of embeddings, which makes the vectors of a masked autoencoder fit for cosine search.

A masked autoencoder spreads information over directions of very different variance, and the largest dominate the
cosine. Whitening centres the embeddings and gives all kept directions about the same variance (Jégou and Chum 2012,
"Negative evidences and co-occurrences in image retrieval: the benefit of PCA and whitening", section 3). It is fitted
on a sample of images and becomes one matrix and one bias of the graph.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maekit.system.errors import InputError
from maekit.vectors.nearest import Rows, unit

# Directions below this share of the largest variance hold only rounding errors: the LayerNorm before the pooling leaves
# one direction empty.
_NO_VARIANCE = 1e-7
# Added to each variance, as a share of the largest: the faintest directions are the least certain, and the rounding
# errors of fp16 and int8 would grow with 1 / sqrt(variance).
_SHRINKAGE = 1e-4
# Images per direction that a whitening needs; with as many directions as images, all would be equally dissimilar.
PER_DIRECTION = 10


@dataclass(frozen=True)
class Whitening:
    """x -> matrix @ x + bias.

    Attributes:
        matrix: float32 `[d, D]`, the directions of largest variance first.
        bias: float32 `[d]`.
        explained_variance: share of the sample's variance in the d directions.
        images: number of images in the sample.
        sample_sha256: digest of the sample's preprocessed pixels; empty if none was given.
    """

    matrix: NDArray[np.float32]
    bias: NDArray[np.float32]
    explained_variance: float
    images: int
    sample_sha256: str

    @property
    def dim(self) -> int:
        """Length of a whitened embedding."""
        return len(self.matrix)

    def to_json(self) -> dict[str, Any]:
        """Return the whitening's entry in the exported file's metadata."""
        return {name: getattr(self, name) for name in ("dim", "explained_variance", "images", "sample_sha256")}


def fit_whitening(
    batches: Iterable[NDArray[np.float32]], dim: int | None, digest: "hashlib._Hash | None" = None
) -> Whitening:
    """Fit mean and principal components in float64, in one pass over the sample.

    Args:
        batches: embeddings before any normalisation, `[n, D]` each.
        dim: number of directions to keep; None means all with any variance.
        digest: digest of the sample, complete when `batches` is exhausted; None records none.

    Raises:
        InputError: too few images, or fewer directions with any variance than `dim`.
    """
    count, total, products = 0, np.zeros(()), np.zeros(())
    for batch in batches:
        rows = batch.astype(np.float64)
        count, total, products = count + len(rows), total + rows.sum(axis=0), products + rows.T @ rows
    if count < 2:
        raise InputError(f"`whiten` needs at least 2 readable images, there is {count}")
    if not np.isfinite(products).all():
        raise InputError("`whiten`: the model gives values that are not finite")
    mean = total / count
    variances, directions = np.linalg.eigh(products / count - np.outer(mean, mean))
    variances, directions = variances[::-1], directions[:, ::-1]  # largest first
    # n images span n - 1 directions.
    possible = min(int((variances > _NO_VARIANCE * variances[0]).sum()), count - 1)
    if not possible:
        raise InputError("`whiten`: the embeddings of the sample are all the same")
    if dim is not None and dim > possible:
        raise InputError(
            f"`whiten_dim` {dim}: the embeddings of {count} images vary in {possible} directions; give more images or "
            "a smaller number"
        )
    kept = dim or possible
    # eigh leaves the sign of a direction open; making its largest entry positive gives one result per sample.
    chosen = directions[:, :kept]
    signs = np.sign(chosen[np.abs(chosen).argmax(axis=0), np.arange(kept)])
    matrix = (chosen * signs / np.sqrt(variances[:kept] + _SHRINKAGE * variances[0])).T
    return Whitening(
        matrix=matrix.astype(np.float32),
        bias=(-matrix @ mean).astype(np.float32),
        explained_variance=float(variances[:kept].sum() / variances.clip(min=0).sum()),
        images=count,
        sample_sha256=digest.hexdigest() if digest else "",
    )


def whiten_sample(rows: NDArray[np.float32]) -> tuple[Rows, int | None]:
    """Whiten a sample by itself: -> rows of unit length, `[n, d]`, and the number d of directions, at least 2.

    d is None, and the rows are only divided by their norm, if they hardly differ.
    """
    try:
        made = fit_whitening([rows], None)
    except InputError:
        return unit(rows), None
    kept = max(2, len(rows) // PER_DIRECTION)
    whitened = unit(rows @ made.matrix[:kept].T + made.bias[:kept])
    return whitened, whitened.shape[1]
