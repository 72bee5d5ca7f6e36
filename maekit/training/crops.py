"""From a position in the sample order to a training image: read, decode as much as the crop needs, crop, resize.

All randomness here is a function of (seed, epoch, position), never of the worker that does the work.
"""

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

from maekit.config import DataConfig
from maekit.images import CROP_DRAWS, Box, Pixels, fixed_crop, open_crop, random_resized_crop, reduction_of
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

    def crop(self, width: int, height: int, draws: NDArray[np.float64]) -> Box:
        """Choose the crop of an image from the numbers drawn for its position, float64 `[CROP_DRAWS]`."""
        if self.kind == "random_resized_crop":
            return random_resized_crop(width, height, draws, scale=self.scale, aspect=self.size[1] / self.size[0])
        place = (0.5, 0.5) if self.kind == "none" else (float(draws[20]), float(draws[21]))
        return fixed_crop(width, height, self.covered, self.size, place)


@dataclass
class Chunk:
    """A group of images of one step, as a worker returns them.

    Attributes:
        images: uint8 `[B, 3, H, W]`.
        flips: bool `[B]`, True = mirror.
        noise: float32 `[B, k·N]`, selects k masks for each image.
        bad: one line for each replaced sample.
        failure: why the worker stopped; there are no images then.
        labels: labels of the images, int64 `[B]`; None where they are not requested.
    """

    images: torch.Tensor
    flips: torch.Tensor
    noise: torch.Tensor
    bad: list[str]
    failure: str | None = None
    labels: torch.Tensor | None = None

    def pin_memory(self) -> "Chunk":
        """Copy into pinned memory, so that the upload overlaps with computation (the DataLoader calls this)."""
        images, flips, noise = (tensor.pin_memory() for tensor in (self.images, self.flips, self.noise))
        labels = None if self.labels is None else self.labels.pin_memory()
        return Chunk(images, flips, noise, self.bad, self.failure, labels)

    @classmethod
    def of_failure(cls, error: MaekitError) -> "Chunk":
        """Return a chunk that carries an error; an exception would reach the user inside the worker's traceback."""
        empty = torch.empty(0)
        return cls(empty, empty, empty, [], str(error))


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


def draw(places: SampleSlice, augmentation: Augmentation, shape: MaskShape, masks: int = 1) -> Draws:
    """Draw the random numbers of some samples, each from its own epoch and position.

    Args:
        places: the samples, a slice of the order.
        augmentation: augmentation of their images.
        shape: shape of the masks.
        masks: k, masks per image.
    """
    parts = []
    # Positions count up within an epoch; a batch may extend into the next epoch.
    starts = np.flatnonzero(np.diff(places.epochs, prepend=-1))
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(places.epochs)], strict=True):
        epoch, position, rows = int(places.epochs[start]), int(places.positions[start]), stop - start

        def numbers(
            count: int, purpose: Purpose, rows: int = rows, epoch: int = epoch, position: int = position
        ) -> NDArray[np.float64]:
            return uniform_rows(rows, count, purpose, seed=augmentation.seed, epoch=epoch, position=position)

        mirrors = augmentation.flip and augmentation.kind != "none"
        flips = numbers(1, Purpose.FLIP)[:, 0] < 0.5 if mirrors else np.zeros(rows, bool)
        noise = shape.noise(numbers(masks * shape.draws, Purpose.MASK).reshape(rows * masks, -1)).reshape(rows, -1)
        jitter = numbers(JITTER_DRAWS, Purpose.JITTER) if augmentation.color_jitter else np.zeros((rows, JITTER_DRAWS))
        seeds = (numbers(1, Purpose.POLICY)[:, 0] * 2.0**53).astype(np.uint64)
        parts.append((numbers(CROP_DRAWS, Purpose.CROP), flips, noise, jitter, seeds))
    return Draws(*(np.concatenate(column) for column in zip(*parts, strict=True)))


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
        self._labels = labels
        self._shards, self._order, self._augmentation = shards, order, augmentation
        self._shape, self._masks, self._decoded = shape, masks, decoded
        self._watch = watch or WorkerProgress(1)

    def __call__(self, slices: Iterator[SampleSlice]) -> Iterator[Chunk]:
        """Yield the chunk of each slice; if an error stops the work, the last chunk carries it."""
        reader = self._shards.reader()
        try:
            for places in self._fetching_ahead(slices) if self._shards.remote else slices:
                chunk = self._chunk(reader, places)
                self._watch.pause()
                yield chunk
        except MaekitError as error:
            yield Chunk.of_failure(error)
        finally:
            reader.close()

    def _chunk(self, reader: MemberReader, places: SampleSlice) -> Chunk:
        augmentation = self._augmentation
        draws = draw(places, augmentation, self._shape, self._masks)
        batch = _empty_images(len(places.epochs), augmentation.size)
        images = batch.numpy()
        bad = []
        labels = np.zeros(len(places.epochs), np.int64)
        columns = zip(*(c.tolist() for c in (places.shards, places.ordinals)), strict=True)
        for number, (shard, ordinal) in enumerate(columns):
            try:
                labels[number] = self._label(shard, ordinal)
                images[number] = self._crop(reader, shard, ordinal, draws.crops[number])
            except ImageError as error:
                key = self._shards.index(shard).key(ordinal)
                bad.append(f"{self._shards.shards[shard].name} {key}: {error.reason}, {error}")
                place = int(places.epochs[number]), int(places.positions[number])
                images[number], labels[number] = self._substitute(reader, place, draws.crops[number], bad[-1])
            if augmentation.color_jitter:
                images[number] = jitter_colors(images[number], augmentation.color_jitter, draws.jitter[number])
            if augmentation.policy is not None:
                images[number] = augmentation.policy(images[number], int(draws.policy[number]))
        told = None if self._labels is None else torch.from_numpy(labels)
        return Chunk(batch, torch.from_numpy(draws.flips), torch.from_numpy(draws.noise), bad, labels=told)

    def _label(self, shard: int, ordinal: int) -> int:
        if self._labels is None:
            return 0
        label = int(self._labels[self._shards.number(shard, ordinal)])
        if label < 0:
            raise ImageError("no_label", "no label of a known class")
        return label

    def _crop(self, reader: MemberReader, shard: int, ordinal: int, draws: NDArray[np.float64]) -> Pixels:
        self._watch.at(shard, ordinal)
        size = self._augmentation.size
        at_least = _LEAST * size[0], _LEAST * size[1]

        def choose(width: int, height: int) -> Box:
            return self._augmentation.crop(width, height, draws)

        if self._decoded is not None and (pixels := self._decoded.image(shard, ordinal)) is not None:
            left, top, right, bottom = choose(pixels.shape[1], pixels.shape[0])
            # A JPEG that would be decoded at a reduced scale still is; otherwise the cache would change the images.
            if reduction_of((right - left, bottom - top), at_least) == 1:
                return resize(pixels[top:bottom, left:right], size)
        image, box = open_crop(reader.read_image(self._shards.index(shard), ordinal), choose, at_least=at_least)
        return resize(image.crop(box), size)

    def _substitute(
        self, reader: MemberReader, place: tuple[int, int], draws: NDArray[np.float64], first: str
    ) -> tuple[Pixels, int]:
        """Return crop and label of a substitute for the sample at (epoch, position), which also determines it."""
        epoch, position = place
        bits = random_bits(
            _SUBSTITUTE_ATTEMPTS, Purpose.SUBSTITUTE, seed=self._augmentation.seed, epoch=epoch, position=position
        )
        for number in bits % np.uint64(self._shards.samples):
            shard, ordinal = self._shards.locate(int(number))
            try:
                return self._crop(reader, shard, ordinal, draws), self._label(shard, ordinal)
            except ImageError:
                continue
        raise MaekitError(f"{_SUBSTITUTE_ATTEMPTS} samples in a row cannot be used, the first: {first}")

    def _fetching_ahead(self, slices: Iterator[SampleSlice]) -> Iterator[SampleSlice]:
        """Pass slices on while downloading the remote shards of their window and of the next one."""
        fetcher: FetchAhead | None = None
        window = 0
        try:
            for places in slices:
                first, last = (int(places.epochs[i]) * self._order.samples + int(places.positions[i]) for i in (0, -1))
                if fetcher is None:
                    window = self._order.window_number(first)
                    fetcher = FetchAhead(self._shards.fetch, self._order.windows(first))
                for _ in range(self._order.window_number(last) - window):
                    fetcher.go_on()
                window = self._order.window_number(last)
                yield places
        finally:
            if fetcher is not None:
                fetcher.stop()


def _empty_images(count: int, size: tuple[int, int]) -> torch.Tensor:
    """Return an uninitialised uint8 `[B, 3, H, W]`; in a worker, in memory shared with the main process.

    Otherwise the DataLoader copies the images there; both copies cost more in page faults than in bytes moved.
    """
    if get_worker_info() is None:
        return torch.empty(count, 3, *size, dtype=torch.uint8)
    # torch's own default_collate does the same; there is no public function for it.
    storage = torch.UntypedStorage._new_shared(count * 3 * size[0] * size[1])
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(count, 3, *size)


def resize(part: Image.Image | Pixels, size: tuple[int, int]) -> Pixels:
    """Resize a crop, antialiased bicubic: RGB image or uint8 `[h, w, 3]` -> uint8 `[3, H, W]`.

    The uint8 kernels of PyTorch and Pillow differ from exact arithmetic, and so from each other, only by rounding.
    PyTorch takes a third of the time on large crops, but one call costs as much as resizing a small crop in Pillow.
    """
    height, width = size
    if height * width < _WORTH_TORCH:
        image = part if isinstance(part, Image.Image) else Image.fromarray(part)
        return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    pixels = torch.from_numpy(np.array(part)).permute(2, 0, 1)[None]  # [h, w, C] -> [1, C, h, w]
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
