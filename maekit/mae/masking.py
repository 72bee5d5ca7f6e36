"""From random numbers to a mask (He et al. 2021, section 3). One polarity everywhere: mask 1 = removed, 0 = kept."""

from typing import NamedTuple

import torch

from maekit.mae.mask_shapes import kept_patches


class Masking(NamedTuple):
    """Which patches of each image are kept, and which are removed.

    Attributes:
        ids_keep: places of the kept patches, int64 `[B, K]`.
        ids_masked: places of the removed ones, in random order, int64 `[B, N - K]`.
    """

    ids_keep: torch.Tensor
    ids_masked: torch.Tensor

    @property
    def ids(self) -> torch.Tensor:
        """Places of all patches, kept ones first: int64 `[B, N]`."""
        return torch.cat(self, dim=1)

    @property
    def mask(self) -> torch.Tensor:
        """Return the mask in the order of the image: float32 `[B, N]`, 1 = removed."""
        patches = self.ids_keep.shape[1] + self.ids_masked.shape[1]
        kept = torch.zeros(len(self.ids_keep), patches, device=self.ids_keep.device)
        return kept.scatter(1, self.ids_masked, 1.0)


def random_masking(noise: torch.Tensor, mask_ratio: float) -> Masking:
    """Keep the patches with the smallest noise, in the order of their noise.

    Args:
        noise: `[B, N]`: uniform numbers, or what `MaskShape` makes of them.
        mask_ratio: share of patches removed.
    """
    ids_shuffle = torch.argsort(noise, dim=1, stable=True)
    kept = kept_patches(noise.shape[1], mask_ratio)
    return Masking(ids_shuffle[:, :kept], ids_shuffle[:, kept:])


def gather_tokens(tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Pick tokens by place: `[B, N, D]`, int64 `[B, K]` -> `[B, K, D]`."""
    return torch.gather(tokens, 1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
