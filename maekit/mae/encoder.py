"""The encoder: a timm VisionTransformer, built by its timm name, so that weights go back and forth unchanged."""

from typing import Any

import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch.nn import functional

from maekit.config import ModelConfig
from maekit.errors import InputError
from maekit.mae.masking import gather_tokens
from maekit.mae.positions import sincos_positions

DEFAULT_MODEL = "vit_base_patch16_224"


def timm_arguments(config: ModelConfig) -> dict[str, Any]:
    """Return the keyword arguments with which `timm.create_model(name, ...)` builds this encoder."""
    chosen = {
        "patch_size": config.patch_size,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
    }
    return {
        "img_size": config.image_size,
        "num_classes": 0,
        **{key: value for key, value in chosen.items() if value is not None},
    }


def build_encoder(config: ModelConfig) -> VisionTransformer:
    """Build the encoder with frozen sine-cosine positions; other weights are timm's until initialised.

    Raises:
        InputError: unknown name, impossible sizes, or a model whose tokens a MAE cannot mask.
    """
    import timm

    name = config.name or DEFAULT_MODEL
    if name not in timm.list_models("vit_*"):
        import difflib

        near = difflib.get_close_matches(name, timm.list_models("vit_*"), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else "; see timm.list_models('vit_*')"
        raise InputError(f"unknown model {name!r}{hint}")
    try:
        encoder: Any = timm.create_model(name, pretrained=False, **timm_arguments(config))
    except Exception as error:  # whatever impossible sizes lead to
        raise InputError(f"timm cannot build {name} with {timm_arguments(config)}: {error}") from error
    _check_maskable(name, encoder)
    patch = encoder.patch_embed.patch_size[0]
    if config.image_size % patch:
        raise InputError(f"model.image_size = {config.image_size} is not a multiple of the patch size {patch}")
    if encoder.embed_dim % 4:
        raise InputError(f"{name}: a width of {encoder.embed_dim} is not a multiple of 4 (sine-cosine positions)")
    with torch.no_grad():
        encoder.pos_embed.copy_(sincos_positions(encoder.embed_dim, encoder.patch_embed.grid_size, class_token=True))
    encoder.pos_embed.requires_grad_(False)
    return encoder


def _check_maskable(name: str, encoder: Any) -> None:
    wanted = {
        "is no plain VisionTransformer": type(encoder) is VisionTransformer,
        "has no class token": getattr(encoder, "cls_token", None) is not None,
        "has register tokens": getattr(encoder, "reg_token", None) is None,
        "adds no absolute positions": getattr(encoder, "pos_embed", None) is not None,
        "adds positions to patches only": not getattr(encoder, "no_embed_class", False),
        "normalises before its blocks": isinstance(getattr(encoder, "norm_pre", None), torch.nn.Identity),
        "has no final LayerNorm": isinstance(getattr(encoder, "norm", None), torch.nn.LayerNorm),
        "has other blocks than plain attention and MLP": all(type(block) is Block for block in encoder.blocks),
        "embeds its patches by more than one projection": type(encoder.patch_embed) is PatchEmbed,
        "has patches that are not square": len(set(getattr(encoder.patch_embed, "patch_size", (1, 2)))) == 1,
    }
    for problem, fine in wanted.items():
        if not fine:
            raise InputError(f"{name} {problem}; maekit trains plain ViTs such as {DEFAULT_MODEL}")


def encode(encoder: VisionTransformer, patches: torch.Tensor, ids_keep: torch.Tensor) -> torch.Tensor:
    """Run the encoder on the kept patches alone; removed ones are not even embedded.

    With all patches kept, in order, this equals timm's own `forward_features`.

    Args:
        encoder: with a class token and absolute positions.
        patches: the kept ones, pixels in (row, column, channel) order, `[B, K, p·p·C]`.
        ids_keep: their places, int64 `[B, K]`.

    Returns:
        the latent after the final LayerNorm, class token first, `[B, 1 + K, D]`.
    """
    assert encoder.cls_token is not None
    assert encoder.pos_embed is not None
    projection = encoder.patch_embed.proj
    weight = projection.weight.permute(0, 2, 3, 1).flatten(1)  # [D, C, p, p] -> [D, p·p·C]
    tokens = encoder.patch_embed.norm(functional.linear(patches, weight, projection.bias))
    positions = encoder.pos_embed.expand(len(tokens), -1, -1)  # -> [B, 1 + N, D]
    tokens = tokens + gather_tokens(positions[:, 1:], ids_keep)
    class_token = encoder.cls_token.expand(len(tokens), -1, -1) + positions[:, :1]
    return encoder.norm(encoder.blocks(torch.cat([class_token, tokens], dim=1)))
