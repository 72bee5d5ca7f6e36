"""Masks of every shape: counted, drawn, and a function of their own numbers."""

import numpy as np
import pytest
import torch

from maekit.mae.mask_shapes import MaskShape, kept_patches
from maekit.mae.masking import random_masking

RANDOM = np.random.default_rng(0)


def removed(shape: MaskShape, count: int, seed: int = 0) -> np.ndarray:
    """Return masks as the model makes them, bool `[count, rows, columns]`."""
    noise = shape.noise(np.random.default_rng(seed).random((count, shape.draws)))
    return random_masking(torch.from_numpy(noise), shape.mask_ratio).mask.numpy().reshape(count, *shape.grid) > 0


def drawn(mask: np.ndarray) -> list[str]:
    return ["".join("#" if value else "." for value in row) for row in mask]


@pytest.mark.parametrize("kind", ["random", "block", "grid"])
@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (3, 11), (1, 2), (16, 5)])
def test_every_row_keeps_the_same_number(kind: str, grid: tuple[int, int]) -> None:
    for ratio in (0.01, 0.3, 0.5, 0.75, 0.9, 0.99):
        shape = MaskShape(kind, grid, ratio)
        assert (removed(shape, 40).sum((1, 2)) == shape.patches - kept_patches(shape.patches, ratio)).all()


@pytest.mark.parametrize("kind", ["random", "block", "grid"])
def test_a_mask_hangs_on_its_own_numbers(kind: str) -> None:
    """Drawn alone or among others; and each patch of an image is removed about as often as wanted."""
    shape = MaskShape(kind, (6, 8), 0.75)
    draws = RANDOM.random((300, shape.draws))
    together = shape.noise(draws)
    assert together.dtype == np.float32
    assert np.array_equal(together[7:9], np.concatenate([shape.noise(draws[7:8]), shape.noise(draws[8:9])]))
    often = removed(shape, 2000).mean(0)
    # Blocks lie within the image, so its corners are in fewer of them.
    assert often.min() > (0.3 if kind == "block" else 0.7)
    assert often.max() < 0.97


def test_grid_masks_keep_one_of_four_as_the_paper_draws_them() -> None:
    """He et al. 2021, figure 6: every second patch of every second row, somewhere; half of them is a chessboard."""
    seen = set()
    for mask in removed(MaskShape("grid", (14, 14), 0.75), 60):
        rows, columns = np.nonzero(~mask)
        assert len({*rows % 2}) == len({*columns % 2}) == 1
        assert len(rows) == 49
        seen.add((rows[0] % 2, columns[0] % 2))
    assert len(seen) == 4
    half = removed(MaskShape("grid", (4, 6), 0.5), 1)[0]
    assert drawn(half) in (["#.#.#.", ".#.#.#"] * 2, [".#.#.#", "#.#.#."] * 2)


def covers(mask: np.ndarray) -> float:
    """Return the share of removed patches with a removed one on both sides, or above and below."""
    inner = np.zeros_like(mask)
    inner[1:-1] |= mask[:-2] & mask[2:]
    inner[:, 1:-1] |= mask[:, :-2] & mask[:, 2:]
    return float((inner & mask).sum() / mask.sum())


def test_block_masks_are_blocks() -> None:
    """By hand: one block of known place; by number: removed patches lie together, in rectangles of 16 or more."""
    shape = MaskShape("block", (14, 14), 0.1)  # 20 removed: one block of at most 20
    draws = np.zeros((1, shape.draws))
    draws[0, 196:200] = 1 - 1e-9, 0.5, 0.5, 1 - 1e-9  # the largest, a square, in the middle, at the right edge
    draws[0, 200:204] = 0, 0.5, 0, 0  # 16 patches at the top left, of which those missing count
    mask = np.zeros((14, 14), bool)
    mask[5:9, 10:14] = True  # 4 x 4 of √20 · √20
    mask[0, :4] = True
    assert drawn((shape.noise(draws) >= 2).reshape(14, 14)) == drawn(mask)
    blocks, random = (
        np.mean([covers(mask) for mask in removed(MaskShape(kind, (14, 14), 0.5), 200)]) for kind in ("block", "random")
    )
    assert blocks > 0.85 > 0.6 > random


def test_predicted_patches_are_any_of_the_removed() -> None:
    """Partial prediction takes the first removed ones: they must be in random order, whatever the mask's shape."""
    for kind in ("random", "block", "grid"):
        shape = MaskShape(kind, (4, 4), 0.5)
        noise = torch.from_numpy(shape.noise(np.random.default_rng(3).random((4000, shape.draws))))
        masking = random_masking(noise, 0.5)
        first = torch.bincount(masking.ids_masked[:, 0], minlength=16)
        everywhere = masking.mask.sum(0) / 8
        assert torch.allclose(first.float(), everywhere, rtol=0.3)
