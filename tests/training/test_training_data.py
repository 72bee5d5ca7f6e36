import dataclasses
import io
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.errors import raises
from support.shards import jpeg, write_shard

from maekit.config import IMAGENET_MEAN, IMAGENET_STD
from maekit.mae.mask_shapes import MaskShape
from maekit.mae.normalize import Normalizer
from maekit.shards.order import SampleOrder
from maekit.shards.read import ShardSet, open_shards
from maekit.shards.spec import find_shards
from maekit.system.errors import InputError, MaekitError
from maekit.training.crops import Augmentation, Chunk, CropLoader, WorkerProgress, draw, resize
from maekit.training.data import (
    BatchLayout,
    ExactSource,
    StepBatches,
    Uploader,
    _no_news_of_children,
    make_loader,
    stop_workers,
)
from maekit.training.image_cache import DecodedSet
from maekit.training.step import MaskedObjective, check_micro_batch

CROP = Augmentation((32, 32), (32, 32), 1)
SHAPE = MaskShape("random", (4, 4), 0.75)


def steps_of(
    shards: ShardSet,
    division: BatchLayout,
    *,
    first: int,
    last: int,
    workers: int = 0,
    decoded=None,
    patience=60,
) -> list[Chunk]:
    """Return the whole share of each step, put together."""
    order, watch = SampleOrder(shards.counts, seed=1, digest=shards.digest, window=2), WorkerProgress(workers)
    source = ExactSource(order, division, first=first, last=last)
    crops = CropLoader(shards, order, CROP, SHAPE, watch=watch, decoded=decoded)
    chunks = iter(make_loader(source, crops, division, workers=workers, prefetch=1, pin=False))
    batches = StepBatches(chunks, division, shards=shards, watch=watch, patience=patience)
    upload = Uploader(torch.device("cpu"))
    try:
        steps = []
        for _ in range(first, last):
            micro_batches = batches.next()
            assert len(micro_batches) == division.share // division.micro_batch
            bad = [line for chunks in micro_batches for chunk in chunks for line in chunk.bad]
            steps.append(Chunk(*upload([chunk for chunks in micro_batches for chunk in chunks])[:3], bad))
        return steps
    finally:
        stop_workers(chunks)


def assert_equal(ours: list[Chunk], theirs: list[Chunk]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        for name in ("images", "flips", "noise"):
            assert torch.equal(getattr(a, name), getattr(b, name))


@pytest.fixture
def small_shards(make_shards) -> ShardSet:
    return open_shards(find_shards(str(make_shards(5, 1, 7))))


@pytest.mark.parametrize("box", [(3, 5, 153, 170), (0, 0, 400, 300), (10, 20, 30, 50), (7, 1, 393, 299)])
def test_crops_are_those_of_exact_arithmetic(box: tuple[int, int, int, int]) -> None:
    """Whichever kernel resizes: within rounding of float64, on a picture with edges, enlarged and reduced."""
    y, x = np.mgrid[:300, :400]
    # Edges that do not overshoot 0 or 255: between their two passes both kernels round to 8 bits.
    picture = np.stack([70 + (x // 13 + y // 9) % 2 * 110, np.sin(x / 7) * 80 + 128, 70 + (x * y) % 110], -1)
    picture = picture.astype(np.uint8)
    left, top, right, bottom = box
    part = picture[top:bottom, left:right]
    exact = torch.from_numpy(part.astype(float)).permute(2, 0, 1)[None]
    for size in ((64, 64), (128, 112)):
        got = resize(Image.fromarray(picture).crop(box), size)
        resized = torch.nn.functional.interpolate(exact, size, mode="bicubic", antialias=True)
        expected = resized[0].permute(1, 2, 0).clamp(0, 255).numpy()
        assert got.shape == (3, *size)
        assert np.abs(got - expected.transpose(2, 0, 1)).max() < 2
        assert np.array_equal(got, resize(part, size))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_do_not_depend_on_ranks_and_workers(small_shards: ShardSet, world: int, workers: int) -> None:
    """Images, flips and mask noise of each step: the same for any division, from any step, across epochs."""
    expected = steps_of(small_shards, BatchLayout(8, 8), first=0, last=6)
    # However a step is divided: two images at a time, and one by one from the workers.
    for first, micro_batch, image_bytes in ((0, 8 // world, 1), (3, 2, 8 << 20)):
        ranks = [
            steps_of(
                small_shards,
                BatchLayout(8, micro_batch, rank, world, image_bytes),
                first=first,
                last=6,
                workers=workers,
            )
            for rank in range(world)
        ]
        whole = [
            Chunk(*(torch.cat([getattr(part, name) for part in step]) for name in ("images", "flips", "noise")), [])
            for step in zip(*ranks, strict=True)
        ]
        assert_equal(whole, expected[first:])


def test_division_covers_each_share_once() -> None:
    for batch, world, micro_batch, image_bytes in (
        (256, 1, 256, 150528),
        (96, 4, 8, 1),
        (30, 2, 5, 3 << 20),
        (7, 1, 7, 1),
    ):
        division = BatchLayout(batch, micro_batch, world - 1, world, image_bytes)
        places = [place for first, last in division.chunks() for place in range(first, last)]
        assert places == list(range(batch // world))
        assert all(first // micro_batch == (last - 1) // micro_batch for first, last in division.chunks())


@pytest.mark.parametrize("kind", ["random", "block", "grid"])
def test_draws_are_a_function_of_the_place(kind: str) -> None:
    """Whether a batch is drawn at once or in parts, within an epoch and across two."""
    shape = MaskShape(kind, (3, 3), 0.6)
    order = SampleOrder(np.array([40]), seed=1, digest="ab" * 32)
    augmentation = dataclasses.replace(CROP, seed=3, color_jitter=0.4)
    whole = draw(order.slice(30, 60), augmentation, shape, 2)
    parts = [draw(order.slice(a, b), augmentation, shape, 2) for a, b in ((30, 31), (31, 47), (47, 60))]
    for name in ("crops", "flips", "noise", "jitter"):
        assert np.array_equal(getattr(whole, name), np.concatenate([getattr(part, name) for part in parts]))
    many = draw(order.slice(0, 2000), augmentation, shape)
    assert 930 < many.flips.sum() < 1070
    assert not draw(order.slice(0, 99), dataclasses.replace(CROP, flip=False), shape).flips.any()
    assert not draw(order.slice(0, 99), dataclasses.replace(CROP, kind="none"), shape).flips.any()
    assert not np.array_equal(draw(order.slice(0, 9), dataclasses.replace(CROP, seed=4), shape).crops, many.crops[:9])


def test_decoded_in_memory_gives_the_same_batches(tmp_path: Path) -> None:
    """Small ones, a large JPEG that is decoded at reduced scale, a turned one, and one that is none."""
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(io.BytesIO(jpeg(5, (300, 200)))).save(buffer, "JPEG", exif=exif)
    samples = {f"{i:03d}": {"jpg": jpeg(i)} for i in range(7)}
    samples |= {"large": {"jpg": jpeg(9, (900, 700))}, "turned": {"jpg": buffer.getvalue()}, "none": {"jpg": b"<html>"}}
    write_shard(tmp_path / "shards/0.tar", samples)
    shards = open_shards(find_shards(str(tmp_path / "shards")))
    seen: list[int] = []
    decoded = DecodedSet(shards, on_images=seen.append)
    assert seen[-1] == 10
    assert decoded.bytes == 3 * (7 * 48 * 40 + 900 * 700 + 300 * 200)
    division = BatchLayout(10, 5)
    expected = steps_of(shards, division, first=0, last=4)
    assert_equal(steps_of(shards, division, first=0, last=4, decoded=decoded, workers=2), expected)
    assert sum(len(step.bad) for step in expected) == 4
    with raises(InputError, match=r"--cache ram: the 10 images take about .* may be used"):
        DecodedSet(shards, room=1000)


def test_the_objective_normalises_and_mirrors() -> None:
    pixels = torch.arange(2 * 4 * 5 * 3, dtype=torch.uint8).reshape(2, 4, 5, 3)
    seen: list[torch.Tensor] = []

    class Model(torch.nn.Module):
        patches = 4

        def forward(self, images: torch.Tensor, noise: torch.Tensor, tokens: None):
            seen.append(images)
            return type("Prediction", (), {"loss": noise.sum()})

    normalizer = Normalizer(IMAGENET_MEAN, IMAGENET_STD, torch.device("cpu"))
    MaskedObjective(Model(), normalizer)(pixels.permute(0, 3, 1, 2), torch.tensor([False, True]), torch.rand(2, 4))
    expected = (pixels.numpy() / 255.0 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    np.testing.assert_allclose(seen[0][0].permute(1, 2, 0), expected[0], atol=1e-5)
    np.testing.assert_allclose(seen[0][1].permute(1, 2, 0), expected[1][:, ::-1], atol=1e-5)


def test_a_micro_batch_that_does_not_fit_names_one_that_does() -> None:
    check_micro_batch(16, 48)
    with raises(InputError, match=r"--micro-batch 15 does not divide the 48 images.* 16 does"):
        check_micro_batch(15, 48)


def test_a_killed_worker_is_named_with_what_it_read(small_shards: ShardSet, monkeypatch) -> None:
    kill_at(monkeypatch, small_shards, "000004", signal.SIGKILL)
    with raises(MaekitError, match=r"reading the data failed: .*being read: 000\.tar 000004"):
        steps_of(small_shards, BatchLayout(8, 8), first=0, last=50, workers=2)


def test_a_hanging_image_is_named_after_a_while(small_shards: ShardSet, monkeypatch) -> None:
    kill_at(monkeypatch, small_shards, "000004", None)
    with raises(MaekitError, match=r"nothing came for 3 s \(being read: (002\.tar \d+, )?000\.tar 000004"):
        steps_of(small_shards, BatchLayout(8, 8), first=0, last=50, workers=1, patience=3)


def test_news_of_a_killed_worker_does_not_end_the_clean_up() -> None:
    """torch's handler raises at any place of the main thread; within it must not, and afterwards it is there again."""

    def raising(number, frame) -> None:
        raise RuntimeError("a worker is killed")

    before = signal.signal(signal.SIGCHLD, raising)
    try:
        with _no_news_of_children():
            os.kill(os.getpid(), signal.SIGCHLD)
            time.sleep(0.01)
        assert signal.getsignal(signal.SIGCHLD) is raising
    finally:
        signal.signal(signal.SIGCHLD, before)


def kill_at(monkeypatch, shards: ShardSet, key: str, number: signal.Signals | None) -> None:
    """Make reading one sample kill the worker, or hang it."""
    crop = CropLoader._crop

    def deadly(self, reader, shard, ordinal, draws):
        result = crop(self, reader, shard, ordinal, draws)
        if shards.index(shard).key(ordinal) == key:
            if number is None:
                time.sleep(600)
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(CropLoader, "_crop", deadly)


def test_a_shard_that_goes_away_is_named(small_shards: ShardSet) -> None:
    small_shards.shards[2].path.unlink()
    with raises(MaekitError, match=r"cannot read .*002\.tar: No such file"):
        steps_of(small_shards, BatchLayout(8, 8), first=0, last=50, workers=2)


def test_a_shard_deleted_while_it_is_open_is_named(small_shards: ShardSet) -> None:
    reader = small_shards.reader()
    reader.read_image(small_shards.index(2), 0)
    path = small_shards.shards[2].path
    path.rename(path.with_suffix(".aside"))
    reader.read_image(small_shards.index(2), 1)  # moved, and still there
    path.with_suffix(".aside").unlink()
    with raises(MaekitError, match=r"002\.tar: deleted or replaced since it was indexed"):
        reader.read_image(small_shards.index(2), 2)


def test_waiting_for_data_heeds_a_stop(small_shards: ShardSet, monkeypatch) -> None:
    """A request to stop is not left waiting behind a slow disk."""
    kill_at(monkeypatch, small_shards, "000004", None)
    division, watch = BatchLayout(8, 8), WorkerProgress(1)
    order = SampleOrder(small_shards.counts, seed=1, digest=small_shards.digest)
    crops = CropLoader(small_shards, order, CROP, SHAPE, watch=watch)
    source = ExactSource(order, division, first=0, last=9)
    chunks = iter(make_loader(source, crops, division, workers=1, prefetch=1, pin=False))
    batches = StepBatches(chunks, division, shards=small_shards, watch=watch, patience=60)
    stop = threading.Event()
    threading.Timer(1.0, stop.set).start()
    before = time.monotonic()
    try:
        while batches.next(stop.is_set) is not None:
            pass
    finally:
        stop_workers(chunks)
    assert time.monotonic() - before < 10
