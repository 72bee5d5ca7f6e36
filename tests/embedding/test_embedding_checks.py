"""Results are looked at before they count: values that are not finite, inputs that changed, errors tried again."""

import io
import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image
from support.errors import raises
from support.models import embed_config
from support.pages import Notes
from support.rows import rows
from support.shards import jpeg, write_shard

from maekit.config.export import ExportConfig
from maekit.embedding.embed import embed, raise_if_incomplete
from maekit.exporters.export import export
from maekit.system.errors import ImageError, InputError, MaekitError


def black_png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40)).save(buffer, "PNG")
    return buffer.getvalue()


def errors(out: Path, shard: str) -> list[tuple[str, str]]:
    text = (out / "_maekit" / "errors" / f"{shard}.jsonl").read_text()
    return [(row["key"], row["reason"]) for row in map(json.loads, text.splitlines())]


@pytest.mark.parametrize("file_format", ["parquet", "npy"])
def test_what_is_not_finite_is_an_error(trained: Path, black_is_infinite: Path, tmp_path: Path, file_format) -> None:
    """One image among others, and a whole shard, of which a note says that it is the model."""
    black = black_png()
    samples = {f"{i:02d}": {"png": black if i in (3, 12) else jpeg(i), "cls": b"1"} for i in range(20)}
    write_shard(tmp_path / "shards" / "a.tar", samples)
    write_shard(tmp_path / "shards" / "b.tar", {f"b{i}": {"png": black} for i in range(3)})
    write_shard(tmp_path / "shards" / "c.tar", {f"c{i}": {"png": black} for i in range(3)})
    notes = Notes()
    config = embed_config(
        trained,
        tmp_path / "out",
        shards=(str(tmp_path / "shards"),),
        format=file_format,
        keep=("cls",),
        verify=True,
    )
    config.model = str(black_is_infinite)
    result = embed(config, notes)
    raise_if_incomplete(result)
    assert (result.rows, result.errors) == (18, 8)
    assert errors(tmp_path / "out", "a.tar") == [("03", "not_finite"), ("12", "not_finite")]
    assert [said for said in notes.said if "not finite" in said] == [
        "b.tar: 3 of 3 embeddings are not finite: it is the model, not the images (the model gives values that are not "
        "finite)"
    ]


def test_what_float16_cannot_hold_is_an_error(trained: Path, tmp_path: Path) -> None:
    export(ExportConfig(trained / "run", tmp_path / "e.onnx", normalize=False))
    proto = onnx.load(tmp_path / "e.onnx")
    for tensor in proto.graph.initializer:
        if tensor.name in ("norm.weight", "norm.bias"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1e6), tensor.name))
    onnx.save(proto, tmp_path / "e.onnx")
    for dtype, expected in (("float16", (0, 30)), ("float32", (30, 0))):
        notes = Notes()
        config = embed_config(trained, tmp_path / dtype, dtype=dtype, verify=True)
        config.model = str(tmp_path / "e.onnx")
        result = embed(config, notes)
        if expected[0]:
            raise_if_incomplete(result)
        else:
            with pytest.raises(MaekitError, match="none of 30 samples has an embedding"):
                raise_if_incomplete(result)
        assert (result.rows, result.errors) == expected
        assert any("too large for float16; --dtype float32 holds them" in said for said in notes.said) == (
            not expected[0]
        )


def _behind_its_back(path: Path, change) -> None:
    """Change a file's bytes, and nothing that shows outside."""
    status, data = path.stat(), bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size


def flip(needle: bytes):
    def change(data: bytearray) -> None:
        data[data.index(needle) + len(needle) // 2] ^= 1

    return change


def test_verify_reads_the_input_again(trained: Path, tmp_path: Path) -> None:
    """Bytes of an image or of a stored member that changed under the same size, keys and time; others do not matter."""
    shards, out = tmp_path / "shards", tmp_path / "out"
    for name in ("a", "b"):
        samples = {
            f"{name}{i}": {"jpg": jpeg(i), "json": b'{"caption": "old"}', "txt": b"not kept %d" % i} for i in range(5)
        }
        write_shard(shards / f"{name}.tar", samples)
    config = embed_config(trained, out, shards=(str(shards),), keep=("json",), verify=True)
    raise_if_incomplete(embed(config))
    _behind_its_back(shards / "a.tar", flip(b"not kept 3"))
    raise_if_incomplete(embed(config))
    for needle in (jpeg(3)[200:220], b"old"):
        _behind_its_back(shards / "a.tar", flip(needle))
        result = embed(config)
        assert result.skipped == 2
        with raises(
            MaekitError, match=r"--verify: 1 problem, the first: a\.tar: its images or kept members have other"
        ):
            raise_if_incomplete(result)
        os.utime(shards / "a.tar")  # as the message says
        result = embed(config)
        raise_if_incomplete(result)
        assert result.shards == 1


def test_verify_reads_a_folder_again(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.jpg").write_bytes(jpeg(i))
    config = embed_config(trained, tmp_path / "out", shards=(str(folder),), verify=True)
    raise_if_incomplete(embed(config))
    _behind_its_back(folder / "2.jpg", flip(jpeg(2)[200:220]))
    with raises(MaekitError, match="images-00000: its images"):
        raise_if_incomplete(embed(config))


def test_verify_after_a_crash(trained: Path, tmp_path: Path, monkeypatch) -> None:
    """What killed its decoder was never read to the end, and is no difference."""
    import maekit.embedding.decode_pool as module

    decode = module._Worker.decode

    def deadly(self, slot, row, number, name, locations):
        if any(location[0] > 3000 for location in locations[:1]) and len(locations) == 1:
            os._exit(9)
        if len(locations) > 1:
            os._exit(9)
        return decode(self, slot, row, number, name, locations)

    monkeypatch.setattr(module._Worker, "decode", deadly)
    write_shard(tmp_path / "shards" / "a.tar", {f"{i}": {"jpg": jpeg(i)} for i in range(4)})
    result = embed(embed_config(trained, tmp_path / "out", shards=(str(tmp_path / "shards"),), verify=True))
    assert 0 < result.errors < 4
    assert {reason for _, reason in errors(tmp_path / "out", "a.tar")} == {"crashed"}
    raise_if_incomplete(result)


def test_retry(trained: Path, tmp_path: Path) -> None:
    """Files that can be read again: only their part is embedded anew, and the rest of the errors stay."""
    import maekit.embedding.inputs as inputs

    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(9):
        (folder / f"{i}.jpg").write_bytes(jpeg(i))
    (folder / "3.jpg").write_bytes(b"<html>")
    fails = True
    original = inputs.read_file

    def read_file(path: str) -> bytes:
        if fails and path.endswith("5.jpg"):
            raise ImageError("unreadable", "Permission denied")
        return original(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "read_file", read_file)
        patch.setattr(inputs, "IMAGES_PER_PART", 4)
        config = embed_config(trained, tmp_path / "out", shards=(str(folder),), verify=False)
        assert (embed(config).rows, embed(config).skipped) == (7, 3)
        fails = False
        assert embed(config).skipped == 3  # nothing tells that the file has come back
        before = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.parquet")}
        config.retry, config.verify = ("unsupported_format, unreadable",), True
        notes = Notes()
        result = embed(config, notes)
        raise_if_incomplete(result)
        assert (result.rows, result.errors, result.shards, result.skipped) == (8, 1, 1, 2)
        assert "1 shard with errors to retry: embedded again" in notes.said
        assert rows(tmp_path / "out")["key"] == [f"{i}.jpg" for i in range(9) if i != 3]
        after = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.parquet")}
        assert [path.name for path in sorted(after) if after[path] != before[path]] == ["images-00001.parquet"]
        assert embed(config).skipped == 3  # no such error is left
        config.retry = ("not_an_image", "unreadable")
        assert (embed(config).shards, embed(config).errors) == (1, 1)
        config.retry = ("unreadable,typo",)
        with raises(InputError, match="--retry typo: must be one of bad_member, checksum, crashed"):
            embed(config)


def test_what_failed_is_done_like_the_first_time(trained: Path, tmp_path: Path) -> None:
    """An output retried in full has the bytes of one that never failed."""
    write_shard(tmp_path / "shards" / "a.tar", {f"{i}": {"jpg": jpeg(i) if i != 2 else b"<html>"} for i in range(9)})
    for out in ("once", "again"):
        embed(embed_config(trained, tmp_path / out, shards=(str(tmp_path / "shards"),)))
    embed(embed_config(trained, tmp_path / "again", shards=(str(tmp_path / "shards"),), retry=("not_an_image",)))
    assert (tmp_path / "once" / "a.parquet").read_bytes() == (tmp_path / "again" / "a.parquet").read_bytes()
