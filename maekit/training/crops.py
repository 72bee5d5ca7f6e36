"""From a position in the sample order to a training image: read, decode as much as the crop needs, crop, resize.

All randomness here is a function of (seed, epoch, position), never of the worker that does the work.
"""

import contextlib
import functools
import itertools
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from torch.nn import functional
from torch.utils.data import get_worker_info

from maekit.config import DataConfig, TrainingConfig
from maekit.images import CROP_DRAWS, Box, Pixels, Preprocess, fixed_crop, open_crop, random_resized_crop, reduction_of
from maekit.mae.mask_shapes import MaskShape
from maekit.shards.order import SampleOrder, SampleSlice
from maekit.shards.read import MemberReader, ShardSet
from maekit.system.draws import Purpose, random_bits, uniform_rows
from maekit.system.errors import ImageError, MaekitError
from maekit.training.fetch_ahead import FetchAhead
from maekit.training.image_cache import DecodedSet

_SUBSTITUTE_ATTEMPTS = 64
_WORTH_TORCH = 96 * 96  # pixels
# A JPEG is decoded at a reduced scale while the crop keeps at least this many times the input's pixels along each side.
# The result is then on average within one level (of 255) of that from the full image.
_LEAST = 2
JITTER_DRAWS = 4
_ORDERS = tuple(itertools.permutations(range(3)))


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of a training image (He et al. 2021, table 1e), determined by its position in the order.

    Attributes:
        size: (height, width) of the crop after resizing, in pixels.
        covered: for a crop of fixed size, the (height, width) that the whole image would just cover.
        seed: the run's seed.
        kind: `random_resized_crop`, `fixed_crop` or `none`.
        scale: bounds of the area of a random resized crop, as a fraction of the image.
        flip: whether half of the images are mirrored.
        color_jitter: how far brightness, contrast and saturation may change.
        policy: changes an image with its own random numbers, as RandAugment does: uint8 `[3, H, W]` and a 64-bit
            seed -> uint8 `[3, H, W]`.
    """

    size: tuple[int, int]
    covered: tuple[int, int]
    seed: int
    kind: str = DataConfig.augmentation
    scale: tuple[float, float] = DataConfig.crop_scale
    flip: bool = DataConfig.flip
    color_jitter: float = DataConfig.color_jitter
    policy: Callable[[Pixels, int], Pixels] | None = None

    @classmethod
    def of(
        cls, config: TrainingConfig, prepare: Preprocess, policy: Callable[[Pixels, int], Pixels] | None = None
    ) -> "Augmentation":
        """Return the augmentation that a config describes, for the sizes of its evaluation preprocessing."""
        data = config.data
        kind, scale, flip, jitter = data.augmentation, data.crop_scale, data.flip, data.color_jitter
        return cls(prepare.size, prepare.resize, config.seed, kind, scale, flip, jitter, policy)

    def crop(self, width: int, height: int, draws: NDArray[np.float64]) -> Box:
        """Choose the crop of an image from the numbers drawn for its position, float64 `[CROP_DRAWS]`."""
        if self.kind == "random_resized_crop":
            return random_resized_crop(width, height, draws, scale=self.scale, aspect=self.size[1] / self.size[0])
        offset = (0.5, 0.5) if self.kind == "none" else (float(draws[20]), float(draws[21]))
        return fixed_crop(width, height, self.covered, self.size, offset)


@dataclass
class Chunk:
    """A group of images of one step, as a worker returns them.

    Attributes:
        images: uint8 `[B, 3, H, W]`.
        flips: bool `[B]`, True = mirror.
        noise: float32 `[B, k·N]`, selects k masks for each image.
        bad: one line for each replaced sample.
        labels: labels of the images, int64 `[B]`; None where they are not requested.
    """

    images: torch.Tensor
    flips: torch.Tensor
    noise: torch.Tensor
    bad: list[str]
    labels: torch.Tensor | None = None

    def pin_memory(self) -> "Chunk":
        """Copy into pinned memory, so that the upload overlaps with computation (the DataLoader calls this)."""
        images, flips, noise = (tensor.pin_memory() for tensor in (self.images, self.flips, self.noise))
        return Chunk(images, flips, noise, self.bad, None if self.labels is None else self.labels.pin_memory())


class Draws(NamedTuple):
    """The random numbers of n positions.

    Attributes:
        crops: float64 `[n, 22]`.
        flips: bool `[n]`.
        noise: noise for k masks, float32 `[n, k·N]`.
        jitter: float64 `[n, 4]`: three factors and their order.
        policy: seeds, uint64 `[n]`.
    """

    crops: NDArray[np.float64]
    flips: NDArray[np.bool_]
    noise: NDArray[np.float32]
    jitter: NDArray[np.float64]
    policy: NDArray[np.uint64]


def draw(samples: SampleSlice, augmentation: Augmentation, shape: MaskShape, masks: int = 1) -> Draws:
    """Draw the random numbers of some samples, each from its own epoch and position.

    Args:
        samples: a slice of the order.
        augmentation: augmentation of their images.
        shape: shape of the masks.
        masks: k, masks per image.
    """
    by_epoch = []
    # Positions count up within an epoch; a batch may extend into the next epoch.
    starts = np.flatnonzero(np.diff(samples.epochs, prepend=-1)).tolist()
    for start, stop in itertools.pairwise([*starts, len(samples.epochs)]):
        epoch, position, rows = int(samples.epochs[start]), int(samples.positions[start]), stop - start
        numbers = functools.partial(uniform_rows, rows, seed=augmentation.seed, epoch=epoch, position=position)
        mirrors = augmentation.flip and augmentation.kind != "none"
        flips = numbers(1, Purpose.FLIP)[:, 0] < 0.5 if mirrors else np.zeros(rows, bool)
        noise = shape.noise(numbers(masks * shape.draws, Purpose.MASK).reshape(rows * masks, -1)).reshape(rows, -1)
        jitter = numbers(JITTER_DRAWS, Purpose.JITTER) if augmentation.color_jitter else np.zeros((rows, JITTER_DRAWS))
        seeds = (numbers(1, Purpose.POLICY)[:, 0] * 2.0**53).astype(np.uint64)
        by_epoch.append((numbers(CROP_DRAWS, Purpose.CROP), flips, noise, jitter, seeds))
    return Draws(*(np.concatenate(column) for column in zip(*by_epoch, strict=True)))


class WorkerProgress:
    """Shared-memory table of the sample each worker is reading, one row per worker. Freed when the last process exits.

    A row holds the process id, the shard and the ordinal being read (-1: none), and a counter of updates.
    """

    IDLE = -1

    def __init__(self, workers: int) -> None:
        self._memory = mmap.mmap(-1, max(1, workers) * 4 * 8)
        self.rows: NDArray[np.int64] = np.frombuffer(self._memory, np.int64).reshape(-1, 4)
        self.rows[:, 1:3] = self.IDLE

    def at(self, shard: int, ordinal: int) -> None:
        """Record the sample that this worker is reading."""
        info = get_worker_info()
        row = self.rows[info.id if info else 0]
        row[:] = os.getpid(), shard, ordinal, row[3] + 1

    def pause(self) -> None:
        """Record that this worker is not reading."""
        self.at(self.IDLE, self.IDLE)


class CropLoader:
    """Turns slices of the sample order into chunks.

    Args:
        shards: the data.
        order: order of the samples; determines which remote shards are needed next.
        augmentation: augmentation of the images.
        shape: shape of the masks.
        masks: masks per image.
        watch: receives the sample being read.
        decoded: images kept decoded in memory.
        labels: label of each sample by its number in `shards`, int64 `[samples]`; -1 where there is none. A sample
            without a label is replaced, like one without an image.
    """

    def __init__(
        self,
        shards: ShardSet,
        order: SampleOrder,
        augmentation: Augmentation,
        shape: MaskShape,
        *,
        masks: int = 1,
        watch: WorkerProgress | None = None,
        decoded: DecodedSet | None = None,
        labels: NDArray[np.int64] | None = None,
    ) -> None:
        self.size = augmentation.size
        self.watch, self.decoded = watch or WorkerProgress(1), decoded
        self._shards, self._order, self._augmentation = shards, order, augmentation
        self._shape, self._masks, self._labels = shape, masks, labels

    def __call__(self, slices: Iterator[SampleSlice]) -> Iterator[Chunk | MaekitError]:
        """Yield the chunk of each slice; if an error stops the work, the last item is that error.

        Raised in a worker, it would reach the user inside the worker's traceback.
        """
        with contextlib.closing(self._shards.reader()) as reader:
            try:
                for samples in self._fetching_ahead(slices) if self._shards.remote else slices:
                    chunk = self._chunk(reader, samples)
                    self.watch.pause()
                    yield chunk
            except MaekitError as error:
                yield MaekitError(str(error))

    def _chunk(self, reader: MemberReader, samples: SampleSlice) -> Chunk:
        augmentation = self._augmentation
        draws = draw(samples, augmentation, self._shape, self._masks)
        batch = _empty_images(len(samples.epochs), augmentation.size)
        images, labels = batch.numpy(), np.zeros(len(samples.epochs), np.int64)
        bad = []
        for number, (shard, ordinal) in enumerate(zip(samples.shards.tolist(), samples.ordinals.tolist(), strict=True)):
            crop = draws.crops[number]
            try:
                images[number], labels[number] = self._sample(reader, shard, ordinal, crop)
            except ImageError as error:
                bad.append(f"{name_of(self._shards, shard, ordinal)}: {error.reason}, {error}")
                position = int(samples.epochs[number]), int(samples.positions[number])
                images[number], labels[number] = self._substitute(reader, position, crop, bad[-1])
            if augmentation.color_jitter:
                images[number] = jitter_colors(images[number], augmentation.color_jitter, draws.jitter[number])
            if augmentation.policy is not None:
                images[number] = augmentation.policy(images[number], int(draws.policy[number]))
        wanted = None if self._labels is None else torch.from_numpy(labels)
        return Chunk(batch, torch.from_numpy(draws.flips), torch.from_numpy(draws.noise), bad, wanted)

    def _sample(self, reader: MemberReader, shard: int, ordinal: int, draws: NDArray[np.float64]) -> tuple[Pixels, int]:
        """Return crop and label of a sample; the label is 0 if none are requested."""
        label = 0 if self._labels is None else int(self._labels[self._shards.number(shard, ordinal)])
        if label < 0:
            raise ImageError("no_label", "no label of a known class")
        return self._crop(reader, shard, ordinal, draws), label

    def _crop(self, reader: MemberReader, shard: int, ordinal: int, draws: NDArray[np.float64]) -> Pixels:
        self.watch.at(shard, ordinal)
        size = self._augmentation.size
        at_least = _LEAST * size[0], _LEAST * size[1]

        def choose(width: int, height: int) -> Box:
            return self._augmentation.crop(width, height, draws)

        if self.decoded is not None and (pixels := self.decoded.image(shard, ordinal)) is not None:
            left, top, right, bottom = choose(pixels.shape[1], pixels.shape[0])
            # A JPEG that would be decoded at a reduced scale still is; otherwise the cache would change the images.
            if reduction_of((right - left, bottom - top), at_least) == 1:
                return resize(pixels[top:bottom, left:right], size)
        image, box = open_crop(reader.read_image(self._shards.index(shard), ordinal), choose, at_least=at_least)
        return resize(image.crop(box), size)

    def _substitute(
        self, reader: MemberReader, position: tuple[int, int], draws: NDArray[np.float64], first: str
    ) -> tuple[Pixels, int]:
        """Return crop and label of a substitute, which depends on the (epoch, position) of the bad sample."""
        seed, (epoch, within) = self._augmentation.seed, position
        bits = random_bits(_SUBSTITUTE_ATTEMPTS, Purpose.SUBSTITUTE, seed=seed, epoch=epoch, position=within)
        for number in bits % np.uint64(self._shards.samples):
            with contextlib.suppress(ImageError):
                return self._sample(reader, *self._shards.locate(int(number)), draws)
        raise MaekitError(f"{_SUBSTITUTE_ATTEMPTS} samples in a row cannot be used, the first: {first}")

    def _fetching_ahead(self, slices: Iterator[SampleSlice]) -> Iterator[SampleSlice]:
        """Pass slices on while downloading the remote shards of their window and of the next one."""
        fetcher: FetchAhead | None = None
        try:
            for samples in slices:
                first, last = (
                    int(samples.epochs[i]) * self._order.samples + int(samples.positions[i]) for i in (0, -1)
                )
                fetcher = fetcher or FetchAhead(self._shards.fetch, self._order, first)
                fetcher.reach(last)
                yield samples
        finally:
            if fetcher is not None:
                fetcher.stop()


def name_of(shards: ShardSet, shard: int, ordinal: int) -> str:
    """Return the name of a sample for messages: its shard and its key."""
    return f"{shards.shards[shard].name} {shards.index(shard).key(ordinal)}"


def _empty_images(count: int, size: tuple[int, int]) -> torch.Tensor:
    """Return an uninitialised uint8 `[B, 3, H, W]`; in a worker, in memory shared with the main process.

    Otherwise the DataLoader copies the images there; both copies cost more in page faults than in bytes moved.
    """
    if get_worker_info() is None:
        return torch.empty(count, 3, *size, dtype=torch.uint8)
    # torch's own default_collate does the same; there is no public function for it.
    storage = torch.UntypedStorage._new_shared(count * 3 * size[0] * size[1])
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(count, 3, *size)


def resize(crop: Image.Image | Pixels, size: tuple[int, int]) -> Pixels:
    """Resize a crop, antialiased bicubic: RGB image or uint8 `[h, w, 3]` -> uint8 `[3, H, W]`.

    The uint8 kernels of PyTorch and Pillow differ from exact arithmetic, and so from each other, only by rounding.
    PyTorch takes a third of the time on large crops, but one call costs as much as resizing a small crop in Pillow.
    """
    height, width = size
    if height * width < _WORTH_TORCH:
        image = crop if isinstance(crop, Image.Image) else Image.fromarray(crop)
        return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None]  # [h, w, C] -> [1, C, h, w]
    resized = functional.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    return resized[0].numpy()  # [1, C, H, W] -> [C, H, W]


def jitter_colors(pixels: Pixels, strength: float, draws: NDArray[np.float64]) -> Pixels:
    """Change brightness, contrast and saturation by random factors in random order, like torchvision's ColorJitter.

    Args:
        pixels: uint8 `[3, H, W]`.
        strength: s; the factors lie in [1 - s, 1 + s].
        draws: uniform in [0, 1), float64 `[JITTER_DRAWS]`.

    Returns:
        uint8 `[3, H, W]`.
    """
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    for number in _ORDERS[int(draws[3] * len(_ORDERS))]:
        factor = 1 + strength * (2 * float(draws[number]) - 1)
        image = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[number](image).enhance(factor)
    return np.asarray(image).transpose(2, 0, 1)
