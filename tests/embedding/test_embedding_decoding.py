"""The processes that decode, the ring that they decode into, and the sessions and devices that are fed from it."""

import gc
import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from support.errors import raises
from support.models import embed_config
from support.processes import finish, segments, start, warm_up
from support.shards import jpeg, write_shard

import maekit
import maekit.embedding.decode_pool as decoding
from maekit.cli.options import with_flags
from maekit.config import IMAGENET_MEAN, IMAGENET_STD
from maekit.config.embed import EmbedConfig
from maekit.embedding.decode_pool import Chunk, DecodePool, Ring
from maekit.embedding.embed import embed, raise_if_incomplete
from maekit.embedding.session import EncoderSession, OutOfMemory
from maekit.images import Preprocess
from maekit.shards.read import read_file
from maekit.system.errors import ImageError, InputError, MaekitError

PREPROCESS = Preprocess.for_size((32, 32), IMAGENET_MEAN, IMAGENET_STD)


@dataclass
class File:
    """A file of images one behind the other, as a source."""

    number: int
    name: str
    descriptor: int
    places: list

    @classmethod
    def of(cls, path: Path, images: list[bytes], number: int = 0) -> "File":
        path.write_bytes(b"".join(images))
        ends = np.cumsum([len(image) for image in images]).tolist()
        places = [(end - len(image), len(image), None) for end, image in zip(ends, images, strict=True)]
        return cls(number, path.name, os.open(path, os.O_RDONLY), places)


@pytest.fixture
def ring():
    ring = Ring(2, 8, (32, 32))
    yield ring
    ring.close()


def test_pixels_are_those_of_the_preprocessing(tmp_path: Path, ring: Ring) -> None:
    """Decoded elsewhere and into shared memory, bit for bit the same; refused images are named with their rows."""
    images = [jpeg(0), b"", jpeg(1), b"<html>", jpeg(2)]
    source = File.of(tmp_path / "images", images)
    with DecodePool(2) as pool:
        pool.use(ring, PREPROCESS, yielding=True)
        decoded = pool.submit(Chunk(1, 3, source, source.places)).result()
        assert [(refusal.row, refusal.reason) for refusal in decoded.refused] == [(4, "empty"), (6, "not_an_image")]
        for row, number in ((3, 0), (5, 1), (7, 2)):
            np.testing.assert_array_equal(ring.batches[1, row], PREPROCESS(jpeg(number)))
        assert not ring.batches[0].any()
        assert not ring.batches[1, :3].any()
        assert len(decoded.crcs) == 5
        assert decoded.seconds > 0


def test_a_source_that_cannot_be_read(tmp_path: Path, ring: Ring) -> None:
    source = File.of(tmp_path / "images", [jpeg(0)])
    source.places.append((10**6, 10, None))
    with DecodePool(1) as pool:
        pool.use(ring, PREPROCESS, yielding=False)
        assert "shorter than when it was indexed" in pool.submit(Chunk(0, 0, source, source.places)).result().failure
    with pytest.raises(ImageError) as caught:
        read_file(str(tmp_path / "none.jpg"))
    assert caught.value.reason == "unreadable"


def test_many_sources_few_descriptors(tmp_path: Path, ring: Ring) -> None:
    """A process keeps a few shards open, whatever it has seen, and comes back to those it has closed."""
    sources = [File.of(tmp_path / f"{i}", [jpeg(i)], i) for i in range(10)]
    with DecodePool(1) as pool:
        pool.use(ring, PREPROCESS, yielding=False)
        for source in [*sources, *sources]:
            pool.submit(Chunk(0, 0, source, source.places)).result()
            np.testing.assert_array_equal(ring.batches[0, 0], PREPROCESS(jpeg(source.number)))
        descriptors = os.listdir(f"/proc/{pool._all[0]._process.pid}/fd")
        links = [os.readlink(f"/proc/{pool._all[0]._process.pid}/fd/{d}") for d in descriptors]
        assert sum(str(tmp_path) in link for link in links) <= 4 + len(sources)  # those open here were inherited


def sabotaged(monkeypatch, what) -> None:
    """Have decoding processes do something to themselves when they meet the image of one colour, 7."""
    plain = Preprocess.__call__

    def called(self, data: bytes):
        if data == jpeg(7):
            what()
        return plain(self, data)

    monkeypatch.setattr(Preprocess, "__call__", called)


def _spin() -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("what", "how"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL"),
        (lambda: os._exit(3), "exit code 3"),
        (_spin, "SIGXCPU"),
    ],
    ids=["crash", "exit", "hang"],
)
def test_an_image_that_takes_its_decoder_with_it(trained: Path, tmp_path: Path, monkeypatch, what, how) -> None:
    """It is refused and named; its neighbours have the rows that they have without it."""
    monkeypatch.setattr(decoding, "_SECONDS_PER_IMAGE", 0)  # of CPU time; the kernel adds up to one
    write_shard(tmp_path / "in" / "0.tar", {f"k{i}": {"jpg": jpeg(i)} for i in range(12)})
    config = embed_config(trained, tmp_path / "out", shards=(str(tmp_path / "in"),), workers=2, verify=True)
    sabotaged(monkeypatch, what)
    result = embed(config)
    raise_if_incomplete(result)
    assert (result.rows, result.errors) == (11, 1)
    (line,) = (tmp_path / "out" / "_maekit" / "errors" / "0.tar.jsonl").read_text().splitlines()
    error = json.loads(line)
    assert (error["key"], error["reason"]) == ("k7", "crashed")
    assert how in error["detail"]


def test_decoders_that_always_die(trained: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(decoding, "_MOST_CRASHES", 2)
    write_shard(tmp_path / "in" / "0.tar", {f"k{i}": {"jpg": jpeg(i)} for i in range(8)})
    monkeypatch.setattr(Preprocess, "__call__", lambda self, data: os._exit(1))
    with raises(MaekitError, match="decoding processes keep dying"):
        embed(embed_config(trained, tmp_path / "out", shards=(str(tmp_path / "in"),)))
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_no_memory_for_the_ring(monkeypatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with raises(MaekitError, match="choose a smaller --batch-size"):
        Ring(4, 256, (224, 224))


def test_nothing_is_left_behind(trained: Path, tmp_path: Path) -> None:
    """Neither descriptors, processes, threads nor segments, however often it is run."""
    import threading

    config = embed_config(trained, tmp_path / "out", workers=2, overwrite=True)
    embed(config)

    def state() -> tuple:
        gc.collect()
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        names = sorted(thread.name for thread in threading.enumerate())
        return len(os.listdir("/proc/self/fd")), children, names, segments()

    before = state()
    for _ in range(3):
        embed(config)
    assert state() == before


def test_memory_does_not_grow_with_a_shard(trained: Path, tmp_path: Path) -> None:
    """Ten times the samples in one shard: the same memory, but for what keys and members take."""
    image = jpeg(1)
    script = """
import sys
from maekit.config.embed import EmbedConfig
from maekit.embedding.embed import embed
model, shards, out = sys.argv[1:]
embed(EmbedConfig(model, (shards,), out, device="cpu", batch_size=64, workers=1))
# The largest size since exec; that of getrusage is the parent's where it was larger.
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""
    import subprocess
    import sys

    peaks = []
    for count in (3000, 30000):
        write_shard(tmp_path / f"{count}" / "0.tar", {f"k{i}": {"jpg": image} for i in range(count)})
        arguments = [str(trained / "encoder.onnx"), str(tmp_path / f"{count}"), str(tmp_path / f"out{count}")]
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] < peaks[0] + 25, f"{peaks} MB"


def test_out_of_memory_halves_the_batch(trained: Path, tmp_path: Path, monkeypatch) -> None:
    """Said once; the shard is redone, with the bytes of a run that had the smaller batch from the start."""
    write_shard(tmp_path / "in" / "0.tar", {f"a{i}": {"jpg": jpeg(i)} for i in range(6)})
    write_shard(tmp_path / "in" / "1.tar", {f"b{i}": {"jpg": jpeg(i)} for i in range(40)})
    write_shard(tmp_path / "in" / "2.tar", {f"c{i}": {"jpg": jpeg(i)} for i in range(9)})
    shards = (str(tmp_path / "in"),)
    embed(embed_config(trained, tmp_path / "small", shards=shards, batch_size=4))
    run = EncoderSession._run

    def limited(self, images):
        if len(images) > 4:
            raise RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested")
        return run(self, images)

    monkeypatch.setattr(EncoderSession, "_run", limited)
    notes: list[str] = []

    class Notes(maekit.system.progress.Silent):
        def note(self, text: str) -> None:
            notes.append(with_flags(text))

    config = embed_config(trained, tmp_path / "out", shards=shards, batch_size=16, verify=True)
    result = embed(config, Notes())
    raise_if_incomplete(result)
    assert result.rows == 55
    assert [note.rpartition(" ")[2] for note in notes if "going on with batches of" in note] == ["8", "4"]
    for path in (tmp_path / "small").glob("*.parquet"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert embed(config).skipped == 3  # the same command goes on
    record = json.loads((tmp_path / "out" / "_maekit" / "1.tar.json").read_text())
    assert record["options"]["batch_size"] == 4
    monkeypatch.setattr(EncoderSession, "_run", lambda self, images: limited(self, np.zeros((9, 1))))
    with pytest.raises(OutOfMemory):
        embed(embed_config(trained, tmp_path / "none", shards=shards))


def test_two_devices_write_what_one_writes(trained: Path, tmp_path: Path) -> None:
    for shard in range(7):
        write_shard(tmp_path / "in" / f"{shard}.tar", {f"{shard}-{i}": {"jpg": jpeg(i)} for i in range(5 + shard)})
    shards = (str(tmp_path / "in"),)
    one = embed(embed_config(trained, tmp_path / "one", shards=shards))
    config = EmbedConfig(
        str(trained / "encoder.onnx"), shards, str(tmp_path / "two"), devices=("cpu", "cpu"), batch_size=8, verify=True
    )
    two = embed(config)
    raise_if_incomplete(two)
    assert (two.rows, two.shards) == (one.rows, one.shards)
    for path in (p for p in (tmp_path / "one").rglob("*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
    assert embed(config).skipped == 7


def test_an_error_on_one_of_two_devices(trained: Path, tmp_path: Path, monkeypatch) -> None:
    """It ends the run in one line, with what is committed kept."""
    import maekit.embedding.output_directory as output

    for shard in range(5):
        write_shard(tmp_path / "in" / f"{shard}.tar", {f"{shard}-{i}": {"jpg": jpeg(i)} for i in range(5)})
    config = EmbedConfig(
        str(trained / "encoder.onnx"), (str(tmp_path / "in"),), str(tmp_path / "out"), devices=("cpu", "cpu")
    )
    begin = output.OutputDirectory.begin

    def failing(self, name):
        if name == "3.tar":
            raise MaekitError("cannot write 3: No space left on device")
        return begin(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(output.OutputDirectory, "begin", failing)
        with raises(MaekitError, match="cannot write 3"):
            embed(config)
    result = embed(config)
    assert (result.rows, result.errors) == (25, 0)
    config.device = "cpu"
    with raises(InputError, match="--device cpu and --devices cpu,cpu: give one"):
        embed(config)
    with raises(InputError, match=r"cuda:0: .*NVIDIA driver|cuda:0: .*provider"):
        embed(EmbedConfig(config.model, config.shards, str(tmp_path / "gpu"), devices=("cuda:0", "cuda:1")))


def test_the_embedder_from_many_threads(trained: Path) -> None:
    """Each call has buffers of its own."""
    from concurrent.futures import ThreadPoolExecutor

    embedder = maekit.Embedder(trained / "encoder.onnx", device="cpu")
    images = [[jpeg(10 * caller + i) for i in range(1 + 5 * caller)] for caller in range(6)]
    expected = [embedder(batch) for batch in images]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(5):
            for got, want in zip(pool.map(embedder, images), expected, strict=True):
                np.testing.assert_array_equal(got, want)


def test_the_embedder_asks_for_a_few_images_at_a_time(trained: Path) -> None:
    """A generator of many images is read as far as decoding runs ahead; its end and its errors arrive."""
    embedder = maekit.Embedder(trained / "encoder.onnx", device="cpu")
    asked = 0

    def many():
        nonlocal asked
        for i in range(200):
            asked += 1
            yield b"no image" if i == 60 else jpeg(i % 3)

    with pytest.raises(ImageError):
        embedder(many())
    assert asked < 120
    assert embedder(iter([])).shape == (0, 32)
    assert embedder(np.zeros((3, 40, 50, 3), np.uint8)).shape == (3, 32)


def test_stopping_takes_no_longer_than_a_batch(trained: Path, tmp_path: Path) -> None:
    image = jpeg(0, (600, 500))
    write_shard(tmp_path / "in" / "0.tar", {f"k{i}": {"jpg": image} for i in range(3000)})
    warm_up()
    for number, devices in enumerate(((), ("cpu", "cpu"))):
        config = embed_config(
            trained, tmp_path / f"out{number}", shards=(str(tmp_path / "in"),), device="auto", devices=devices
        )
        (process,) = start(config, tmp_path / "log")
        until = time.monotonic() + 20
        while not (tmp_path / f"out{number}" / "_maekit" / ".output.json").exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        time.sleep(0.3)
        before = time.monotonic()
        os.kill(process.pid, signal.SIGTERM)
        assert finish([process]) == [75], (tmp_path / "log").read_text()
        assert time.monotonic() - before < 5
        assert "stopped by SIGTERM; finished shards are committed" in (tmp_path / "log").read_text()


def test_a_child_leaves_its_parents_garbage_alone(tmp_path: Path, ring: Ring, monkeypatch) -> None:
    """A session that is garbage here, destroyed in a forked child, would wait for its threads for ever."""
    destroyed = tmp_path / "destroyed"

    class Session:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            with open(destroyed, "a") as file:
                file.write(f"{os.getpid()}\n")

    gc.collect()
    gc.disable()
    try:
        Session()
        plain = Preprocess.__call__
        monkeypatch.setattr(Preprocess, "__call__", lambda self, data: (gc.collect(), plain(self, data))[1])
        source = File.of(tmp_path / "images", [jpeg(0)])
        with DecodePool(1) as pool:
            pool.use(ring, PREPROCESS, yielding=False)
            assert not pool.submit(Chunk(0, 0, source, source.places)).result().refused
        assert not destroyed.exists()
        gc.collect()
        assert destroyed.read_text() == f"{os.getpid()}\n"
    finally:
        gc.enable()
