"""Reading shards against their peers: index scan, reads, and decode + crop, one process and one thread, in one run.

    python bench/shards.py ../shared/data/imagenet-sample [--repeat 5] [--json FILE]

Scan: every header of every shard, from the page cache. Read: the bytes of every image, maekit's in the shuffled order
of an epoch, the others' from the first to the last. Decode + crop: JPEG -> random resized crop of `--side` pixels
(scale 0.2 to 1, bicubic, antialiased), mirrored or not, as uint8; each by its own usual way. Rates are medians over
rounds in turn.
Quality: each kernel's mean distance from the same resize in float64, in levels of 255, over the same boxes.
"""

import argparse
import io
import json
import logging
import statistics
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from timm.data import create_transform
from timm.data.readers.reader_wds import ReaderWds
from torchvision import datasets, transforms

from maekit.images import decode, random_resized_crop
from maekit.mae.mask_shapes import MaskShape
from maekit.shards.index import build_index
from maekit.shards.order import SampleOrder
from maekit.shards.read import open_shards
from maekit.shards.spec import find_shards
from maekit.system.draws import Purpose, uniforms
from maekit.training.crops import Augmentation, CropLoader, resize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", help="shards of JPEGs with a cls member")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--side", type=int, default=224, help="of the crops, in pixels")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()

    side = options.side
    found = find_shards(options.shards)
    paths = [shard.path for shard in found]
    shards = open_shards(found)
    with tempfile.TemporaryDirectory() as folder:
        _unpack(shards, Path(folder))
        tables = {
            "scan": {
                "maekit": lambda: sum(build_index(path).samples for path in paths),
                "tarfile": lambda: _scan_with_tarfile(paths),
            },
            "read": {
                "maekit": lambda: _count(_read_with_maekit(shards)),
                "webdataset": lambda: _count(_dataset(paths)),
                "tarfile": lambda: _count(_read_with_tarfile(paths)),
                "timm ReaderWds (decodes too)": lambda: _count(iter(_timm_reader(paths, shards.samples))),
            },
            "decode + crop": {
                "maekit": lambda: _count(_crop_with_maekit(shards, side)),
                "webdataset + torchvision": lambda: _count(_crop_with_webdataset(paths, side)),
                "torchvision ImageFolder": lambda: _count(_crop_with_image_folder(Path(folder), side)),
                "timm ReaderWds + transform": lambda: _count(_crop_with_timm(paths, shards.samples, side)),
            },
        }
        figures = {what: _measure(peers, shards.samples, options.repeat) for what, peers in tables.items()}
    quality = _quality(shards, side)
    for what, rates in figures.items():
        print(f"{what}  ({shards.samples} samples, one core)")
        best = max(rate for name, rate in rates.items() if name != "maekit")
        for name, rate in rates.items():
            print(f"  {name:<30} {rate:>10,.0f} samples/s   maekit is {rates['maekit'] / rate:5.2f} x")
        print(f"  maekit / best of the others: {rates['maekit'] / best:.2f}")
    print(f"  distance from float64, levels: maekit {quality['maekit']:.3f}, Pillow {quality['Pillow']:.3f}")
    if options.json:
        options.json.write_text(json.dumps({"samples": shards.samples, "rates": figures, "quality": quality}, indent=1))


def _measure(peers: dict[str, Callable[[], int]], samples: int, repeat: int) -> dict[str, float]:
    rates: dict[str, list[float]] = {name: [] for name in peers}
    for round_ in range(repeat + 1):
        for name, work in peers.items():
            before = time.perf_counter()
            done = work()
            seconds = time.perf_counter() - before
            assert done == samples, f"{name}: {done} of {samples}"
            if round_:  # the first one warms up
                rates[name].append(samples / seconds)
    return {name: statistics.median(values) for name, values in rates.items()}


def _count(items: Iterator[object]) -> int:
    return sum(1 for _ in items)


def _scan_with_tarfile(paths: list[Path]) -> int:
    keys = set()
    for path in paths:
        with tarfile.open(path) as tar:
            keys |= {(path, member.name.split(".")[0]) for member in tar}
    return len(keys)


def _read_with_maekit(shards) -> Iterator[bytes]:
    order = SampleOrder(shards.counts, seed=0, digest=shards.digest)
    reader = shards.reader()
    for start in range(0, shards.samples, 64):
        places = order.slice(start, min(start + 64, shards.samples))
        for shard, ordinal in zip(places.shards.tolist(), places.ordinals.tolist(), strict=True):
            yield reader.read_image(shards.index(shard), ordinal)
    reader.close()


def _read_with_tarfile(paths: list[Path]) -> Iterator[bytes]:
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    yield tar.extractfile(member).read()


def _dataset(paths: list[Path]):
    return iter(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False, empty_check=False))


def _timm_reader(paths: list[Path], samples: int) -> ReaderWds:
    names = ",".join(path.stem for path in paths)
    root = paths[0].parent
    split = f"{{{names}}}.tar" if len(paths) > 1 else paths[0].name
    return ReaderWds(str(root), split=split, is_training=False, num_samples=samples, target_key=None)


def _usual_transform(side: int) -> transforms.Compose:
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(side, (0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )


def _crop_with_maekit(shards, side: int) -> Iterator[object]:
    order = SampleOrder(shards.counts, seed=0, digest=shards.digest)
    loader = CropLoader(shards, order, Augmentation((side, side), (side, side), 0), MaskShape("random", (14, 14), 0.75))
    slices = (order.slice(start, min(start + 64, shards.samples)) for start in range(0, shards.samples, 64))
    for chunk in loader(slices):
        for pixels, flip in zip(chunk.images.numpy(), chunk.flips.tolist(), strict=True):
            # Training mirrors on the device; here, as the others do, in the loader.
            yield np.ascontiguousarray(pixels[..., ::-1]) if flip else pixels


def _crop_with_webdataset(paths: list[Path], side: int) -> Iterator[object]:
    transform = _usual_transform(side)
    for sample in _dataset(paths):
        yield transform(Image.open(io.BytesIO(sample["jpg"])).convert("RGB"))


def _crop_with_image_folder(folder: Path, side: int) -> Iterator[object]:
    dataset = datasets.ImageFolder(str(folder), _usual_transform(side))
    return (dataset[number][0] for number in range(len(dataset)))


def _crop_with_timm(paths: list[Path], samples: int, side: int) -> Iterator[object]:
    transform = create_transform(
        side, is_training=True, scale=(0.2, 1.0), interpolation="bicubic", color_jitter=None, normalize=False
    )
    for image, *_ in _timm_reader(paths, samples):
        yield transform(image)


def _unpack(shards, folder: Path) -> None:
    reader = shards.reader()
    (folder / "all").mkdir()
    for number in range(shards.samples):
        shard, ordinal = shards.locate(number)
        (folder / "all" / f"{number:06d}.jpg").write_bytes(reader.read_image(shards.index(shard), ordinal))


def _quality(shards, side: int, images: int = 64) -> dict[str, float]:
    """Return the mean distance of each kernel from exact arithmetic, over the first images."""
    reader = shards.reader()
    distances: dict[str, list[float]] = {"maekit": [], "Pillow": []}
    for number in range(min(images, shards.samples)):
        shard, ordinal = shards.locate(number)
        data = reader.read_image(shards.index(shard), ordinal)
        image = decode(data)
        draws = uniforms(22, Purpose.CROP, seed=0, position=number)
        left, top, right, bottom = random_resized_crop(image.shape[1], image.shape[0], draws, scale=(0.2, 1.0))
        part = image[top:bottom, left:right]
        exact = torch.from_numpy(part.astype(float)).permute(2, 0, 1)[None]
        exact = torch.nn.functional.interpolate(exact, (side, side), mode="bicubic", antialias=True)
        expected = exact[0].permute(1, 2, 0).clamp(0, 255).numpy()
        pillow = np.asarray(Image.fromarray(part).resize((side, side), Image.Resampling.BICUBIC))
        for name, got in (("maekit", resize(part, (side, side)).transpose(1, 2, 0)), ("Pillow", pillow)):
            distances[name].append(float(np.abs(got - expected).mean()))
    return {name: statistics.mean(values) for name, values in distances.items()}


if __name__ == "__main__":
    main()
