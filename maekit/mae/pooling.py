"""From an encoder's tokens to one vector per image."""

import torch
from timm.models.vision_transformer import VisionTransformer


def poolings_of(encoder: VisionTransformer) -> tuple[str, ...]:
    """Return the poolings of one token or one mean that an encoder has: `avg`, and `cls` with a class token."""
    return ("avg", "cls") if encoder.has_class_token else ("avg",)


def pooled(encoder: VisionTransformer, tokens: torch.Tensor, pool: str) -> torch.Tensor:
    """Pool what `forward_features` gives: `[B, prefix + N, D]` -> `[B, D]`, `[B, 2D]` for `avg+cls`.

    Args:
        encoder: whose tokens they are.
        tokens: after the final norm.
        pool: `avg`, the mean of the patch tokens (class and register tokens left out); `cls`, the class token;
            `avg+cls`, one after the other. timm's norm behind the pooling follows, where the encoder has one.
    """
    by_name = {"avg": lambda: tokens[:, encoder.num_prefix_tokens :].mean(dim=1), "cls": lambda: tokens[:, 0]}
    parts = [encoder.fc_norm(by_name[name]()) for name in pool.split("+")]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
