"""Shared fixtures: tiny pictures, tiny shards, and a cache of the tests' own."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.shards import MakeShards, jpeg, write_shard


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAEKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _onnxruntime_by_default() -> Iterator[None]:
    """Make `auto` ONNX Runtime in the tests' own process: once started there, OpenVINO hangs in its forks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maekit.openvino_runtime.is_faster", lambda: False)
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


@pytest.fixture(scope="session")
def black_is_infinite(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model that divides each embedding by its image's largest pixel, so that black ones are not finite."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    proto = onnx.load(trained / "encoder.onnx")
    output = proto.graph.output[0].name
    for node in proto.graph.node:
        node.output[:] = ["before" if name == output else name for name in node.output]
    proto.graph.node.extend(
        [
            helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMax", ["pixels", "axes"], ["largest"], keepdims=0),
            helper.make_node("Unsqueeze", ["largest", "one"], ["column"]),
            helper.make_node("Sign", ["column"], ["divisor"]),
            helper.make_node("Div", ["before", "divisor"], [output]),
        ]
    )
    constants = {"axes": [1, 2, 3], "one": [1]}
    proto.graph.initializer.extend(
        numpy_helper.from_array(np.array(value, np.int64), name) for name, value in constants.items()
    )
    path = tmp_path_factory.mktemp("infinite") / "encoder.onnx"
    onnx.save(proto, path)
    return path
