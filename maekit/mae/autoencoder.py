"""The masked autoencoder: mask, encode what is left, decode, compare what was removed (He et al. 2021)."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from timm.layers.layer_scale import LayerScale
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from maekit.config import ModelConfig
from maekit.mae.cross_decoder import CrossDecoder
from maekit.mae.decoder import Decoder
from maekit.mae.encoder import build_encoder, embed, encode_layers
from maekit.mae.mask_shapes import kept_patches
from maekit.mae.masking import Masking, gather_tokens, random_masking
from maekit.mae.targets import Target, build_target, patchify
from maekit.system.errors import InputError


class Prediction(NamedTuple):
    """Result of a forward pass.

    Attributes:
        loss: scalar, float32.
        pred: predictions of removed patches, `[B, P, outputs]`.
        ids: positions of the predicted patches, int64 `[B, P]`: the first P of `masking.ids_masked`, by default all.
        masking: which patches were kept and removed.
    """

    loss: torch.Tensor
    pred: torch.Tensor
    ids: torch.Tensor
    masking: Masking


class MaskedAutoencoder(nn.Module):
    """An encoder, the decoder that trains it, and the target it predicts.

    Args:
        encoder: a timm VisionTransformer.
        decoder: decoder over the same grid of patches.
        target: the prediction target.
        mask_ratio: share of patches removed.
        predict_ratio: share of the removed patches that are predicted.
        mask_tokens_in_encoder: encode mask tokens in place of the removed patches (ablation in table 1c).
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        decoder: Decoder | CrossDecoder,
        target: Target,
        *,
        mask_ratio: float,
        predict_ratio: float = 1.0,
        mask_tokens_in_encoder: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.target = encoder, decoder, target
        self.mask_ratio, self.predict_ratio = mask_ratio, predict_ratio
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.embed_dim)) if mask_tokens_in_encoder else None
        self.patch_size: int = encoder.patch_embed.patch_size[0]
        self.grid: tuple[int, int] = encoder.patch_embed.grid_size
        self.patches: int = encoder.patch_embed.num_patches

    def forward(self, images: torch.Tensor, noise: torch.Tensor, tokens: torch.Tensor | None = None) -> Prediction:
        """Return loss, prediction and masking.

        Args:
            images: normalised, float32 `[B, C, H, W]`.
            noise: numbers that choose the masks, `[B·k, N]`: k consecutive rows per image.
            tokens: tokens of the images, int64 `[B, N]`, if the target is tokens.
        """
        masking = random_masking(noise, self.mask_ratio)
        masks = len(noise) // len(images)
        patches = patchify(images, self.patch_size)  # [B, C, H, W] -> [B, N, p·p·C]
        if masks > 1:
            patches = patches.repeat_interleave(masks, 0)  # -> [B·k, N, p·p·C]
        layers = self.encode(gather_tokens(patches, masking.ids_keep), masking)
        ids = masking.ids_masked[:, : predicted_patches(masking.ids_masked.shape[1], self.predict_ratio)]
        pred = self.decoder(layers, masking, ids.shape[1])
        if tokens is not None:
            tokens = tokens.repeat_interleave(masks, 0).gather(1, ids)  # [B, N] -> [B·k, P]
        # Under autocast the prediction is bf16; loss and target stay fp32. Every image has the same number of predicted
        # patches, so the mean over all patches equals the paper's loss.
        return Prediction(self.target.loss(pred.float(), gather_tokens(patches, ids), tokens), pred, ids, masking)

    def encode(self, kept: torch.Tensor, masking: Masking) -> list[torch.Tensor]:
        """Encode the kept patches, `[B, K, p·p·C]`, together with mask tokens if the encoder takes them.

        Returns:
            input of the first block and output of each block, `[B, prefix + K, D]` each (with mask tokens, N for K).
        """
        ids = masking.ids_keep if self.mask_token is None else masking.ids
        return encode_layers(self.encoder, embed(self.encoder, kept, ids, self.mask_token))


def predicted_patches(removed: int, predict_ratio: float) -> int:
    """Return P, the number of removed patches that are predicted: int(removed · ratio)."""
    return int(removed * predict_ratio)


def build_autoencoder(config: ModelConfig, *, seed: int) -> MaskedAutoencoder:
    """Build the autoencoder with the published initialisation; the weights depend only on `seed`.

    Raises:
        InputError: impossible sizes, or ratios that keep, remove or predict no patch.
    """
    encoder = build_encoder(config)
    width, heads = config.decoder_width, config.decoder_heads
    if width % 4 or width % heads:
        raise InputError(f"model.decoder_width = {width} must be a multiple of 4 and of model.decoder_heads = {heads}")
    patches = encoder.patch_embed.num_patches
    kept = kept_patches(patches, config.mask_ratio)
    if not 0 < kept < patches:
        raise InputError(f"model.mask_ratio = {config.mask_ratio} keeps none or all of the {patches} patches")
    if not predicted_patches(patches - kept, config.predict_ratio):
        raise InputError(f"model.predict_ratio = {config.predict_ratio} predicts none of {patches - kept} patches")
    try:
        target = build_target(config, encoder.patch_embed.patch_size[0] ** 2 * config.channels)
        decoder = _build_decoder(config, encoder, target.outputs)
    except (RuntimeError, OverflowError, MemoryError) as error:  # sizes too large for memory
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"the decoder cannot be built: {first}") from error
    model = MaskedAutoencoder(
        encoder,
        decoder,
        target,
        mask_ratio=config.mask_ratio,
        predict_ratio=config.predict_ratio,
        mask_tokens_in_encoder=config.mask_tokens == "encoder",
    )
    initialize(model, seed=seed)
    return model


def _build_decoder(config: ModelConfig, encoder: VisionTransformer, outputs: int) -> Decoder | CrossDecoder:
    shape: dict[str, Any] = {"width": config.decoder_width, "depth": config.decoder_depth}
    shape |= {"heads": config.decoder_heads, "grid": encoder.patch_embed.grid_size, "outputs": outputs}
    if config.decoder == "cross":
        return CrossDecoder(encoder.embed_dim, len(encoder.blocks), **shape)
    adds_mask_tokens = config.mask_tokens == "decoder"
    return Decoder(encoder.embed_dim, prefix_tokens=encoder.num_prefix_tokens, mask_tokens=adds_mask_tokens, **shape)


def initialize(model: MaskedAutoencoder, *, seed: int) -> None:
    """Initialise as published: xavier-uniform matrices (fused qkv as one matrix), zero biases, N(0, .02) tokens.

    Learned positions are drawn like tokens. A cross-attention decoder weights the L + 1 layers of the encoder; those
    weights are drawn from N(0, 1/(L + 1)), so that the mixture has about the magnitude of one layer.
    """
    generator = torch.Generator().manual_seed(seed)
    encoder, decoder = model.encoder, model.decoder
    tokens = (encoder.cls_token, decoder.mask_token, encoder.reg_token, model.mask_token)
    _initialize(model, encoder, tokens, generator)
    if isinstance(decoder, CrossDecoder):
        nn.init.normal_(decoder.layer_weights, std=decoder.layer_weights.shape[1] ** -0.5, generator=generator)


def initialize_encoder(encoder: VisionTransformer, *, seed: int) -> None:
    """Initialise an encoder without a decoder, in the same way."""
    _initialize(encoder, encoder, (encoder.cls_token, encoder.reg_token), torch.Generator().manual_seed(seed))


@torch.no_grad()
def _initialize(
    module: nn.Module, encoder: VisionTransformer, tokens: Iterable[nn.Parameter | None], generator: torch.Generator
) -> None:
    """Initialise all layers of a module, then the tokens and learned positions of its encoder, in this order."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, (nn.LayerNorm, LayerScale)):
            layer.reset_parameters()
    projection = encoder.patch_embed.proj
    # Initialised as a matrix, not as a convolution: fan-in p·p·C, fan-out D.
    nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1), generator=generator)
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)
    positions = encoder.pos_embed if encoder.pos_embed is not None and encoder.pos_embed.requires_grad else None
    for token in (*tokens, positions):
        if token is not None:
            nn.init.normal_(token, std=0.02, generator=generator)
