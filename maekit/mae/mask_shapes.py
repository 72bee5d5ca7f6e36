"""Draws masks as one random number per patch; the patches with the smallest numbers are kept. Needs no torch.

    random   any patches (He et al. 2021, section 3)
    block    removes overlapping rectangles until enough is covered (Bao et al. 2021, "BEiT", algorithm 1)
    grid     keeps patches in a regular grid, as far apart as their number allows (He et al. 2021, figure 6)

A mask is a function of numbers drawn for the sample's position, so it does not depend on batch, worker or device. Every
image keeps the same number of patches, whatever the kind.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# The published values for the 196 patches of a ViT-B/16, scaled to other grids.
_SMALLEST_BLOCK = 16 / 196
_ASPECT = 0.3
# Nearly always enough to cover 3 of 4 patches. Patches still missing after this many blocks are removed at random.
_BLOCKS = 64
_DRAWS_PER_BLOCK = 4


def kept_patches(patches: int, mask_ratio: float) -> int:
    """Return K, the number of patches kept: int(N · (1 - ratio))."""
    return int(patches * (1 - mask_ratio))


@dataclass(frozen=True)
class MaskShape:
    """Kind and size of the masks to draw.

    Attributes:
        kind: `random`, `block` or `grid`.
        grid: (rows, columns) of patches.
        mask_ratio: share of patches removed.
    """

    kind: str
    grid: tuple[int, int]
    mask_ratio: float

    @property
    def patches(self) -> int:
        """N, the number of patches."""
        return self.grid[0] * self.grid[1]

    @property
    def draws(self) -> int:
        """Number of uniform random numbers that a mask needs."""
        return self.patches + {"random": 0, "block": _DRAWS_PER_BLOCK * _BLOCKS, "grid": 2}[self.kind]

    def noise(self, draws: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return the numbers that choose the masks; the K smallest of each row are kept.

        Args:
            draws: uniform in [0, 1), float64 `[n, draws]`.

        Returns:
            float32 `[n, N]`; for block and grid masks, 2 is added for removed patches.
        """
        noise = draws[:, : self.patches]
        if self.kind == "random":
            return noise.astype(np.float32)
        # Decided by rank in float64: rounding to float32 must not swap a kept and a removed patch.
        order = _rank(self._blocks(draws) if self.kind == "block" else self._grid(draws))
        is_removed = order >= kept_patches(self.patches, self.mask_ratio)
        return np.where(is_removed, 2 + noise, noise).astype(np.float32)

    def _blocks(self, draws: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return float64 `[n, N]`, larger for patches covered earlier; the last block is cut to the wanted number."""
        rows, columns = self.grid
        wanted = self.patches - kept_patches(self.patches, self.mask_ratio)
        smallest = max(1.0, _SMALLEST_BLOCK * self.patches)
        y, x = (axis.reshape(1, -1) for axis in np.indices(self.grid))
        blocks = draws[:, self.patches :].reshape(len(draws), _BLOCKS, _DRAWS_PER_BLOCK)
        level = np.zeros((len(draws), self.patches))
        for number in range(_BLOCKS):
            missing = wanted - (level > 0).sum(axis=1)
            if not (missing > 0).any():
                break
            area, aspect, top, left = blocks[:, number].T
            area = smallest + area * np.maximum(missing - smallest, 0)
            aspect = np.exp((2 * aspect - 1) * math.log(1 / _ASPECT))
            height = np.clip(np.rint(np.sqrt(area * aspect)), 1, rows)
            width = np.clip(np.rint(np.sqrt(area / aspect)), 1, columns)
            top, left = np.floor(top * (rows - height + 1)), np.floor(left * (columns - width + 1))
            inside = (y >= top[:, None]) & (y < (top + height)[:, None])
            inside &= (x >= left[:, None]) & (x < (left + width)[:, None])
            is_new = inside & (level == 0) & (missing > 0)[:, None]
            level[is_new] = _BLOCKS - number
        # Patches within a block are ordered line by line; patches outside all blocks are in random order.
        return level + np.where(level > 0, 1 - (y * columns + x) / self.patches, draws[:, : self.patches] - 1)

    def _grid(self, draws: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return float64 `[n, N]`: an ordered dither matrix (Bayer 1973), shifted at random."""
        side = 1 << max(1, (max(self.grid) - 1).bit_length())
        matrix = np.zeros((1, 1))
        while len(matrix) < side:
            matrix = np.block([[4 * matrix, 4 * matrix + 2], [4 * matrix + 3, 4 * matrix + 1]])
        down, right = (draws[:, self.patches :] * side).astype(np.int64).T
        y, x = (axis.reshape(1, -1) for axis in np.indices(self.grid))
        shifted: NDArray[np.float64] = matrix[(y + down[:, None]) % side, (x + right[:, None]) % side]
        return shifted


def _rank(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the rank of each value within its row: `[n, N]` -> int64 `[n, N]`."""
    return np.argsort(np.argsort(values, axis=1, kind="stable"), axis=1, kind="stable")
