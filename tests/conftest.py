"""Shared fixtures: tiny pictures, tiny shards, and a cache of the tests' own."""

import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAEKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def rounds() -> Callable[[int, int], int]:
    """Return `rounds(few, many)`: few in `make test`, many in `make campaigns`."""
    return lambda few, many: many if os.environ.get("MAEKIT_CAMPAIGNS") else few


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
    import tarfile

    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for key, members in samples.items():
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


MakeShards = Callable[..., Path]


@pytest.fixture
def make_shards(tmp_path: Path) -> MakeShards:
    """Return a function that makes a directory of shards with so many samples each."""

    def make(*counts: int, name: str = "shards", size: tuple[int, int] = (48, 40)) -> Path:
        directory = tmp_path / name
        number = 0
        for shard, count in enumerate(counts):
            samples = {}
            for _ in range(count):
                samples[f"{number:06d}"] = {"jpg": jpeg(number, size), "cls": str(number % 3).encode()}
                number += 1
            write_shard(directory / f"{shard:03d}.tar", samples)
        return directory

    return make


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `shards`, a `run` of a tiny model on them, and its export, `encoder.onnx`."""
    from models import train

    return train(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def python() -> list[str]:
    """Return the command that starts a fresh interpreter."""
    return [sys.executable]
