"""PCA whitening of embeddings: what makes the vectors of a masked autoencoder fit for cosine search.

A masked autoencoder spreads what it knows over directions of very different variance, and cosine sees the largest ones
alone. Whitening centres the embeddings and gives all directions that are kept about the same variance (Jégou and Chum
2012, "Negative evidences and co-occurrences in image retrieval: the benefit of PCA and whitening", section 3). It is
fitted on a sample of images and becomes one matrix and one bias of the graph.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maekit.system.errors import InputError

# Directions with less than this share of the largest variance hold rounding errors: the LayerNorm before the pooling
# leaves one direction empty.
_NO_VARIANCE = 1e-7
# Added to each variance, as a share of the largest: the faintest directions of a sample are the least certain, and what
# fp16 and int8 round off would grow with 1 / sqrt(variance).
_SHRINKAGE = 1e-4


@dataclass(frozen=True)
class Whitening:
    """x -> matrix @ x + bias.

    Attributes:
        matrix: float32 `[d, D]`, the directions of largest variance first.
        bias: float32 `[d]`.
        explained_variance: share of the sample's variance that the d directions hold.
        images: how many the sample had.
        sample_sha256: digest of the sample's prepared pixels.
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
        """Return what the exported file says of it."""
        return {
            "dim": self.dim,
            "explained_variance": self.explained_variance,
            "images": self.images,
            "sample_sha256": self.sample_sha256,
        }


def fit_whitening(batches: Iterable[NDArray[np.float32]], dim: int | None, digest: "hashlib._Hash") -> Whitening:
    """Fit mean and principal components, in one pass over the sample and in float64.

    Args:
        batches: embeddings before any normalisation, `[n, D]` each.
        dim: how many directions are kept; None is all that have any variance.
        digest: of the sample, complete when `batches` is exhausted.

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
    present = int((variances > _NO_VARIANCE * variances[0]).sum()) if variances[0] > 0 else 0
    # n images span n - 1 directions.
    possible = min(present, count - 1)
    if not possible:
        raise InputError("`whiten`: the embeddings of the sample are all the same")
    if dim is not None and dim > possible:
        raise InputError(
            f"`whiten_dim` {dim}: the embeddings of {count} images vary in {possible} directions; give more images or "
            "a smaller number"
        )
    kept = dim or possible
    # eigh leaves the sign of a direction open: the largest entry is made positive, so that a sample gives one result.
    chosen = directions[:, :kept]
    signs = np.sign(chosen[np.abs(chosen).argmax(axis=0), np.arange(kept)])
    matrix = (chosen * signs / np.sqrt(variances[:kept] + _SHRINKAGE * variances[0])).T
    return Whitening(
        matrix=matrix.astype(np.float32),
        bias=(-matrix @ mean).astype(np.float32),
        explained_variance=float(variances[:kept].sum() / variances.clip(min=0).sum()),
        images=count,
        sample_sha256=digest.hexdigest(),
    )
