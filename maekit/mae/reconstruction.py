"""What the model sees and what it makes of it, as pictures (He et al. 2021, figure 2)."""

from typing import NamedTuple

import torch

from maekit.images import Pixels
from maekit.mae.autoencoder import MaskedAutoencoder
from maekit.mae.targets import patch_statistics, patchify, unpatchify


class Reconstruction(NamedTuple):
    """Normalised images, float32 `[B, C, H, W]` each.

    Attributes:
        masked: removed patches are 0, which is the mean colour.
        full: removed patches as predicted, kept ones as they are.
    """

    masked: torch.Tensor
    full: torch.Tensor


@torch.no_grad()
def reconstruct(model: MaskedAutoencoder, images: torch.Tensor, noise: torch.Tensor) -> Reconstruction:
    """Mask, predict, and put the prediction where patches were removed.

    A model of normalised patches predicts no brightness and contrast; those are taken from the true patch.

    Args:
        model: the autoencoder.
        images: normalised, float32 `[B, C, H, W]`.
        noise: `[B, N]`, chooses the mask.
    """
    _, pred, mask = model(images, noise)
    patches = patchify(images, model.patch_size)
    pred = pred.float()
    if model.norm_pixel:
        mean, std = patch_statistics(patches)
        pred = pred * std + mean
    removed = mask.unsqueeze(-1)  # [B, N] -> [B, N, 1]
    masked, full = patches * (1 - removed), patches * (1 - removed) + pred * removed
    return Reconstruction(*(unpatchify(x, model.patch_size, model.grid) for x in (masked, full)))


def to_pixels(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> list[Pixels]:
    """Undo the normalisation: float32 `[B, C, H, W]` -> B images of uint8 `[H, W, C]`."""
    scale = torch.tensor(std, device=images.device).view(1, -1, 1, 1)
    shift = torch.tensor(mean, device=images.device).view(1, -1, 1, 1)
    pixels = ((images * scale + shift) * 255).round().clamp(0, 255).to(torch.uint8)
    return list(pixels.permute(0, 2, 3, 1).cpu().numpy())
