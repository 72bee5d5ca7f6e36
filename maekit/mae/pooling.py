"""From an encoder's tokens to one vector per image."""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional

from maekit.config.poolings import parts_of
from maekit.system.errors import InputError

# Under the root of a variance, so that patches that are all alike have a gradient.
VARIANCE_FLOOR = 1e-6


def poolings_of(encoder: VisionTransformer) -> tuple[str, ...]:
    """Return the poolings of one token or one mean that an encoder has: `avg`, and `cls` with a class token."""
    return ("avg", "cls") if encoder.has_class_token else ("avg",)


def check_pooling(encoder: VisionTransformer, pool: str) -> None:
    """Refuse a pooling that an encoder does not have.

    Raises:
        InputError: there is no class token, or the patch tokens are not normalised before they are pooled.
    """
    if "cls" in parts_of(pool) and not encoder.has_class_token:
        raise InputError(f"`pool` {pool}: this model has no class token; use `pool=avg`")
    if "std" in parts_of(pool) and not isinstance(encoder.fc_norm, nn.Identity):
        raise InputError(
            f"`pool` {pool}: this model normalises behind its pooling, which a standard deviation has no place in; "
            "use `pool=avg` or `pool=avg2x2`"
        )


def pooled(encoder: VisionTransformer, tokens: torch.Tensor, pool: str) -> torch.Tensor:
    """Pool what `forward_features` gives: `[B, prefix + N, D]` -> `[B, k·D]`; k is `vectors_in(pool)`.

    Args:
        encoder: whose tokens they are.
        tokens: after the final norm.
        pool: parts, joined by `+`, that stand one after the other. `avg`: the mean of the patch tokens (class and
            register tokens left out). `cls`: the class token. `std`: the standard deviation of the patch tokens
            (statistics pooling, Snyder et al. 2018). `avg2x2`: the mean of each quarter of the image, row by row (one
            level of a spatial pyramid, Lazebnik et al. 2006); the middle row or column of an odd grid belongs to both
            sides. timm's norm behind the pooling, where the encoder has one, is for means and class tokens.
    """
    patches = tokens[:, encoder.num_prefix_tokens :]
    by_name = {
        "avg": lambda: encoder.fc_norm(patches.mean(dim=1)),
        "cls": lambda: encoder.fc_norm(tokens[:, 0]),
        "std": lambda: deviation(patches),
        "avg2x2": lambda: encoder.fc_norm(_quarters(patches, encoder.patch_embed.grid_size)).flatten(1),
    }
    parts = [by_name[name]() for name in parts_of(pool)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def deviation(patches: torch.Tensor) -> torch.Tensor:
    """Return how far the tokens of an image lie apart, channel by channel: `[B, N, D]` -> `[B, D]`."""
    centred = patches - patches.mean(dim=1, keepdim=True)
    return (centred.square().mean(dim=1) + VARIANCE_FLOOR).sqrt()


def _quarters(patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Return the mean of each quarter of a grid of (rows, columns), row by row: `[B, N, D]` -> `[B, 4, D]`."""
    image = patches.transpose(1, 2).unflatten(2, grid)  # [B, N, D] -> [B, D, rows, columns]
    return functional.adaptive_avg_pool2d(image, 2).flatten(2).transpose(1, 2)  # -> [B, D, 2, 2] -> [B, 4, D]
