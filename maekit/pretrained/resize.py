"""Weights at another image size or patch size than they were trained at.

What is done depends on the kind of weights:

    sine-cosine positions   evaluated at coordinates scaled to the trained grid: on a larger grid, whole numbers would
                            leave the range that was trained
    learned positions       interpolated, bicubic and antialiased, by timm
    patch projection        resampled by timm with the pseudo-inverse of a resize (FlexiViT, Beyer et al. 2023, 3.4)
"""

from collections.abc import Mapping

import torch
from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed

from maekit.mae.positions import sincos_positions

POSITIONS, PROJECTION = "pos_embed", "patch_embed.proj.weight"
# Positions that were stored in half precision still count as sine-cosine ones.
_SAME_POSITIONS = 2e-3

Grid = tuple[int, int]


def resized_encoder(
    weights: Mapping[str, torch.Tensor], *, old: Grid, new: Grid, patch_size: int
) -> tuple[dict[str, torch.Tensor], str]:
    """Return an encoder's weights for another grid of patches, or for patches of another size.

    Args:
        weights: under timm's names.
        old: (rows, columns) of patches that the weights were trained at.
        new: (rows, columns) of patches.
        patch_size: new side of a patch, in pixels.

    Returns:
        the weights, and what was done to them, in words; empty if the sizes are the same.
    """
    fitted, done = dict(weights), []
    if old != new:
        fitted[POSITIONS], how = resized_positions(weights[POSITIONS], old, new)
        done.append(f"its {how} positions are resized from {_said(old)} to {_said(new)} patches")
    trained = weights[PROJECTION].shape[-1]
    if trained != patch_size:
        fitted[PROJECTION] = resample_patch_embed(weights[PROJECTION], [patch_size, patch_size])
        done.append(f"its patches are resampled from {trained} to {patch_size} pixels")
    return fitted, " and ".join(done)


def resized_positions(positions: torch.Tensor, old: Grid, new: Grid) -> tuple[torch.Tensor, str]:
    """Return position embeddings for another grid, and which kind they are: `sine-cosine` or `learned`.

    Args:
        positions: `[1, prefix + rows · columns, D]`; those of class and register tokens stay as they are.
        old: (rows, columns) of patches.
        new: (rows, columns) of patches.
    """
    prefix = positions.shape[1] - old[0] * old[1]
    trained = trained_grid(positions[0, prefix:], old)
    if trained is None:
        return resample_abs_pos_embed(positions, list(new), list(old), num_prefix_tokens=prefix), "learned"
    patches = sincos_positions(positions.shape[2], new, prefix_tokens=0, trained_grid=trained).to(positions.dtype)
    return torch.cat([positions[:, :prefix], patches], dim=1), "sine-cosine"


def trained_grid(positions: torch.Tensor, grid: Grid) -> Grid | None:
    """Return the grid whose coordinates sine-cosine positions span, which may have been resized; None if learned.

    Args:
        positions: of the patches, `[rows · columns, D]`.
        grid: (rows, columns) of patches.
    """
    count, width = positions.shape
    if width % 4 or count != grid[0] * grid[1]:
        return None
    # [N, D] -> [rows, columns, (columns' sin, cos, rows' sin, cos), D/4]
    table = positions.detach().double().view(*grid, 4, width // 4)
    # Slow enough that a step of nine patches stays below half a turn, fast enough to be told from rounding.
    frequency = width // 32
    step = 10000.0 ** (frequency / (width // 4))
    trained = (_extent(table[:, 0, 2:, frequency], step), _extent(table[0, :, :2, frequency], step))
    if min(trained) < 1:
        return None
    expected = sincos_positions(width, grid, prefix_tokens=0, trained_grid=trained)[0]
    return trained if torch.allclose(positions.float(), expected, atol=_SAME_POSITIONS) else None


def _extent(points: torch.Tensor, step: float) -> int:
    """Return over how many patches an axis extends, from the (sin, cos) of its coordinates, `[n, 2]`; 0 if unclear.

    Args:
        points: at one frequency.
        step: the inverse of this frequency: coordinates in a radian.
    """
    if len(points) == 1:
        return 1
    angles = torch.atan2(points[:, 0], points[:, 1])
    between = torch.remainder(angles.diff(), 2 * torch.pi).mean() * step
    return round(float(between) * len(points)) if torch.isfinite(between) else 0


def _said(grid: Grid) -> str:
    return f"{grid[0]} x {grid[1]}"
