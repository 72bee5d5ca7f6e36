"""Pools an encoder's tokens to one vector per image."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional

from maekit.config.poolings import UNPOOLED, Part, parts_of
from maekit.system.errors import InputError

# Added to a variance before the root, so that the gradient is finite if all patches are equal.
VARIANCE_FLOOR = 1e-6

LayerTokens = Mapping[tuple[int | None, bool], torch.Tensor]


def poolings_of(encoder: VisionTransformer) -> tuple[str, ...]:
    """Return the poolings to a single token or mean that an encoder supports: `avg`, and `cls` with a class token."""
    return ("avg", "cls") if encoder.has_class_token else ("avg",)


def check_pooling(encoder: VisionTransformer, pool: str) -> None:
    """Refuse a pooling that an encoder does not support.

    Raises:
        InputError: there is no class token, no such layer, or the encoder normalises only after pooling.
    """
    parts = parts_of(pool)
    names = {part.name for part in parts}
    if "cls" in names and not encoder.has_class_token:
        raise InputError(f"`pool` {pool}: this model has no class token; use `pool=avg`")
    if "std" in names and not isinstance(encoder.fc_norm, nn.Identity):
        raise InputError(
            f"`pool` {pool}: this model normalises behind its pooling, which a standard deviation has no place in; "
            "use `pool=avg` or `pool=avg2x2`"
        )
    depth = len(encoder.blocks)
    if beyond := [part for part in parts if (part.layer or 0) > depth]:
        raise InputError(f"`pool` {beyond[0]}: this model has {depth} blocks, counted from 1")


def tokens_by_layer(encoder: VisionTransformer, images: torch.Tensor, pools: Iterable[str]) -> LayerTokens:
    """Run the encoder once, through timm's own forward pass, and return the tokens that some poolings take.

    Args:
        encoder: a timm VisionTransformer.
        images: normalised, float32 `[B, C, H, W]`.
        pools: the poolings.

    Returns:
        `[B, prefix + N, D]` by (layer, whether normalised); the layer is None for the last one.
    """
    wanted = {part[1:] for pool in pools for part in parts_of(pool)}
    if wanted == {(None, True)}:
        return {(None, True): encoder.forward_features(images)}
    depth = len(encoder.blocks)
    layers = sorted({layer or depth for layer, _ in wanted})
    found: Any = encoder.forward_intermediates(
        images,
        indices=[layer - 1 for layer in layers],
        return_prefix_tokens=True,
        output_fmt="NLC",
        stop_early=True,
        intermediates_only=True,
    )
    # (patches, class and register tokens), or the patches alone where there are no others.
    whole = [each if isinstance(each, torch.Tensor) else torch.cat([each[1], each[0]], dim=1) for each in found]
    outputs = dict(zip(layers, whole, strict=True))
    return {
        (layer, normed): encoder.norm(outputs[layer or depth]) if normed else outputs[layer or depth]
        for layer, normed in wanted
    }


def pooled(encoder: VisionTransformer, tokens: LayerTokens, pool: str) -> torch.Tensor:
    """Pool the tokens of `tokens_by_layer`: -> `[B, k·D]`; k is `vectors_in(pool)`.

    The patch tokens themselves, `[B, N, D]`, for the pooling `tokens`.

    Args:
        encoder: the encoder that produced the tokens.
        tokens: the tokens of each layer.
        pool: poolings joined by `+`; their results are concatenated. `avg`: the mean of the patch tokens (without class
            and register tokens). `cls`: the class token. `std`: the standard deviation of the patch tokens (statistics
            pooling, Snyder et al. 2018). `avg2x2`: the mean of each quarter of the image, row by row (one level of a
            spatial pyramid, Lazebnik et al. 2006); the middle row or column of an odd grid belongs to both sides. If
            the encoder has timm's norm after the pooling, it is applied to means and class tokens, except to those
            before the final norm.
    """
    quarters = partial(_quarters, grid=encoder.patch_embed.grid_size)
    return pool_tokens(tokens, pool, prefix=encoder.num_prefix_tokens, norm=encoder.fc_norm, quarters=quarters)


def pool_tokens(
    tokens: LayerTokens, pool: str, *, prefix: int, norm: nn.Module, quarters: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Pool tokens as `pooled` does, with the given operations; an exported graph computes the quarters in its own way.

    Args:
        tokens: `[B, prefix + N, D]` by (layer, whether normalised).
        pool: as in `pooled`.
        prefix: number of class and register tokens.
        norm: the norm after the pooling of means and class tokens.
        quarters: mean of each quarter of the image: `[B, N, D]` -> `[B, 4, D]`.
    """

    def vector(part: Part) -> torch.Tensor:
        every = tokens[part.layer, part.is_normed]
        patches = every[:, prefix:]
        after = norm if part.is_normed else nn.Identity()
        if part.name == UNPOOLED:
            return patches
        if part.name == "avg":
            return after(patches.mean(dim=1))
        if part.name == "cls":
            return after(every[:, 0])
        if part.name == "std":
            return _deviation(patches)
        # `flatten` would export a Shape node (PyTorch 2.11).
        return after(quarters(patches)).reshape(-1, 4 * patches.shape[2])  # avg2x2: [B, 4, D] -> [B, 4·D]

    vectors = [vector(part) for part in parts_of(pool)]
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors, dim=-1)


def _deviation(patches: torch.Tensor) -> torch.Tensor:
    """Return the standard deviation of an image's tokens, per channel: `[B, N, D]` -> `[B, D]`."""
    centred = patches - patches.mean(dim=1, keepdim=True)
    return (centred.square().mean(dim=1) + VARIANCE_FLOOR).sqrt()


def _quarters(patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Return the mean of each quarter of a (rows, columns) grid, row by row: `[B, N, D]` -> `[B, 4, D]`."""
    image = patches.transpose(1, 2).unflatten(2, grid)  # [B, N, D] -> [B, D, rows, columns]
    return functional.adaptive_avg_pool2d(image, 2).flatten(2).transpose(1, 2)  # -> [B, D, 2, 2] -> [B, 4, D]
