"""Pools an encoder's tokens to one vector per image."""

from collections.abc import Callable
from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional

from maekit.config.poolings import UNPOOLED, parts_of
from maekit.system.errors import InputError

# Added to a variance before the root, so that the gradient is finite if all patches are equal.
VARIANCE_FLOOR = 1e-6


def poolings_of(encoder: VisionTransformer) -> tuple[str, ...]:
    """Return the poolings to a single token or mean that an encoder supports: `avg`, and `cls` with a class token."""
    return ("avg", "cls") if encoder.has_class_token else ("avg",)


def check_pooling(encoder: VisionTransformer, pool: str) -> None:
    """Refuse a pooling that an encoder does not support.

    Raises:
        InputError: there is no class token, or the encoder normalises only after pooling.
    """
    if "cls" in parts_of(pool) and not encoder.has_class_token:
        raise InputError(f"`pool` {pool}: this model has no class token; use `pool=avg`")
    if "std" in parts_of(pool) and not isinstance(encoder.fc_norm, nn.Identity):
        raise InputError(
            f"`pool` {pool}: this model normalises behind its pooling, which a standard deviation has no place in; "
            "use `pool=avg` or `pool=avg2x2`"
        )


def pooled(encoder: VisionTransformer, tokens: torch.Tensor, pool: str) -> torch.Tensor:
    """Pool the output of `forward_features`: `[B, prefix + N, D]` -> `[B, k·D]`; k is `vectors_in(pool)`.

    The patch tokens themselves, `[B, N, D]`, for the pooling `tokens`.

    Args:
        encoder: the encoder that produced the tokens.
        tokens: the tokens after the final norm.
        pool: poolings joined by `+`; their results are concatenated. `avg`: the mean of the patch tokens (without class
            and register tokens). `cls`: the class token. `std`: the standard deviation of the patch tokens (statistics
            pooling, Snyder et al. 2018). `avg2x2`: the mean of each quarter of the image, row by row (one level of a
            spatial pyramid, Lazebnik et al. 2006); the middle row or column of an odd grid belongs to both sides. If
            the encoder has timm's norm after the pooling, it is applied to means and class tokens.
    """
    quarters = partial(_quarters, grid=encoder.patch_embed.grid_size)
    return pool_tokens(tokens, pool, prefix=encoder.num_prefix_tokens, norm=encoder.fc_norm, quarters=quarters)


def pool_tokens(
    tokens: torch.Tensor, pool: str, *, prefix: int, norm: nn.Module, quarters: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Pool tokens as `pooled` does, with the given operations; an exported graph computes the quarters in its own way.

    Args:
        tokens: `[B, prefix + N, D]`.
        pool: as in `pooled`.
        prefix: number of class and register tokens.
        norm: the norm after the pooling of means and class tokens.
        quarters: mean of each quarter of the image: `[B, N, D]` -> `[B, 4, D]`.
    """
    patches = tokens[:, prefix:]
    by_name = {
        UNPOOLED: lambda: patches,
        "avg": lambda: norm(patches.mean(dim=1)),
        "cls": lambda: norm(tokens[:, 0]),
        "std": lambda: _deviation(patches),
        # `flatten` would export a Shape node (PyTorch 2.11).
        "avg2x2": lambda: norm(quarters(patches)).reshape(-1, 4 * patches.shape[2]),  # [B, 4, D] -> [B, 4·D]
    }
    parts = [by_name[name]() for name in parts_of(pool)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _deviation(patches: torch.Tensor) -> torch.Tensor:
    """Return the standard deviation of an image's tokens, per channel: `[B, N, D]` -> `[B, D]`."""
    centred = patches - patches.mean(dim=1, keepdim=True)
    return (centred.square().mean(dim=1) + VARIANCE_FLOOR).sqrt()


def _quarters(patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Return the mean of each quarter of a (rows, columns) grid, row by row: `[B, N, D]` -> `[B, 4, D]`."""
    image = patches.transpose(1, 2).unflatten(2, grid)  # [B, N, D] -> [B, D, rows, columns]
    return functional.adaptive_avg_pool2d(image, 2).flatten(2).transpose(1, 2)  # -> [B, D, 2, 2] -> [B, 4, D]
