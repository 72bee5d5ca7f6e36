"""Turns random numbers into a mask (He et al. 2021, section 3). Everywhere, mask 1 = removed and 0 = kept."""

from typing import NamedTuple

import torch

from maekit.mae.mask_shapes import kept_patches


class Masking(NamedTuple):
    """Which patches of each image are kept, and which are removed.

    Attributes:
        ids_keep: positions of the kept patches, int64 `[B, K]`.
        ids_masked: positions of the removed patches, in random order, int64 `[B, N - K]`.
    """

    ids_keep: torch.Tensor
    ids_masked: torch.Tensor

    @property
    def ids(self) -> torch.Tensor:
        """Positions of all patches, kept ones first: int64 `[B, N]`."""
        return torch.cat(self, dim=1)

    @property
    def mask(self) -> torch.Tensor:
        """The mask in image order: float32 `[B, N]`, 1 = removed."""
        patches = self.ids_keep.shape[1] + self.ids_masked.shape[1]
        kept = torch.zeros(len(self.ids_keep), patches, device=self.ids_keep.device)
        return kept.scatter(1, self.ids_masked, 1.0)


def random_masking(noise: torch.Tensor, mask_ratio: float) -> Masking:
    """Keep the patches with the smallest noise, in the order of their noise.

    Args:
        noise: `[B, N]`, uniform numbers or the output of `MaskShape.noise`.
        mask_ratio: share of patches removed.
    """
    ids_shuffle = torch.argsort(noise, dim=1, stable=True)
    kept = kept_patches(noise.shape[1], mask_ratio)
    return Masking(ids_shuffle[:, :kept], ids_shuffle[:, kept:])


def gather_tokens(tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Pick tokens by position: `[B, N, D]`, int64 `[B, K]` -> `[B, K, D]`."""
    return torch.gather(tokens, 1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
