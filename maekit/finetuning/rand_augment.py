"""RandAugment (Cubuk et al. 2020) by timm, with random numbers determined by a sample's position."""

import random

import numpy as np
from PIL import Image, ImageOps
from timm.data.auto_augment import rand_augment_transform

from maekit.images import Pixels
from maekit.system.errors import InputError

_TRANSLATION = 0.45


def _posterize(image: Image.Image, bits: int, **unused: object) -> Image.Image:
    """Keep the highest bits of each channel, at least one. timm sometimes asks for 0, which Pillow rejects."""
    return image if bits >= 8 else ImageOps.posterize(image, max(1, bits))


class RandAugment:
    """Changes an image by random operations.

    Args:
        policy: policy in timm's notation, such as `rand-m9-mstd0.5-inc1`.
        size: (height, width) of the images, in pixels.
        mean: mean colour, in [0, 1]; fills the area that a geometric operation exposes.

    Raises:
        InputError: timm knows no such policy.
    """

    def __init__(self, policy: str, size: tuple[int, int], mean: tuple[float, ...]) -> None:
        hparams = {
            "translate_const": int(min(size) * _TRANSLATION),
            "img_mean": tuple(min(255, round(255 * value)) for value in mean),
        }
        try:
            self._transform = rand_augment_transform(policy, hparams)
        except Exception as error:  # timm raises various types for a bad policy
            raise InputError(f"mix.rand_augment = {policy!r}: timm knows no such policy ({error!r})") from error
        for operation in self._transform.ops:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize

    def __call__(self, pixels: Pixels, seed: int) -> Pixels:
        """Augment one image with the random numbers of a seed: uint8 `[3, H, W]` -> uint8 `[3, H, W]`."""
        # timm draws from the global generators; the loader workers use them for nothing else.
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        return np.asarray(self._transform(image)).transpose(2, 0, 1)
