"""The encoder: a timm VisionTransformer built by its timm name, so weights move to and from timm unchanged."""

import difflib
from typing import Any

import timm
import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional

from maekit.config import ModelConfig
from maekit.mae.masking import gather_tokens
from maekit.mae.positions import sincos_positions
from maekit.system.errors import InputError

DEFAULT_MODEL = "vit_base_patch16_224"
# Sizes of an encoder: their names in `ModelConfig`, and timm's.
TIMM_NAMES = {"patch_size": "patch_size", "width": "embed_dim", "depth": "depth", "heads": "num_heads"}


def timm_arguments(config: ModelConfig) -> dict[str, Any]:
    """Return the keyword arguments with which `timm.create_model(name, ...)` builds this encoder."""
    chosen: dict[str, Any] = {theirs: getattr(config, ours) for ours, theirs in TIMM_NAMES.items()}
    chosen |= {"in_chans": None if config.channels == 3 else config.channels, "class_token": config.class_token}
    if config.class_token is not None:
        # timm drops the final norm if it pools by the mean; fc_norm=False keeps it.
        chosen |= {"global_pool": "token" if config.class_token else "avg", "fc_norm": False}
    img_size = config.image_size if isinstance(config.image_size, int) else list(config.image_size)
    given = {key: value for key, value in chosen.items() if value is not None}
    return {"img_size": img_size, "num_classes": 0, **given}


def build_encoder(config: ModelConfig) -> VisionTransformer:
    """Build the encoder, with timm's initial weights and the positions that the config asks for.

    Raises:
        InputError: unknown name, impossible sizes, or an architecture whose tokens cannot be masked.
    """
    name, known = config.name or DEFAULT_MODEL, timm.list_models("vit_*")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else "; see timm.list_models('vit_*')"
        raise InputError(f"unknown model {name!r}{hint}")
    try:
        encoder: Any = timm.create_model(name, pretrained=False, **timm_arguments(config))
    except Exception as error:  # impossible sizes can raise anything
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"timm cannot build {name} with {timm_arguments(config)}: {first}") from error
    _check_maskable(name, encoder)
    patch = encoder.patch_embed.patch_size[0]
    for side in config.size:
        if side % patch:
            raise InputError(f"model.image_size = {side} is not a multiple of the patch size {patch}")
    encoder.pos_embed.requires_grad_(config.positions == "learned")
    if config.positions == "sincos":
        if encoder.embed_dim % 4:
            raise InputError(f"{name}: a width of {encoder.embed_dim} is not a multiple of 4 (sine-cosine positions)")
        prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
        positions = sincos_positions(encoder.embed_dim, encoder.patch_embed.grid_size, prefix_tokens=prefix)
        with torch.no_grad():
            encoder.pos_embed.copy_(positions)
    return encoder


def _check_maskable(name: str, encoder: Any) -> None:
    wanted = {
        "is no plain VisionTransformer": type(encoder) is VisionTransformer,
        "adds no absolute positions": getattr(encoder, "pos_embed", None) is not None,
        "pools by attention (`class_token=false` leaves that out)": getattr(encoder, "attn_pool", None) is None,
        "has no norm before its pooling (`class_token=true` or `class_token=false` puts it there)": not isinstance(
            getattr(encoder, "norm", None), torch.nn.Identity
        ),
        "embeds its patches by more than one projection": type(encoder.patch_embed) is PatchEmbed,
        "has patches that are not square": len(set(getattr(encoder.patch_embed, "patch_size", (1, 2)))) == 1,
    }
    for problem, fine in wanted.items():
        if not fine:
            raise InputError(f"{name} {problem}; maekit trains plain ViTs such as {DEFAULT_MODEL}")


def embed(
    encoder: VisionTransformer, patches: torch.Tensor, ids: torch.Tensor, mask_token: torch.Tensor | None = None
) -> torch.Tensor:
    """Embed the kept patches as tokens; removed patches are not embedded.

    Args:
        encoder: an encoder with absolute positions.
        patches: the kept patches, pixels in (row, column, channel) order, `[B, K, p·p·C]`.
        ids: positions of all tokens, int64 `[B, T]`: those of the kept patches, then those of mask tokens.
        mask_token: `[1, 1, D]`; needed if T > K.

    Returns:
        class and register tokens, then one token per position: `[B, prefix + T, D]`.
    """
    assert encoder.pos_embed is not None
    projection = encoder.patch_embed.proj
    weight = projection.weight.permute(0, 2, 3, 1).flatten(1)  # [D, C, p, p] -> [D, p·p·C]
    tokens = encoder.patch_embed.norm(functional.linear(patches, weight, projection.bias))
    b, k, _ = tokens.shape
    if mask_token is not None:
        tokens = torch.cat([tokens, mask_token.to(tokens.dtype).expand(b, ids.shape[1] - k, -1)], dim=1)
    positions = encoder.pos_embed.expand(b, -1, -1)  # -> [B, (prefix +) N, D]
    prefix = [token.expand(b, -1, -1) for token in (encoder.cls_token, encoder.reg_token) if token is not None]
    before = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
    tokens = tokens + gather_tokens(positions[:, before:], ids)
    if not prefix:
        return tokens
    first = torch.cat(prefix, dim=1) + positions[:, :before] if before else torch.cat(prefix, dim=1)
    return torch.cat([first, tokens], dim=1)


def encode_layers(encoder: VisionTransformer, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Run the blocks on `[B, T, D]`; return the first block's input and each block's output, the last normalised."""
    layers = [encoder.norm_pre(tokens)]
    for block in encoder.blocks:
        layers.append(block(layers[-1]))
    layers[-1] = encoder.norm(layers[-1])
    return layers


def encode(encoder: VisionTransformer, patches: torch.Tensor, ids_keep: torch.Tensor) -> torch.Tensor:
    """Run the encoder on the kept patches only.

    If all patches are kept, in order, this equals timm's own `forward_features`.

    Args:
        encoder: an encoder with absolute positions.
        patches: the kept patches, pixels in (row, column, channel) order, `[B, K, p·p·C]`.
        ids_keep: positions of the kept patches, int64 `[B, K]`.

    Returns:
        the latent after the final norm, class and register tokens first, `[B, prefix + K, D]`.
    """
    return encode_layers(encoder, embed(encoder, patches, ids_keep))[-1]
