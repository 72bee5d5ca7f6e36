"""The masked autoencoder: mask, encode what is left, decode everything, compare what was removed (He et al. 2021)."""

from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from maekit.config import ModelConfig
from maekit.errors import InputError
from maekit.mae.decoder import Decoder
from maekit.mae.encoder import build_encoder, encode
from maekit.mae.masking import Masking, gather_tokens, kept_patches, random_masking
from maekit.mae.targets import normalize_patches, patchify


class Prediction(NamedTuple):
    """What a forward pass gives.

    Attributes:
        loss: scalar, float32.
        pred: the removed patches, `[B, N - K, p·p·C]`.
        masking: which they are; row by row, `pred` belongs to `masking.ids_masked`.
    """

    loss: torch.Tensor
    pred: torch.Tensor
    masking: Masking


class MaskedAutoencoder(nn.Module):
    """An encoder, handed in as an object, and the decoder that trains it.

    Args:
        encoder: a timm VisionTransformer.
        decoder: over the same grid of patches.
        mask_ratio: share of patches removed.
        norm_pixel: normalise the target of each patch.
    """

    def __init__(self, encoder: VisionTransformer, decoder: Decoder, *, mask_ratio: float, norm_pixel: bool) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.mask_ratio, self.norm_pixel = mask_ratio, norm_pixel
        self.patch_size: int = encoder.patch_embed.patch_size[0]
        self.grid: tuple[int, int] = encoder.patch_embed.grid_size
        self.patches: int = encoder.patch_embed.num_patches

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> Prediction:
        """Return loss, prediction and masking.

        Args:
            images: normalised, float32 `[B, C, H, W]`.
            noise: uniform numbers that choose the mask, `[B, N]`.
        """
        masking = random_masking(noise, self.mask_ratio)
        patches = patchify(images, self.patch_size)
        latent = encode(self.encoder, gather_tokens(patches, masking.ids_keep), masking.ids_keep)
        pred = self.decoder(latent, masking)
        # Under autocast the prediction is bf16; loss and target stay fp32. As many patches are removed from each image,
        # so the mean over all of them is the paper's.
        target = self.target(gather_tokens(patches, masking.ids_masked))
        return Prediction((pred.float() - target).square().mean(), pred, masking)

    def target(self, patches: torch.Tensor) -> torch.Tensor:
        """Return what the prediction is compared with: `[B, M, p·p·C]` -> `[B, M, p·p·C]`."""
        return normalize_patches(patches) if self.norm_pixel else patches


def build_autoencoder(config: ModelConfig, *, seed: int) -> MaskedAutoencoder:
    """Build the autoencoder with the published initialisation, a pure function of `seed`.

    Raises:
        InputError: impossible sizes, or a ratio that keeps no patch.
    """
    encoder = build_encoder(config)
    if config.decoder_width % 4 or config.decoder_width % config.decoder_heads:
        raise InputError(
            f"model.decoder_width = {config.decoder_width} must be a multiple of 4 and of "
            f"model.decoder_heads = {config.decoder_heads}"
        )
    patches = encoder.patch_embed.num_patches
    if not 0 < kept_patches(patches, config.mask_ratio) < patches:
        raise InputError(f"model.mask_ratio = {config.mask_ratio} keeps none or all of the {patches} patches")
    patch = encoder.patch_embed.patch_size[0]
    decoder = Decoder(
        encoder.embed_dim,
        width=config.decoder_width,
        depth=config.decoder_depth,
        heads=config.decoder_heads,
        grid=encoder.patch_embed.grid_size,
        outputs=patch * patch * 3,
    )
    model = MaskedAutoencoder(encoder, decoder, mask_ratio=config.mask_ratio, norm_pixel=config.norm_pixel)
    initialize(model, seed=seed)
    return model


def initialize(model: MaskedAutoencoder, *, seed: int) -> None:
    """Initialise as published: xavier-uniform matrices (the fused qkv as one), zero biases, N(0, .02) tokens."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        projection = model.encoder.patch_embed.proj
        # As the matrix that it is: fan-in p·p·C, fan-out D.
        nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1), generator=generator)
        nn.init.zeros_(projection.bias)
        assert model.encoder.cls_token is not None
        nn.init.normal_(model.encoder.cls_token, std=0.02, generator=generator)
        nn.init.normal_(model.decoder.mask_token, std=0.02, generator=generator)
