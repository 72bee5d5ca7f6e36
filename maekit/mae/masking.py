"""Random masking (He et al. 2021, section 3). One polarity everywhere: mask 1 = removed, 0 = kept."""

from typing import NamedTuple

import torch


class Masking(NamedTuple):
    """Which patches of each image are kept.

    Attributes:
        ids_keep: places of the kept patches, int64 `[B, K]`.
        ids_restore: for each patch its place in the shuffled row (kept ones first), int64 `[B, N]`.
        mask: float32 `[B, N]`, 1 = removed.
    """

    ids_keep: torch.Tensor
    ids_restore: torch.Tensor
    mask: torch.Tensor


def kept_patches(patches: int, mask_ratio: float) -> int:
    """Return K, the number of patches kept: int(N · (1 - ratio))."""
    return int(patches * (1 - mask_ratio))


def random_masking(noise: torch.Tensor, mask_ratio: float) -> Masking:
    """Keep the patches with the smallest noise, in the order of their noise.

    Args:
        noise: uniform numbers, `[B, N]`.
        mask_ratio: share of patches removed.
    """
    ids_shuffle = torch.argsort(noise, dim=1, stable=True)
    ids_restore = torch.argsort(ids_shuffle, dim=1, stable=True)
    kept = kept_patches(noise.shape[1], mask_ratio)
    mask = (ids_restore >= kept).to(torch.float32)
    return Masking(ids_shuffle[:, :kept], ids_restore, mask)


def gather_tokens(tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Pick tokens by place: `[B, N, D]`, int64 `[B, K]` -> `[B, K, D]`."""
    return torch.gather(tokens, 1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
