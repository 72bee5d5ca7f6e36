"""Converts uint8 images to the model's input, on the device."""

import torch

from maekit.images import LUMA


class Normalizer:
    """Normalises uint8 images to the model's input.

    Args:
        mean: mean per channel, of values in [0, 1].
        std: standard deviation per channel, of values in [0, 1].
        device: device of the images. The constants are not module buffers: those would be broadcast to all ranks.
        channels: channels of the model's input; 1 means the luma of RGB, with the luma of `mean` and `std`.
    """

    def __init__(
        self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, *, channels: int = 3
    ) -> None:
        mean64, std64 = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        self._luma: torch.Tensor | None = None
        if channels == 1:
            luma = torch.tensor(LUMA, dtype=torch.float64)
            self._luma = luma.float().view(1, -1, 1, 1).to(device)
            mean64, std64 = (luma @ mean64).view(1), (luma @ std64).view(1)
        self._scale = (1 / (255 * std64)).float().view(1, -1, 1, 1).to(device)
        self._shift = (mean64 / std64).float().view(1, -1, 1, 1).to(device)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise: uint8 `[B, 3, H, W]` -> float32 `[B, C, H, W]`."""
        pixels = images.float()
        if self._luma is not None:
            pixels = (pixels * self._luma).sum(dim=1, keepdim=True)
        return pixels * self._scale - self._shift

    def to_pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Undo the normalisation: float32 `[B, C, H, W]` -> uint8 `[B, 3, H, W]`."""
        pixels = ((images + self._shift) / self._scale).round().clamp(0, 255).to(torch.uint8)
        return pixels.expand(-1, 3, -1, -1)
