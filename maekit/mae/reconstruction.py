"""What the model sees and what it makes of it, as pictures (He et al. 2021, figure 2)."""

from typing import NamedTuple

import torch

from maekit.images import Pixels
from maekit.mae.autoencoder import MaskedAutoencoder
from maekit.mae.masking import gather_tokens, random_masking
from maekit.mae.targets import TokenTarget, patchify, unpatchify
from maekit.system.errors import InputError


class Reconstruction(NamedTuple):
    """Normalised images, float32 `[B, C, H, W]` each, and how wrong they are.

    Attributes:
        masked: removed patches are 0, which is the mean colour.
        predicted: all patches as predicted, kept ones too (which no training ever asked for).
        overlaid: removed patches as predicted, kept ones as they are.
        losses: of each image, over its removed patches, float32 `[B]`.
    """

    masked: torch.Tensor
    predicted: torch.Tensor
    overlaid: torch.Tensor
    losses: torch.Tensor


def refuse_unpicturable(model: MaskedAutoencoder) -> None:
    """See that a model predicts what can be drawn.

    Raises:
        InputError: it predicts tokens.
    """
    if isinstance(model.target, TokenTarget):
        raise InputError("this model predicts tokens, which are no pixels; there is nothing to draw")


@torch.no_grad()
def reconstruct(model: MaskedAutoencoder, images: torch.Tensor, noise: torch.Tensor) -> Reconstruction:
    """Mask, predict, and put the prediction where patches were removed.

    All removed patches are predicted, also by a model that was trained on a part of them. A model of normalised patches
    predicts no brightness and contrast; those are taken from the true patch.

    Args:
        model: the autoencoder.
        images: normalised, float32 `[B, C, H, W]`.
        noise: `[B, N]`, chooses the mask.

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
