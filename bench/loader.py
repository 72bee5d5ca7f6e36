"""The whole loader against its peers, with worker processes, in one run: shards -> batches of uint8 crops.

    python bench/loader.py ../shared/data/imagenet-sample [--side 224] [--workers 2] [--images 3000] [--json FILE]
    python bench/loader.py ../shared/data/cifar10/train-00.tar --side 32 --images 30000

Random resized crops (scale 0.2 to 1, bicubic, antialiased), mirrored or not, in batches of 64; maekit mirrors on the
device and brings the noise of the masks besides. The others as their documentation writes it: webdataset's pipeline
with its shuffle buffer, decoding by Pillow; torchvision's ImageFolder; timm's reader of shards; torch's DataLoader
around all. Rates are counted from the second batch on; medians over rounds in turn.
"""

import argparse
import itertools
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import webdataset
from shards import _timm_reader, _unpack, _usual_transform
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from torchvision import datasets

from maekit.mae.mask_shapes import MaskShape
from maekit.shards.order import SampleOrder
from maekit.shards.read import ShardSet, open_shards
from maekit.shards.spec import find_shards
from maekit.training.crops import Augmentation, CropLoader, WorkerProgress
from maekit.training.data import BatchLayout, ExactSource, StepBatches, make_loader, stop_workers
from maekit.training.image_cache import DecodedSet

BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards")
    parser.add_argument("--side", type=int, default=224, help="of the crops, in pixels")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--images", type=int, default=3000, help="per round")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    found = find_shards(options.shards)
    paths = [shard.path for shard in found]
    shards = open_shards(found)
    decoded = DecodedSet(shards)
    side, workers = options.side, options.workers
    with tempfile.TemporaryDirectory() as folder:
        _unpack(shards, Path(folder))
        loaders: dict[str, Callable[[], Iterator[object]]] = {
            "maekit": lambda: maekit_batches(shards, side, workers),
            "maekit, --cache ram": lambda: maekit_batches(shards, side, workers, decoded),
            "webdataset": lambda: _webdataset(paths, side, workers),
            "torchvision ImageFolder": lambda: _image_folder(Path(folder), side, workers),
            "timm's reader": lambda: _timm(paths, shards.samples, side, workers),
        }
        rates: dict[str, list[float]] = {name: [] for name in loaders}
        for _ in range(options.repeat):
            for name, make in loaders.items():
                rates[name].append(_rate(make(), options.images))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    best = max(rate for name, rate in medians.items() if not name.startswith("maekit"))
    print(f"{shards.samples} samples, crops of {side}, {workers} workers, {decoded.bytes / 1e6:.0f} MB decoded")
    for name, rate in medians.items():
        print(f"  {name:<28} {rate:9,.0f} img/s   {rate / best:5.2f} x the best of the others")
    if options.json:
        options.json.write_text(
            json.dumps({**vars(options), "json": None, "rates": rates, "medians": medians}, indent=1)
        )


def _rate(batches: Iterator[object], images: int) -> float:
    next(batches)
    count = -(-images // BATCH)
    before = time.perf_counter()
    for _ in itertools.islice(batches, count):
        pass
    seconds = time.perf_counter() - before
    stop_workers(batches)
    del batches
    return count * BATCH / seconds


def maekit_batches(
    shards: ShardSet, side: int, workers: int, decoded: DecodedSet | None = None, steps: int = 1 << 30
) -> Iterator[object]:
    division, watch = BatchLayout(BATCH, BATCH, image_bytes=side * side * 3), WorkerProgress(workers)
    order = SampleOrder(shards.counts, seed=0, digest=shards.digest)
    crop, patch = Augmentation((side, side), (side, side), 0), 16 if side > 64 else 4
    loader = CropLoader(
        shards, order, crop, MaskShape("random", (side // patch, side // patch), 0.75), watch=watch, decoded=decoded
    )
    source = ExactSource(order, division, first=0, last=steps)
    chunks = iter(make_loader(source, loader, division, workers=workers, prefetch=2, pin=False))
    batches = StepBatches(chunks, division, shards=shards, watch=watch, patience=600)
    try:
        for _ in range(steps):
            yield batches.next()
    finally:
        stop_workers(chunks)


def _webdataset(paths: list[Path], side: int, workers: int) -> Iterator[object]:
    transform = _usual_transform(side)
    dataset = (
        webdataset.WebDataset([str(path) for path in paths], resampled=True, shardshuffle=False)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg;png")
        .map_tuple(transform)
        .batched(BATCH)
    )
    return iter(webdataset.WebLoader(dataset, batch_size=None, num_workers=workers))


def _image_folder(folder: Path, side: int, workers: int) -> Iterator[object]:
    dataset = datasets.ImageFolder(str(folder), _usual_transform(side))
    sampler = RandomSampler(dataset, replacement=True, num_samples=10**9 if len(dataset) < 10**6 else None)
    return iter(DataLoader(dataset, BATCH, sampler=sampler, num_workers=workers))


class _Endless(IterableDataset):
    def __init__(self, paths: list[Path], samples: int, side: int) -> None:
        self._paths, self._samples, self._transform = paths, samples, _usual_transform(side)

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            for image, *_ in _timm_reader(self._paths, self._samples):
                yield self._transform(image)


def _timm(paths: list[Path], samples: int, side: int, workers: int) -> Iterator[object]:
    return iter(DataLoader(_Endless(paths, samples, side), BATCH, num_workers=workers))


if __name__ == "__main__":
    main()
