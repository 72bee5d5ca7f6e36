"""Labelled shards whose classes are plain to see: four colours, under noise."""

import io
from pathlib import Path

import numpy as np
from PIL import Image
from support.shards import write_shard

COLOURS = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [200, 200, 60]])


def picture(number: int) -> bytes:
    random = np.random.default_rng(number)
    pixels = np.clip(COLOURS[number % 4] + random.normal(0, 25, (32, 32, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def plant(folder: Path, first: int, *counts: int, label=lambda number: str(number % 4)) -> Path:
    """Write shards of so many samples each, numbered from `first`."""
    number = first
    for shard, count in enumerate(counts):
        samples = {}
        for _ in range(count):
            samples[f"{number:05d}"] = {"png": picture(number), "cls": label(number).encode()}
            number += 1
        write_shard(folder / f"{shard}.tar", samples)
    return folder
