"""JPEG decoders at equal pixels: Pillow, as maekit uses it, beside simplejpeg and imagecodecs, on one core.

    pip install simplejpeg imagecodecs
    python bench/decode.py SHARDS [--images 200] [--rounds 6] [--json FILE]

decode        bytes to pixels, uint8 [H, W, 3]; maekit's own ends in Pillow's image, which its resize reads
preprocess    bytes to the input of a model of 224 pixels: decoded, resized, cropped

Rates are medians over rounds in which every way has its turn.
"""

import argparse
import contextlib
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import simplejpeg
from PIL import Image

from maekit.images import Preprocess, decode, open_rgb
from maekit.shards.read import open_shards
from maekit.shards.spec import find_shards

PREPARE = Preprocess.for_size((224, 224), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
OTHERS: dict[str, Callable[[bytes], Any]] = {
    "simplejpeg": functools.partial(simplejpeg.decode_jpeg, colorspace="RGB", fastdct=False, fastupsample=False),
    "imagecodecs": functools.partial(imagecodecs.jpeg8_decode, outcolorspace="RGB"),
}


def prepare_with(decoder: Callable[[bytes], Any], data: bytes) -> Any:
    """Preprocess with another decoder."""
    return PREPARE.prepare(Image.fromarray(decoder(data)))


def rates(ways: dict[str, Callable[[bytes], Any]], images: list[bytes], rounds: int) -> dict[str, float]:
    """Return images per second of each way."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            for data in images:
                way(data)
            found[name].append(len(images) / (time.perf_counter() - began))
    return {name: round(statistics.median(each), 1) for name, each in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", nargs="+")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shards = open_shards(find_shards(tuple(options.shards)))
    with contextlib.closing(shards.reader()) as reader:
        numbers = map(shards.locate, shards.spread(options.images))
        images = [reader.read_image(shards.index(shard), ordinal) for shard, ordinal in numbers]
    images = [data for data in images if data[:2] == b"\xff\xd8"]
    same = {name: sum(np.array_equal(way(data), decode(data)) for data in images) for name, way in OTHERS.items()}
    preprocess = {name: functools.partial(prepare_with, way) for name, way in OTHERS.items()}
    found = {
        "images": len(images),
        "equal": same,
        "decode": rates({"maekit": open_rgb, **OTHERS}, images, options.rounds),
        "preprocess": rates({"maekit": PREPARE, **preprocess}, images, options.rounds),
    }
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
