"""The effective rank of embeddings: how many directions they really use. It needs no labels."""

import numpy as np
from numpy.typing import NDArray

# As published; keeps the logarithm finite.
_EPSILON = 1e-7
# Of vectors with a mean cosine above 0.9998: those of an encoder that has collapsed have 1.0 to 1.2, in bf16 too.
_COLLAPSED = 2.0


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


def collapse(rank: float, rows: int) -> str | None:
    """Return in words whether the effective rank of the embeddings of this many images shows a collapse, or None.

    A rank that falls is none: that of a masked autoencoder may halve early in a training that goes well.
    """
    if rank < _COLLAPSED < rows:
        return f"collapsed: {rows} held-out images have about the same embedding, effective rank {rank:.2f}"
    return None
