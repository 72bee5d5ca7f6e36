"""From a place in the order to a training image: read, decode as much as the crop needs, cut, resize.

Everything random here is a function of (seed, epoch, position), never of the worker that happens to do it.
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
# A JPEG is decoded at a reduced scale while the crop keeps so many times the pixels of the input along each side:
# there the result is within a level (of 255) of that from the whole image, on average.
_LEAST = 2
JITTER_DRAWS = 4
_ORDERS = tuple(itertools.permutations(range(3)))


@dataclass(frozen=True)
class Augmentation:
    """What is done to an image before it is trained on (He et al. 2021, table 1e), keyed by place.

    Attributes:
        size: (height, width) of the crop after resizing, in pixels.
        covered: (height, width) that the whole image would just cover, of a crop of fixed size.
        seed: the run's seed.
        kind: `random_resized_crop`, `fixed_crop` or `none`.
        scale: bounds of a random resized crop's share of the image area.
        flip: whether half of the images are mirrored.
        color_jitter: how far brightness, contrast and saturation may change.
        policy: changes an image by random numbers of its own, as RandAugment does: uint8 `[3, H, W]` and 64 bits that
            seed them -> uint8 `[3, H, W]`.
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
        """Choose the crop of an image by the numbers drawn for its place, float64 `[CROP_DRAWS]`."""
        if self.kind == "random_resized_crop":
            return random_resized_crop(width, height, draws, scale=self.scale, aspect=self.size[1] / self.size[0])
        place = (0.5, 0.5) if self.kind == "none" else (float(draws[20]), float(draws[21]))
        return fixed_crop(width, height, self.covered, self.size, place)


@dataclass
class Chunk:
    """What a worker hands over: some of the images of one step.

    Attributes:
        images: uint8 `[B, 3, H, W]`.
        flips: bool `[B]`, True = mirror.
        noise: float32 `[B, k·N]`, chooses k masks of each image.
        bad: one line for each sample that was replaced.
        failure: why the worker gave up, in place of images.
        labels: of the images, int64 `[B]`; None where they are not asked for.
    """

    images: torch.Tensor
    flips: torch.Tensor
    noise: torch.Tensor
    bad: list[str]
    failure: str | None = None
    labels: torch.Tensor | None = None

    def pin_memory(self) -> "Chunk":
        """Copy into page-locked memory, so that the upload runs beside the computation (the DataLoader calls this)."""
        images, flips, noise = (tensor.pin_memory() for tensor in (self.images, self.flips, self.noise))
        labels = None if self.labels is None else self.labels.pin_memory()
        return Chunk(images, flips, noise, self.bad, self.failure, labels)

    @classmethod
    def of_failure(cls, error: MaekitError) -> "Chunk":
        """Return a chunk that carries an error: an exception would reach the user wrapped in the worker's traceback."""
        empty = torch.empty(0)
        return cls(empty, empty, empty, [], str(error))


class Draws(NamedTuple):
    """The random numbers of n places.

    Attributes:
        crops: float64 `[n, 22]`.
        flips: bool `[n]`.
        noise: of k masks, float32 `[n, k·N]`.
        jitter: float64 `[n, 4]`: three factors, and their order.
        policy: seeds, uint64 `[n]`.
    """

    crops: NDArray[np.float64]
    flips: NDArray[np.bool_]
    noise: NDArray[np.float32]
    jitter: NDArray[np.float64]
    policy: NDArray[np.uint64]


def draw(places: SampleSlice, augmentation: Augmentation, shape: MaskShape, masks: int = 1) -> Draws:
    """Draw what is random about some places of the order, each by its own epoch and position.

    Args:
        places: of the order.
        augmentation: of their images.
        shape: of the masks.
        masks: k, of each image.
    """
    parts = []
    # Positions count up within an epoch; a batch may reach into the next one.
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
    """What each worker is at, in memory that all processes of a run share; it goes with them.

    A row per worker: its process, the shard and the ordinal it is reading (-1: at nothing), and a count of what it has
    done.
    """

    IDLE = -1

    def __init__(self, workers: int) -> None:
        self._memory = mmap.mmap(-1, max(1, workers) * 4 * 8)
        self.rows: NDArray[np.int64] = np.frombuffer(self._memory, np.int64).reshape(-1, 4)
        self.rows[:, 1:3] = self.IDLE

    def at(self, shard: int, ordinal: int) -> None:
        """Note what this worker is at."""
        info = get_worker_info()
        row = self.rows[info.id if info else 0]
        row[:] = os.getpid(), shard, ordinal, row[3] + 1

    def pause(self) -> None:
        """Note that this worker reads nothing now."""
        self.at(self.IDLE, self.IDLE)


class CropLoader:
    """From places to chunks.

    Args:
        shards: the data.
        order: of its samples; says which remote shards are needed next.
        augmentation: of the images.
        shape: of the masks.
        masks: of each image.
        watch: where to note what is being read.
        decoded: images that are kept decoded.
        labels: of all samples by their number in `shards`, int64 `[samples]`, -1 where there is none: such a sample is
            replaced as one without an image is.
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
        """Yield the chunk of each slice; an error that ends the work is carried by the last one."""
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
            # A JPEG that would be decoded at a reduced scale still is, or keeping images would change them.
            if reduction_of((right - left, bottom - top), at_least) == 1:
                return resize(pixels[top:bottom, left:right], size)
        image, box = open_crop(reader.read_image(self._shards.index(shard), ordinal), choose, at_least=at_least)
        return resize(image.crop(box), size)

    def _substitute(
        self, reader: MemberReader, place: tuple[int, int], draws: NDArray[np.float64], first: str
    ) -> tuple[Pixels, int]:
        """Return crop and label of a sample that stands in for the one at a place, chosen by the place."""
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
        """Pass slices on while the remote shards of their window and of the next one are downloaded."""
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
    """Return room for images, uint8 `[B, 3, H, W]`: in a worker, within memory that the main process will see.

    Otherwise the DataLoader copies them there, and both copies cost more for their fresh pages than for their bytes.
    """
    if get_worker_info() is None:
        return torch.empty(count, 3, *size, dtype=torch.uint8)
    # As torch's own default_collate does it; there is no public name for it.
    storage = torch.UntypedStorage._new_shared(count * 3 * size[0] * size[1])
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(count, 3, *size)


def resize(part: Image.Image | Pixels, size: tuple[int, int]) -> Pixels:
    """Resize a crop, antialiased bicubic: RGB image or uint8 `[h, w, 3]` -> uint8 `[3, H, W]`.

    PyTorch's kernel for uint8 and Pillow's differ from exact arithmetic, and so from each other, by rounding only.
    PyTorch's takes a third of the time on large crops; a call of it costs as much as a small crop takes in Pillow.
    """
    height, width = size
    if height * width < _WORTH_TORCH:
        image = part if isinstance(part, Image.Image) else Image.fromarray(part)
        return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    pixels = torch.from_numpy(np.array(part)).permute(2, 0, 1)[None]  # [h, w, C] -> [1, C, h, w]
    resized = functional.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    return resized[0].numpy()  # [1, C, H, W] -> [C, H, W]


def jitter_colors(pixels: Pixels, strength: float, draws: NDArray[np.float64]) -> Pixels:
    """Change brightness, contrast and saturation by random factors, in random order (as torchvision's ColorJitter).

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
