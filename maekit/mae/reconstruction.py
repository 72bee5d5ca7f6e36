"""Pictures of a model's masked input and of its reconstruction (He et al. 2021, figure 2)."""

from typing import NamedTuple

import torch

from maekit.images import Pixels
from maekit.mae.autoencoder import MaskedAutoencoder
from maekit.mae.masking import gather_tokens, random_masking
from maekit.mae.targets import TokenTarget, patchify, unpatchify
from maekit.system.errors import InputError


class Reconstruction(NamedTuple):
    """Normalised images, float32 `[B, C, H, W]` each, and their losses.

    Attributes:
        masked: the input with removed patches set to 0, the mean colour.
        predicted: predictions for all patches, also for the kept ones, which were never trained.
        overlaid: predictions for removed patches, the input for kept ones.
        losses: loss of each image over its removed patches, float32 `[B]`.
    """

    masked: torch.Tensor
    predicted: torch.Tensor
    overlaid: torch.Tensor
    losses: torch.Tensor


def refuse_unpicturable(model: MaskedAutoencoder) -> None:
    """Refuse a model whose predictions cannot be drawn.

    Raises:
        InputError: the model predicts tokens.
    """
    if isinstance(model.target, TokenTarget):
        raise InputError("this model predicts tokens, which are no pixels; there is nothing to draw")


@torch.no_grad()
def reconstruct(model: MaskedAutoencoder, images: torch.Tensor, noise: torch.Tensor) -> Reconstruction:
    """Mask the images, predict all patches, and draw the predictions.

    All removed patches are predicted, even if the model was trained on a part of them. A model trained on normalised
    patches predicts no brightness and contrast; those are taken from the true patch.

    Args:
        model: the autoencoder.
        images: normalised, float32 `[B, C, H, W]`.
        noise: `[B, N]`, numbers that choose the masks.

    Raises:
        InputError: the model predicts tokens.
    """
    refuse_unpicturable(model)
    assert not isinstance(model.target, TokenTarget)
    masking = random_masking(noise, model.mask_ratio)
    patches = patchify(images, model.patch_size)
    layers = model.encode(gather_tokens(patches, masking.ids_keep), masking)
    pred = model.decoder(layers, masking, masking.ids_masked.shape[1], kept_too=True).float()
    shuffled = gather_tokens(patches, masking.ids)
    kept = masking.ids_keep.shape[1]
    pairs = zip(pred[:, kept:], shuffled[:, kept:], strict=True)
    losses = torch.stack([model.target.loss(p[None], t[None], None) for p, t in pairs])
    pixels = model.target.pixels(pred, shuffled)
    predicted = torch.zeros_like(patches).scatter(1, masking.ids.unsqueeze(-1).expand_as(pixels), pixels)
    removed = masking.mask.unsqueeze(-1).bool()  # [B, N, 1]
    columns = (patches.masked_fill(removed, 0.0), predicted, torch.where(removed, predicted, patches))
    masked, predicted, overlaid = (unpatchify(x, model.patch_size, model.grid) for x in columns)
    return Reconstruction(masked, predicted, overlaid, losses)


def images_of(pixels: torch.Tensor) -> list[Pixels]:
    """Return uint8 `[B, 3, H, W]` as B images of uint8 `[H, W, 3]`."""
    return list(pixels.permute(0, 2, 3, 1).cpu().numpy())
