"""Tiny pictures and tiny shards, made on the fly."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

MakeShards = Callable[..., Path]


def jpeg(number: int, size: tuple[int, int] = (48, 40)) -> bytes:
    """Return a JPEG of coloured waves; each number another picture."""
    random = np.random.default_rng(number)
    y, x = np.mgrid[: size[1], : size[0]]
    waves = [
        np.sin(x * random.uniform(0.05, 0.6) + y * random.uniform(0.05, 0.6) + random.uniform(0, 6)) for _ in "rgb"
    ]
    pixels = ((np.stack(waves, -1) + 1) * 127).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_shard(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    """Write {key: {extension: bytes}} as a tar, through tarfile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for key, members in samples.items():
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path
