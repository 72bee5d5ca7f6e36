"""What the decoder predicts (He et al. 2021, section 3, "Reconstruction target")."""

import torch


def patchify(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut images into patches, pixels in (row, column, channel) order: `[B, C, H, W]` -> `[B, N, p·p·C]`."""
    b, c, h, w = images.shape
    p = patch_size
    x = images.reshape(b, c, h // p, p, w // p, p)  # [B, C, H, W] -> [B, C, rows, p, columns, p]
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(patches: torch.Tensor, patch_size: int, grid: tuple[int, int]) -> torch.Tensor:
    """Put patches together again: `[B, N, p·p·C]` -> `[B, C, H, W]`; the inverse of `patchify`."""
    b, _, d = patches.shape
    p, (rows, columns) = patch_size, grid
    c = d // (p * p)
    x = patches.reshape(b, rows, columns, p, p, c)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, c, rows * p, columns * p)


def patch_statistics(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of each patch, over all p²·C values: `[B, N, P]` -> 2 x `[B, N, 1]`.

    The variance is the unbiased one, with 1e-6 added before the root.
    """
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def normalize_patches(patches: torch.Tensor) -> torch.Tensor:
    """Normalise each patch by its own mean and standard deviation: `[B, N, P]` -> `[B, N, P]`."""
    mean, std = patch_statistics(patches)
    return (patches - mean) / std
