"""What the model sees and what it makes of it, as pictures (He et al. 2021, figure 2)."""

from typing import NamedTuple

import torch

from maekit.images import Pixels
from maekit.mae.autoencoder import MaskedAutoencoder
from maekit.mae.masking import gather_tokens
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
    _, pred, masking = model(images, noise)
    patches = patchify(images, model.patch_size)
    pred = pred.float()
    if model.norm_pixel:
        mean, std = patch_statistics(gather_tokens(patches, masking.ids_masked))
        pred = pred * std + mean
    places = masking.ids_masked.unsqueeze(-1).expand_as(pred)  # [B, M] -> [B, M, p·p·C]
    masked, full = patches.scatter(1, places, 0.0), patches.scatter(1, places, pred)
    return Reconstruction(*(unpatchify(x, model.patch_size, model.grid) for x in (masked, full)))


def to_pixels(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> list[Pixels]:
    """Undo the normalisation: float32 `[B, C, H, W]` -> B images of uint8 `[H, W, C]`."""
    scale = torch.tensor(std, device=images.device).view(1, -1, 1, 1)
    shift = torch.tensor(mean, device=images.device).view(1, -1, 1, 1)
    pixels = ((images * scale + shift) * 255).round().clamp(0, 255).to(torch.uint8)
    return list(pixels.permute(0, 2, 3, 1).cpu().numpy())
