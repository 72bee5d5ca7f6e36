"""What a run measures on held-out images (`data.val`): the loss, and what their embeddings are worth.

A falling loss says little about the embeddings. Their effective rank shows a collapse without labels; where the images
have labels, kNN among them shows whether the embeddings improve. Of N images the loss needs a masked forward pass
each, the embeddings the whole encoder: of fewer images, so that they take at most 2 % of the run's time.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from maekit.config import PretrainConfig, total_steps
from maekit.images import Preprocess
from maekit.shards.read import ShardSet
from maekit.system.errors import ImageError, MaekitError
from maekit.system.parallel import batched
from maekit.training.intervals import Intervals
from maekit.training.launch import Launch
from maekit.vectors.knn import leave_one_out_accuracy
from maekit.vectors.rank import collapse, effective_rank
from maekit.vectors.whitening import whiten_sample

# Share of the run's time that embeddings may take.
_SHARE = 0.02
# A training step costs three forward passes of the kept patches and those of the decoder, an embedding costs one of
# all patches. Of the three, two are counted: attention costs more than its share of the patches, and a compiled step
# less than this.
_FORWARD_PASSES = 2
# With fewer, kNN says little: where 2 % of the time do not suffice, it is measured less often instead.
_ENOUGH = 500
# Embedded at the end of a run that is too short even for these.
_FEWEST = 32


class Validation:
    """Measures the held-out images; the images and their masks are the same every time.

    Args:
        launch: the run.
        shards: the held-out shards.
        prepare: from bytes to pixels.
        loss: returns the mean loss of images, uint8 `[B, 3, H, W]`, by their positions in the set.
        embed: returns the embeddings of such images, `[B, D]`.
        batch_size: images per forward pass.
    """

    def __init__(
        self,
        launch: Launch[PretrainConfig],
        shards: ShardSet,
        *,
        prepare: Preprocess,
        loss: Callable[[torch.Tensor, Sequence[int]], float],
        embed: Callable[[torch.Tensor], NDArray[np.float32]],
        batch_size: int,
    ) -> None:
        self._world, self._progress = launch.world, launch.progress
        self._shards, self._prepare, self._loss, self._embed = shards, prepare, loss, embed
        self._batch_size = batch_size
        count = min(launch.config.data.val_images, shards.samples)
        # Evenly spaced over the set.
        self._numbers = [shards.samples * position // count for position in range(count)]
        self._schedule = EmbeddingSchedule.of(launch.config, launch.shards.samples, count)
        embedded = self._schedule.images
        self._embedded = [count * number // embedded for number in range(embedded)]  # positions
        self._classes: dict[int, float] = {}  # by position, of this rank's
        self._is_told = False

    def __call__(self, done: int) -> dict[str, Any]:
        """Return the row of metrics after `done` steps; called on all ranks, which divide the images.

        Keys: `val_loss`, the mean over `val_images` readable images. Where embeddings are due, `val_rank`, the
        effective rank of those of `val_embeddings` images; if these have labels, `val_knn` and `val_knn_whitened`, the
        share that is classified correctly by the nearest among the others.

        Raises:
            MaekitError: no image could be read.
        """
        positions = range(len(self._numbers))[self._world.rank :: self._world.size]
        numbers = [self._numbers[position] for position in positions]
        images = self._shards.images(numbers, self._prepare, threads=max(1, self._world.cores))
        # `val_images` does not count unreadable ones.
        found = zip(positions, images, strict=True)
        readable = ((position, image) for position, image in found if not isinstance(image, ImageError))
        embeds, vectors = self._schedule.is_due(done), dict[int, NDArray[np.float32]]()
        to_embed = set(self._embedded) if embeds else ()
        total = seen = 0.0
        for batch in batched(readable, self._batch_size):
            pixels = torch.from_numpy(np.stack([image for _, image in batch])).permute(0, 3, 1, 2)
            total += self._loss(pixels, [position for position, _ in batch]) * len(batch)
            seen += len(batch)
            if chosen := [at for at, (position, _) in enumerate(batch) if position in to_embed]:
                vectors |= zip([batch[at][0] for at in chosen], self._embed(pixels[chosen]), strict=True)
        total, seen = self._world.sum([total, seen])
        if not seen:
            raise MaekitError("`val`: none of the held-out images can be read")
        row = {"val_loss": total / seen, "val_images": int(seen)}
        return row | self._judge(*self._gather(vectors)) if embeds else row

    def _gather(self, vectors: dict[int, NDArray[np.float32]]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Return the embeddings of all ranks by position, `[n, D]`, and their classes, `[n]`; 0 for none."""
        self._classes = self._classes or self._read_classes()
        width = int(max(self._world.gather([len(next(iter(vectors.values()), ()))]))[0])
        # One row for each embedded position, of zeros for those of other ranks; the last column counts.
        mine = np.zeros((len(self._embedded), width + 2))
        for row, position in enumerate(self._embedded):
            if position in vectors:
                mine[row] = [*vectors[position], self._classes[position], 1]
        whole = np.array(self._world.sum(mine.ravel().tolist())).reshape(mine.shape)
        whole = whole[(whole[:, -1] == 1) & np.isfinite(whole).all(axis=1)]
        return whole[:, :-2].astype(np.float32), whole[:, -2]

    def _read_classes(self) -> dict[int, float]:
        """Return the class of each embedded image of this rank as a number of its own, by position; 0 for none."""
        mine = [position for position in self._embedded if position % self._world.size == self._world.rank]
        numbers = [self._numbers[position] for position in mine]
        texts = map(self._shards.in_words, numbers, self._shards.labels(numbers))
        return dict(zip(mine, map(_class_number, texts), strict=True))

    def _judge(self, vectors: NDArray[np.float32], classes: NDArray[np.float64]) -> dict[str, Any]:
        """Return the part of the row that tells of embeddings; empty if there is none. Notes a collapse once."""
        if not self._world.is_main or not len(vectors):
            return {}
        found: dict[str, Any] = {"val_rank": effective_rank(vectors), "val_embeddings": len(vectors)}
        _, labels, counts = np.unique(classes, return_inverse=True, return_counts=True)
        is_judged = (classes != 0) & (counts[labels] > 1)  # the only one of its class can never be right
        if len(np.unique(labels[is_judged])) > 1:
            found["val_knn"] = leave_one_out_accuracy(vectors[is_judged], labels[is_judged])
            whitened, _ = whiten_sample(vectors)
            found["val_knn_whitened"] = leave_one_out_accuracy(whitened[is_judged], labels[is_judged])
        said = collapse(found["val_rank"], len(vectors))
        if said and not self._is_told:
            self._progress.note(f"{said}; a lower `lr`, a longer warm-up or `clip_grad=1` usually help")
        self._is_told = said is not None
        return found


@dataclass(frozen=True)
class EmbeddingSchedule:
    """How many held-out images are embedded, and at which validations.

    Attributes:
        images: number of images, the same each time.
        validate: steps between validations.
        last: the last step, whose validation always embeds.
        every: embed at each n-th validation.
    """

    images: int
    validate: int
    last: int
    every: int

    def is_due(self, done: int) -> bool:
        """Whether the validation after `done` steps embeds."""
        return (-(-self.last // self.validate) + -done // self.validate) % self.every == 0

    @classmethod
    def of(cls, config: PretrainConfig, samples: int, held_out: int) -> "EmbeddingSchedule":
        """Return the schedule that takes at most 2 % of a run's time.

        Args:
            config: settings of the run.
            samples: number of training images.
            held_out: number of held-out images that there are to embed.
        """
        last = total_steps(config, samples)
        validate = Intervals.of(config.run, last).validate
        validations = -(-last // validate)
        kept = (1 - config.model.mask_ratio) * config.model.masks_per_image
        budget = _SHARE * _FORWARD_PASSES * kept * last * config.batch_size  # images over the whole run
        images = int(max(_FEWEST, budget / validations, min(budget, _ENOUGH)))
        images = min(images, held_out)
        times = max(1, min(validations, int(budget / images)))
        return cls(images, validate, last, every=-(-validations // times))


def _class_number(text: str) -> float:
    """Return a number for a class by its name, the same on every rank; 0 for none."""
    return float(int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")) if text else 0.0
