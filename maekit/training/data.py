"""The data path of training: places in the order -> bytes -> crops -> batches of uint8 -> the device.

    1  ExactSource   the places of each step's batch, a pure function of the step; workers take every W-th step
    2  load_crops    read by position, decode, crop; a bad image is replaced by a substitute that its place chooses
    3  collate       one batch of tensors
    4  to_device     upload uint8, normalise, mirror

1 to 3 are a `webdataset.DataPipeline` and run in the DataLoader's workers, which hand over their batches
in turn, so the row of batches is the same for any number of workers, and starts anywhere.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from maekit.errors import ImageError, MaekitError
from maekit.images import Box, Pixels, RandomCrop, open_rgb
from maekit.parallel import follow_parent
from maekit.random import Purpose, random_bits, uniforms
from maekit.shards.order import Order, Slice
from maekit.shards.read import MemberReader, ShardSet
from maekit.shards.remote import FetchAhead

_SUBSTITUTE_ATTEMPTS = 64
_WORTH_TORCH = 96 * 96  # pixels


class Crop(NamedTuple):
    """One training image: uint8 `[H, W, 3]`, whether it is mirrored, mask noise float32 `[N]`, and what went wrong."""

    pixels: Pixels
    flip: bool
    noise: np.ndarray[tuple[int], np.dtype[np.float32]]
    bad: str | None


@dataclass
class Batch:
    """What a worker hands over for one step.

    Attributes:
        images: uint8 `[B, H, W, 3]`.
        flips: bool `[B]`, True = mirror.
        noise: float32 `[B, N]`, chooses the masks.
        bad: one line for each sample that was replaced.
        failure: why the worker gave up, in place of a batch.
    """

    images: torch.Tensor
    flips: torch.Tensor
    noise: torch.Tensor
    bad: list[str] = field(default_factory=list)
    failure: str | None = None

    def pin_memory(self) -> "Batch":
        """Copy into page-locked memory, so that the upload runs beside the computation (the DataLoader calls this)."""
        images, flips, noise = (tensor.pin_memory() for tensor in (self.images, self.flips, self.noise))
        return Batch(images, flips, noise, self.bad, self.failure)


class ExactSource(IterableDataset[Slice]):
    """The places of each step's batch, in order.

    Args:
        order: of the samples.
        batch_size: of the whole step.
        first: steps already done.
        last: steps in all.
        rank: of this process.
        world: how many processes divide each batch.
    """

    def __init__(self, order: Order, *, batch_size: int, first: int, last: int, rank: int = 0, world: int = 1) -> None:
        self._order, self._batch_size, self._first, self._last = order, batch_size, first, last
        self._rank, self._world = rank, world

    def __iter__(self) -> Iterator[Slice]:
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        share = self._batch_size // self._world
        for step in range(self._first + offset, self._last, stride):
            start = step * self._batch_size + self._rank * share
            yield self._order.slice(start, start + share)


class CropLoader:
    """Stage 2: from places to crops.

    Args:
        shards: the data.
        order: of its samples; says which remote shards are needed next.
        augmentation: crop and flip.
        patches: N, how many numbers choose a mask.
        seed: the run's seed.
    """

    def __init__(self, shards: ShardSet, order: Order, augmentation: RandomCrop, *, patches: int, seed: int) -> None:
        self._shards, self._order, self._augmentation = shards, order, augmentation
        self._patches, self._seed = patches, seed

    def __call__(self, slices: Iterator[Slice]) -> Iterator[list[Crop] | MaekitError]:
        """Yield the crops of each slice; an error that ends the work is the last value."""
        reader = self._shards.reader()
        try:
            for places in self._fetching_ahead(slices) if self._shards.remote else slices:
                columns = (places.epochs, places.positions, places.shards, places.ordinals)
                yield [self._load(reader, *place) for place in zip(*(c.tolist() for c in columns), strict=True)]
        except MaekitError as error:
            # Passed on as a value: an exception would reach the user wrapped in the worker's traceback.
            yield error
        finally:
            reader.close()

    def _fetching_ahead(self, slices: Iterator[Slice]) -> Iterator[Slice]:
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

    def _load(self, reader: MemberReader, epoch: int, position: int, shard: int, ordinal: int) -> Crop:
        bad = None
        substitutes = iter(self._substitutes(epoch, position))
        while True:
            index = self._shards.index(shard)
            try:
                image = open_rgb(reader.read_image(index, ordinal))
                box = self._augmentation.box(image, epoch=epoch, position=position)
                pixels = cut(image, box, self._augmentation.size)
                break
            except ImageError as error:
                bad = bad or f"{self._shards.shards[shard].name} {index.key(ordinal)}: {error.reason}, {error}"
                shard, ordinal = next(substitutes, (-1, -1))
                if shard < 0:
                    raise MaekitError(
                        f"{_SUBSTITUTE_ATTEMPTS} samples in a row hold no readable image, the first: {bad}"
                    ) from error
        flip = self._augmentation.flips(epoch=epoch, position=position)
        noise = uniforms(self._patches, Purpose.MASK, seed=self._seed, epoch=epoch, position=position)
        return Crop(pixels, flip, noise.astype(np.float32), bad)

    def _substitutes(self, epoch: int, position: int) -> Iterator[tuple[int, int]]:
        """Yield (shard, ordinal) of the samples that stand in for the one at a place."""
        bits = random_bits(_SUBSTITUTE_ATTEMPTS, Purpose.SUBSTITUTE, seed=self._seed, epoch=epoch, position=position)
        for number in bits % np.uint64(self._shards.samples):
            yield self._shards.locate(int(number))


def cut(image: Image.Image, box: Box, size: tuple[int, int]) -> Pixels:
    """Cut a box from an RGB image and resize it, antialiased bicubic: -> uint8 `[H, W, 3]`.

    PyTorch's kernel for uint8 and Pillow's differ from exact arithmetic, and so from each other, by rounding only.
    PyTorch's takes a third of the time on large crops; a call of it costs as much as a small crop takes in Pillow.
    """
    height, width = size
    part = image.crop(box)
    if height * width < _WORTH_TORCH:
        return np.asarray(part.resize((width, height), Image.Resampling.BICUBIC))
    pixels = torch.from_numpy(np.array(part)).permute(2, 0, 1)[None]  # [h, w, C] -> [1, C, h, w]
    resized = functional.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()  # [1, C, H, W] -> [H, W, C]


def collate(lists: Iterator[list[Crop] | MaekitError]) -> Iterator[Batch]:
    """Stage 3: one batch of tensors from each list of crops."""
    for crops in lists:
        if isinstance(crops, MaekitError):
            empty = torch.empty(0)
            yield Batch(empty, empty, empty, failure=str(crops))
            return
        yield Batch(
            images=torch.from_numpy(np.stack([crop.pixels for crop in crops])),
            flips=torch.tensor([crop.flip for crop in crops]),
            noise=torch.from_numpy(np.stack([crop.noise for crop in crops])),
            bad=[crop.bad for crop in crops if crop.bad is not None],
        )


def make_loader(
    source: ExactSource, loader: CropLoader, *, workers: int, prefetch: int, pin: bool
) -> DataLoader[Batch]:
    """Return the DataLoader that runs stages 1 to 3 in `workers` processes (0: in this one)."""
    return DataLoader(
        webdataset.DataPipeline(source, loader, collate),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin,
        worker_init_fn=functools.partial(_start_worker, os.getpid()),
        # Forked workers share what is known of the shards.
        multiprocessing_context="fork" if workers else None,
    )


def _start_worker(parent: int, worker: int) -> None:
    follow_parent(parent)


def stop_workers(batches: Iterator[Batch]) -> None:
    """End the workers behind an iterator of a DataLoader now, and not when it happens to be collected.

    Until then a worker that was killed makes torch raise in the middle of whatever the main process does next.
    """
    shutdown = getattr(batches, "_shutdown_workers", None)  # absent where there are no workers
    if shutdown is not None:
        with contextlib.suppress(RuntimeError):
            shutdown()


def next_batch(batches: Iterator[Batch]) -> Batch:
    """Return the next batch.

    Raises:
        MaekitError: a worker gave up or died; says why.
    """
    try:
        batch = next(batches)
    except StopIteration:
        raise MaekitError("the data ended before the run did; please report this as a bug") from None
    except (OSError, EOFError) as error:
        # Files are read in the workers, which pass their errors on as values; this is the way to them that broke.
        raise MaekitError(
            f"reading the data failed: a worker process is gone ({error}); run the command again"
        ) from error
    if batch.failure is not None:
        raise MaekitError(batch.failure)
    return batch


class Normalizer:
    """Stage 4: from a batch of uint8 to the model's input, on its device.

    Args:
        mean: per channel, of values in [0, 1].
        std: per channel, of values in [0, 1].
        device: of the model.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> None:
        self._device = device
        mean64, std64 = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        self._scale = (1 / (255 * std64)).float().view(1, -1, 1, 1).to(device)
        self._shift = (mean64 / std64).float().view(1, -1, 1, 1).to(device)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise: uint8 `[B, H, W, C]` -> float32 `[B, C, H, W]`."""
        uploaded = images.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
        return uploaded.float() * self._scale - self._shift

    def to_device(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images float32 `[B, C, H, W]`, mirrored where the batch says so, and noise `[B, N]`."""
        images = self(batch.images)
        flips = batch.flips.to(self._device, non_blocking=True).view(-1, 1, 1, 1)
        return torch.where(flips, images.flip(-1), images), batch.noise.to(self._device, non_blocking=True)
