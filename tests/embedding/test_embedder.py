"""`maekit.Embedder`: which image failed, what went well beside it, and life in other processes."""

import copy
import io
import multiprocessing
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.errors import raises
from support.shards import jpeg

import maekit
from maekit.config.export import ExportConfig
from maekit.exporters.export import export
from maekit.system.errors import ImageError, InputError
from maekit.system.files import sha256_file


@pytest.fixture
def embedder(trained: Path) -> maekit.Embedder:
    return maekit.Embedder(trained / "encoder.onnx", device="cpu")


@pytest.fixture
def bad(tmp_path: Path) -> dict[str, tuple[object, str]]:
    """Images of every kind that give no embedding, each with its reason."""
    (tmp_path / "cut.jpg").write_bytes(jpeg(1, (300, 300))[:2000])
    (tmp_path / "web.jpg").write_bytes(b"<html>404</html>")
    return {
        "a cut path": (tmp_path / "cut.jpg", "undecodable"),
        "a web page": (str(tmp_path / "web.jpg"), "not_an_image"),
        "no file": (str(tmp_path / "none.jpg"), "unreadable"),
        "a folder": (tmp_path, "unreadable"),
        "a name with a NUL": ("a\0b.jpg", "unreadable"),
        "cut bytes": (jpeg(1, (300, 300))[:2000], "undecodable"),
        "no bytes": (b"", "empty"),
        "an opened image": (Image.open(tmp_path / "cut.jpg"), "undecodable"),
        "no pixels": (Image.new("RGB", (0, 8)), "empty"),
        "an array without pixels": (np.zeros((0, 8, 3), np.uint8), "empty"),
        "floats": (np.zeros((8, 8, 3), np.float32), "not_an_image"),
        "grey": (np.zeros((8, 8), np.uint8), "not_an_image"),
        "four channels": (np.zeros((8, 8, 4), np.uint8), "not_an_image"),
        "nothing": (None, "not_an_image"),
        "a float image": (Image.fromarray(np.zeros((8, 8), np.float32)), "unsupported_mode"),
    }


def test_every_error_says_which_image(embedder: maekit.Embedder, bad) -> None:
    for name, (image, reason) in bad.items():
        with pytest.raises(ImageError) as caught:
            embedder([jpeg(1), jpeg(2), image, jpeg(3)])
        error = caught.value
        assert (error.index, error.reason) == (2, reason), name
        assert str(error).startswith("image 2")
        path = getattr(image, "filename", None) or image
        if isinstance(path, (str, os.PathLike)):
            assert error.path == str(path)
            assert f"({path})" in str(error)
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), again.index, again.path) == (type(error), str(error), 2, error.path)
        if image is not None:
            with pytest.raises(ImageError, match="image 0"):
                embedder(image)
    with raises(InputError, match="not NoneType"):
        embedder(None)
    with raises(InputError, match="on_error 'ignore'"):
        embedder([], on_error="ignore")


def test_skip_returns_the_rest(embedder: maekit.Embedder, bad) -> None:
    """Rows, the inputs that they are of, and the reasons of the others; more than a batch, from a generator."""
    good = [jpeg(i) for i in range(40)]
    mixed: list[object] = list(good)
    for at, (image, _) in enumerate(bad.values()):
        mixed.insert(3 * at, image)
    found = embedder(iter(mixed), on_error="skip")
    np.testing.assert_array_equal(found.embeddings, embedder(good))
    assert [mixed[at] for at in found.index] == good
    assert [(error.index, error.reason) for error in found.errors] == [
        (3 * at, reason) for at, (_, reason) in enumerate(bad.values())
    ]
    nothing = embedder([None, b""], on_error="skip")
    assert (nothing.embeddings.shape, nothing.index.shape, len(nothing.errors)) == ((0, 32), (0,), 2)
    one = embedder(good[0], on_error="skip")
    assert (one.embeddings.shape, one.index.tolist(), one.errors) == ((1, 32), [0], [])


def test_an_embedding_that_is_not_finite_is_an_error(black_is_infinite: Path) -> None:
    embedder = maekit.Embedder(black_is_infinite, device="cpu")
    images = [np.full((40, 40, 3), value, np.uint8) for value in (9, 0, 9)]
    with pytest.raises(ImageError, match="image 1: the model gives values that are not finite") as caught:
        embedder(images)
    assert (caught.value.reason, caught.value.index) == ("not_finite", 1)
    found = embedder(images, on_error="skip")
    assert found.index.tolist() == [0, 2]
    assert np.isfinite(found.embeddings).all()
    assert [error.index for error in found.errors] == [1]


def test_a_lazily_opened_image_follows_the_rules_of_its_bytes(embedder: maekit.Embedder, monkeypatch) -> None:
    """Too many pixels are refused before they are decoded."""
    buffer = io.BytesIO()
    Image.new("RGB", (200, 200)).save(buffer, "PNG")
    monkeypatch.setattr("maekit.images.MAX_PIXELS", 30_000)
    for image in (buffer.getvalue(), Image.open(buffer)):
        with pytest.raises(ImageError, match="200 x 200 pixels"):
            embedder(image)


def test_one_opened_image_many_times(embedder: maekit.Embedder, tmp_path: Path) -> None:
    """Pillow reads its file when it is first used, which two threads must not do at once."""
    (tmp_path / "a.jpg").write_bytes(jpeg(1, (900, 900)))
    with Image.open(tmp_path / "a.jpg") as loaded:
        loaded.load()
    expected = np.repeat(embedder(loaded), 8, axis=0)
    for _ in range(5):
        np.testing.assert_allclose(embedder([Image.open(tmp_path / "a.jpg")] * 8), expected, atol=1e-6)


def test_pickled_and_copied_it_gives_the_same(trained: Path, tmp_path: Path, monkeypatch) -> None:
    """By its path, wherever the process stands by then; another file under the path is refused."""
    shutil.copy(trained / "encoder.onnx", tmp_path / "e.onnx")
    monkeypatch.chdir(tmp_path)
    embedder = maekit.Embedder("e.onnx", device="cpu")
    vectors = embedder(jpeg(1))
    dumped = pickle.dumps(embedder)
    assert len(dumped) < 2000
    monkeypatch.chdir("/")
    for again in (pickle.loads(dumped), copy.deepcopy(embedder)):
        np.testing.assert_array_equal(again(jpeg(1)), vectors)
        assert (again.dim, again.provider, again.sha256) == (32, embedder.provider, sha256_file(tmp_path / "e.onnx"))
    export(ExportConfig(trained / "run", tmp_path / "e.onnx", pool="cls"))
    with raises(InputError, match=r"e\.onnx is another file now"):
        pickle.loads(dumped)
    np.testing.assert_array_equal(embedder(jpeg(1)), vectors)  # what is open stays


def in_child(call) -> str:
    """Call in a forked process that may not take long, and return what it gave."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        try:
            sender.send(call())
        except maekit.MaekitError as error:
            sender.send(str(error))

    process = context.Process(target=child)
    process.start()
    try:
        assert receiver.poll(60), "the forked process hangs"
        answer = receiver.recv()
        process.join(60)
        assert process.exitcode == 0
        return answer
    finally:
        process.kill()


def test_used_after_a_fork(trained: Path, tmp_path: Path) -> None:
    """The session is opened anew, once for all threads; another file by then is refused; deleting it hangs nothing."""
    from concurrent.futures import ThreadPoolExecutor

    shutil.copy(trained / "encoder.onnx", tmp_path / "e.onnx")
    embedder = maekit.Embedder(tmp_path / "e.onnx", device="cpu")
    vectors = embedder([jpeg(1), jpeg(2)])

    def threads() -> bool:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(embedder, [[jpeg(1), jpeg(2)]] * 8))
        return all(np.array_equal(one, vectors) for one in found)

    assert in_child(threads) is True
    assert in_child(lambda: in_child(threads)) is True
    export(ExportConfig(trained / "run", tmp_path / "e.onnx", pool="cls"))
    assert "is another file now" in str(in_child(lambda: embedder(jpeg(1)).shape))


def test_a_forked_process_may_drop_it(trained: Path, tmp_path: Path, python: list[str]) -> None:
    """Used there or not: the inherited session is not destroyed, which would wait for threads of the parent."""
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    code = f"""
import gc, os, maekit
embedder = maekit.Embedder({str(trained / "encoder.onnx")!r}, device="cpu")
embedder("a.jpg")
for use in (False, True):
    if not (pid := os.fork()):
        if use: embedder("a.jpg")
        del embedder; gc.collect(); os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
"""
    subprocess.run([*python, "-c", code], check=True, timeout=60, cwd=tmp_path)


def test_the_digest_is_of_the_bytes_that_run(trained: Path, tmp_path: Path) -> None:
    """Two files take turns under one name while it is opened: digest, description and vectors are of one of them."""
    export(ExportConfig(trained / "run", tmp_path / "cls.onnx", pool="cls"))
    shutil.copy(trained / "encoder.onnx", tmp_path / "avg.onnx")
    known = {
        sha256_file(path): (path.stem, maekit.Embedder(path, device="cpu")(jpeg(1)))
        for path in (tmp_path / "cls.onnx", tmp_path / "avg.onnx")
    }
    swap = (
        "import itertools, os, shutil\n"
        "for name in itertools.cycle(('cls', 'avg')):\n"
        "    shutil.copy(f'{name}.onnx', 'next'); os.rename('next', 'e.onnx')\n"
    )
    shutil.copy(tmp_path / "avg.onnx", tmp_path / "e.onnx")
    swapper = subprocess.Popen(["python3", "-c", swap], cwd=tmp_path)
    try:
        seen = set()
        for _ in range(60):
            embedder = maekit.Embedder(tmp_path / "e.onnx", device="cpu")
            pool, vectors = known[embedder.sha256]
            assert embedder._session.description.pool == pool
            np.testing.assert_array_equal(embedder(jpeg(1)), vectors)
            seen.add(pool)
    finally:
        swapper.kill()
        swapper.wait()
    assert len(seen) == 2
