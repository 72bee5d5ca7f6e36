"""The picture of a run: the same few images under the same masks every time."""

import numpy as np
import torch

from maekit.images import Pixels, Preprocess
from maekit.mae.mask_shapes import MaskShape
from maekit.mae.reconstruction import images_of, reconstruct
from maekit.shards.read import ShardSet
from maekit.sheet import sheet
from maekit.system.draws import Purpose, uniforms
from maekit.system.errors import ImageError
from maekit.training.step import MaskedObjective

_IMAGES = 8


def draw_samples(
    objective: MaskedObjective, shards: ShardSet, prepare: Preprocess, shape: MaskShape, *, seed: int
) -> Pixels | None:
    """Draw masked | reconstruction | original for eight evenly spaced samples.

    Args:
        objective: the objective, in training mode before and after.
        shards: the training set.
        prepare: the evaluation preprocessing.
        shape: shape of the masks.
        seed: seed of the masks.

    Returns:
        uint8 `[H, W, 3]`, or None if none of them can be read.
    """
    # The picture leaves out unreadable images; training counts them as bad.
    found = shards.images(shards.spread(_IMAGES), prepare)
    images = [torch.from_numpy(image.copy()) for image in found if not isinstance(image, ImageError)]
    if not images:
        return None
    model, normalizer = objective.model, objective.normalizer
    device = next(model.parameters()).device
    draws = [uniforms(shape.draws, Purpose.PICTURE, seed=seed, position=i) for i in range(len(images))]
    noise = torch.from_numpy(shape.noise(np.stack(draws))).to(device)
    originals = normalizer(torch.stack(images).permute(0, 3, 1, 2).to(device))
    model.eval()
    shown = reconstruct(model, originals, noise)
    model.train()
    return sheet([images_of(normalizer.to_pixels(x)) for x in (shown.masked, shown.overlaid, originals)])
