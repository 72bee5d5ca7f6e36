"""Shared fixtures: tiny pictures, tiny shards, and a cache of the tests' own."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.shards import MakeShards, jpeg, write_shard


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAEKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def rounds() -> Callable[[int, int], int]:
    """Return `rounds(few, many)`: few in `make test`, many in `make campaigns`."""
    return lambda few, many: many if os.environ.get("MAEKIT_CAMPAIGNS") else few


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
    from support.models import train

    return train(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def python() -> list[str]:
    """Return the command that starts a fresh interpreter."""
    return [sys.executable]
