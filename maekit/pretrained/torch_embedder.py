"""Reference embeddings for exported files: computed by PyTorch in fp32, through timm's own forward pass."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from maekit.images import LUMA, Pixels
from maekit.mae.pooling import pooled, tokens_by_layer
from maekit.pretrained.load import TrainedEncoder
from maekit.vectors.whitening import Whitening

_BATCH = 32


@torch.no_grad()
def reference_embeddings(
    trained: TrainedEncoder,
    images: Pixels,
    *,
    pool: str = "avg",
    normalize: bool = True,
    whitening: Whitening | None = None,
) -> NDArray[np.float32]:
    """Compute embeddings on the encoder's device.

    Args:
        trained: the encoder.
        images: uint8 `[n, H, W, 3]`.
        pool: see `EmbeddingModule`.
        normalize: divide by the L2 norm.
        whitening: applied before L2 normalisation.

    Returns:
        float32 `[n, D]`, or `[n, N, D]` for the pooling `tokens`.
    """
    encoder, preprocess = trained.encoder, trained.preprocess
    device = next(encoder.parameters()).device
    constants = (torch.tensor(v, device=device) for v in (preprocess.mean, preprocess.std, LUMA))
    mean, std, luma = (v.view(1, -1, 1, 1) for v in constants)
    is_grey = encoder.patch_embed.proj.weight.shape[1] == 1
    if is_grey:
        mean, std = ((v * luma).sum(1, keepdim=True) for v in (mean, std))
    parts = []
    for start in range(0, len(images), _BATCH):
        pixels = torch.from_numpy(images[start : start + _BATCH]).to(device).permute(0, 3, 1, 2)
        values = pixels.float() / 255
        if is_grey:
            values = (values * luma).sum(1, keepdim=True)
        tokens = tokens_by_layer(encoder, (values - mean) / std, [pool])
        rows = pooled(encoder, tokens, pool)
        if whitening is not None:
            matrix, bias = (torch.from_numpy(v).to(device) for v in (whitening.matrix, whitening.bias))
            rows = rows @ matrix.T + bias
        parts.append((F.normalize(rows, dim=-1) if normalize else rows).cpu().numpy())
    return np.concatenate(parts)
