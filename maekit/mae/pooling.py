"""From an encoder's tokens to one vector per image."""

import torch
from timm.models.vision_transformer import VisionTransformer

from maekit.poolings import parts_of

# Under the root of a variance, so that patches that are all alike have a gradient.
VARIANCE_FLOOR = 1e-6


def poolings_of(encoder: VisionTransformer) -> tuple[str, ...]:
    """Return the poolings of one token or one mean that an encoder has: `avg`, and `cls` with a class token."""
    return ("avg", "cls") if encoder.has_class_token else ("avg",)


def pooled(encoder: VisionTransformer, tokens: torch.Tensor, pool: str) -> torch.Tensor:
    """Pool what `forward_features` gives: `[B, prefix + N, D]` -> `[B, k·D]`; k is `maekit.poolings.vectors_in(pool)`.

    Args:
        encoder: whose tokens they are.
        tokens: after the final norm.
        pool: parts, joined by `+`, that stand one after the other. `avg`: the mean of the patch tokens (class and
            register tokens left out). `cls`: the class token. `std`: the standard deviation of the patch tokens
            (statistics pooling, Snyder et al. 2018). `avg2x2`: the mean of each quarter of the image, row by row (one
            level of a spatial pyramid, Lazebnik et al. 2006). timm's norm behind the pooling, where the encoder has
            one, is for means and class tokens.
    """
    patches = tokens[:, encoder.num_prefix_tokens :]
    by_name = {
        "avg": lambda: encoder.fc_norm(patches.mean(dim=1)),
        "cls": lambda: encoder.fc_norm(tokens[:, 0]),
        "std": lambda: deviation(patches),
        "avg2x2": lambda: encoder.fc_norm(
            quarter_weights(encoder.patch_embed.grid_size).to(patches) @ patches  # [4, N] · [B, N, D] -> [B, 4, D]
        ).flatten(1),
    }
    parts = [by_name[name]() for name in parts_of(pool)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def deviation(patches: torch.Tensor) -> torch.Tensor:
    """Return how far the tokens of an image lie apart, channel by channel: `[B, N, D]` -> `[B, D]`."""
    centred = patches - patches.mean(dim=1, keepdim=True)
    return (centred.square().mean(dim=1) + VARIANCE_FLOOR).sqrt()


def quarter_weights(grid: tuple[int, int]) -> torch.Tensor:
    """Return what each patch counts in the mean of each quarter of a grid of (rows, columns): `[4, N]`.

    The middle row or column of an odd grid belongs to both sides, as in PyTorch's adaptive_avg_pool2d.
    """
    rows, columns = (
        torch.tensor([[float(place < (size + 1) // 2), float(place >= size // 2)] for place in range(size)]).T
        for size in grid
    )
    inside = torch.einsum("ar,bc->abrc", rows, columns).reshape(4, -1)  # [2, rows], [2, columns] -> [4, N]
    return inside / inside.sum(dim=1, keepdim=True)
