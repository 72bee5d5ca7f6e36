"""The loss on held-out images: the same images under the same masks every time, with evaluation preprocessing."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from maekit.images import Pixels, Preprocess
from maekit.mae.autoencoder import MaskedAutoencoder
from maekit.mae.mask_shapes import MaskShape
from maekit.mae.normalize import Normalizer
from maekit.pretraining.tokenizer import Tokenizer
from maekit.shards.read import ShardSet
from maekit.system.draws import Purpose, uniform_rows
from maekit.system.errors import ImageError, MaekitError
from maekit.training.distributed import DistributedContext


class Validation:
    """Measures the loss on held-out images.

    Args:
        shards: the held-out set.
        images: maximum number of images, evenly spaced over the set.
        prepare: the evaluation preprocessing.
        batch_size: images per forward pass.
        threads: threads that read and decode.
        seed: seed of the masks.
        world: the processes that divide the images.
        shape: shape of the masks.
        tokenizer: gives the target tokens, where tokens are predicted.
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        images: int,
        prepare: Preprocess,
        batch_size: int,
        threads: int,
        seed: int,
        world: DistributedContext,
        shape: MaskShape,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        count = min(images, shards.samples)
        numbers = [shards.samples * i // count for i in range(count)]
        self._numbers = list(enumerate(numbers))[world.rank :: world.size]
        self._shards, self._prepare, self._world, self._seed = shards, prepare, world, seed
        self._batch_size, self._threads = batch_size, max(1, threads)
        self._shape, self._tokenizer = shape, tokenizer

    def measure(
        self, model: MaskedAutoencoder, normalizer: Normalizer, forward: Callable[[], AbstractContextManager[Any]]
    ) -> dict[str, float]:
        """Return `val_loss`, the mean over all images on all ranks, and `val_images`, the number of readable images.

        Raises:
            MaekitError: no image could be read.
        """
        device = next(model.parameters()).device
        total = seen = 0.0
        for images, noise in self._batches():
            tokens = None
            if self._tokenizer is not None:
                tokens = self._tokenizer(images, torch.zeros(len(images), dtype=torch.bool)).to(device)
            with torch.no_grad(), forward():
                loss = model(normalizer(images.to(device)), noise.to(device), tokens).loss
            total += float(loss) * len(images)
            seen += len(images)
        total, seen = self._world.sum([total, seen])
        if not seen:
            raise MaekitError("`val`: none of the held-out images can be read")
        return {"val_loss": total / seen, "val_images": int(seen)}

    def _batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        images: list[Pixels] = []
        noise: list[np.ndarray[Any, np.dtype[np.float32]]] = []
        numbers = [number for _, number in self._numbers]
        decoded = self._shards.images(numbers, self._prepare, threads=self._threads)
        for (position, _), image in zip(self._numbers, decoded, strict=True):
            if not isinstance(image, ImageError):  # `val_images` does not count unreadable ones
                images.append(image)
                draws = uniform_rows(1, self._shape.draws, Purpose.VALIDATION, seed=self._seed, position=position)
                noise.append(self._shape.noise(draws)[0])
            if images and len(images) == self._batch_size:
                yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.from_numpy(np.stack(noise))
                images, noise = [], []
        if images:
            yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.from_numpy(np.stack(noise))
