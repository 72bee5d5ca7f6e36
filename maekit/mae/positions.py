"""Fixed 2-D sine-cosine positions (Vaswani et al. 2017, section 3.5; 2-D as in MoCo v3, Chen et al. 2021)."""

import torch


def sincos_positions(
    width: int, grid: tuple[int, int], *, prefix_tokens: int, trained_grid: tuple[int, int] | None = None
) -> torch.Tensor:
    """Return the position embedding of every token.

    The first half of the channels encodes the column, the second half the row; each half is sin then cos over
    frequencies 10000^(-i/(D/4)).

    Args:
        width: D, a multiple of 4.
        grid: (rows, columns) of patches.
        prefix_tokens: number of zero rows in front, for class and register tokens.
        trained_grid: (rows, columns) of the grid that the coordinates span; the same by default. The centre of each
            patch gets the coordinate of the same spot of the image there.

    Returns:
        float32 `[1, prefix_tokens + rows * columns, D]`.
    """
    axes = [
        (torch.arange(count, dtype=torch.float64) + 0.5) * (trained / count) - 0.5
        for count, trained in zip(grid, trained_grid or grid, strict=True)
    ]
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    halves = []
    for axis in (columns, rows):
        angles = axis.reshape(-1, 1) * frequencies  # [N, 1] * [D/4] -> [N, D/4]
        halves += [angles.sin(), angles.cos()]
    positions = torch.cat(halves, dim=1)  # 4 x [N, D/4] -> [N, D]
    return torch.cat([positions.new_zeros(prefix_tokens, width), positions]).float().unsqueeze(0)
