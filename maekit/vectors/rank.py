"""The effective rank of embeddings: how many directions they really use. It needs no labels."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# As published; keeps the logarithm finite.
_EPSILON = 1e-7
# The effective rank of vectors that differ only by rounding errors is between 1 and 1.2, in bf16 too.
_COLLAPSED = 2.0
# A rank below this share of the best one before is told; in a training that goes well it rises, or falls slowly.
_FALLEN = 0.5


def effective_rank(rows: NDArray[np.floating]) -> float:
    """Return RankMe, between about 1 (all rows are multiples of one vector) and min(n, d).

    It is exp(-sum(p log p)) with p = s / sum(s) + 1e-7, where s are the singular values of the rows, which are neither
    centred nor normalised (Garrido et al. 2023, "RankMe: assessing the downstream performance of pretrained
    self-supervised representations by their rank", section 3). More rows give a larger value, up to some ten times d.

    Args:
        rows: embeddings, `[n, d]`; not all zero.

    Raises:
        ValueError: there are no rows, or a value is not finite.
    """
    if not rows.size or not np.isfinite(rows).all():
        raise ValueError(f"{rows.shape} values, and all must be finite")
    values = np.linalg.svd(rows.astype(np.float64), compute_uv=False)
    total = values.sum()
    if not total:
        return 1.0
    shares = values / total + _EPSILON
    return float(np.exp(-(shares * np.log(shares)).sum()))


def collapse(ranks: Sequence[float], rows: int) -> str | None:
    """Return in words whether the last of these effective ranks shows a collapse; None if it does not.

    Args:
        ranks: effective ranks of the same images in the course of a training, the newest last.
        rows: number of those images.
    """
    rank, best = ranks[-1], max(ranks)
    if rank < _COLLAPSED < rows:
        return f"collapsed: {rows} held-out images have about the same embedding, effective rank {rank:.2f}"
    if rank < _FALLEN * best:
        return (
            f"collapsing: the effective rank of the embeddings of {rows} held-out images fell from {best:.1f} to "
            f"{rank:.1f}, so they use ever fewer directions"
        )
    return None
