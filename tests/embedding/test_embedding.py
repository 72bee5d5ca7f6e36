"""`maekit embed`: which rows and errors come of which shards, and what a rerun does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.errors import raises
from support.models import embed_config, timm_embeddings
from support.rows import rows
from support.shards import jpeg, write_shard

import maekit
from maekit.config.check import InspectConfig
from maekit.config.export import ExportConfig
from maekit.embedding.embed import embed
from maekit.exporters.export import export
from maekit.inspection import inspect
from maekit.shards.index import build_index
from maekit.system.errors import ImageError, InputError

pytestmark = pytest.mark.whole


def test_rows_are_keys_in_tar_order(trained: Path, tmp_path: Path) -> None:
    result = embed(embed_config(trained, tmp_path / "out"))
    assert (result.rows, result.errors, result.shards, result.skipped) == (30, 0, 3, 0)
    assert sorted(p.name for p in (tmp_path / "out").glob("*.parquet")) == ["0.parquet", "1.parquet", "2.parquet"]
    got = rows(tmp_path / "out")
    assert got["key"] == [key for s, n in enumerate((9, 1, 20)) for key in [f"s{s}k{i}" for i in range(n)]]
    assert got["shard"] == ["0.tar"] * 9 + ["1.tar"] + ["2.tar"] * 20
    assert got["index"] == [*range(9), 0, *range(20)]
    expected = timm_embeddings(trained, [jpeg(100 * s + i) for s, n in enumerate((9, 1, 20)) for i in range(n)])
    np.testing.assert_allclose(np.array(got["embedding"]), expected, atol=2e-5)
    schema = pq.read_schema(tmp_path / "out" / "0.parquet")
    assert str(schema.field("embedding").type) == "fixed_size_list<element: float not null>[32]" or "[32]" in str(
        schema.field("embedding").type
    )
    footer = json.loads(schema.metadata[b"maekit"])
    record = json.loads((tmp_path / "out" / "_maekit" / "0.tar.json").read_text())
    assert footer["model_sha256"] == record["options"]["model"]


def test_python_embedder_gives_the_same_to_the_bit(trained: Path, tmp_path: Path) -> None:
    """Bytes, paths, Pillow images and arrays; one or many; all equal to what `maekit embed` stored."""
    embed(embed_config(trained, tmp_path / "out", batch_size=16))
    stored = np.array(pq.read_table(tmp_path / "out" / "0.parquet")["embedding"].to_pylist(), np.float32)
    data = [jpeg(i) for i in range(9)]
    embedder = maekit.Embedder(trained / "encoder.onnx", device="cpu")
    np.testing.assert_array_equal(embedder(data), stored)
    (tmp_path / "a.jpg").write_bytes(data[0])
    image = Image.open(tmp_path / "a.jpg")
    one = embedder(data[0])
    assert one.shape == (1, 32)
    for same in (tmp_path / "a.jpg", str(tmp_path / "a.jpg"), image, np.asarray(image), [data[0]]):
        np.testing.assert_array_equal(embedder(same), one)
    assert embedder([]).shape == (0, 32)
    with raises(InputError, match="float64"):
        embedder(np.zeros((3, 3, 3)))
    with pytest.raises(ImageError):
        embedder(b"no image")


def test_the_output_does_not_depend_on_workers_or_history(trained: Path, tmp_path: Path) -> None:
    embed(embed_config(trained, tmp_path / "a", workers=1))
    embed(embed_config(trained, tmp_path / "b", workers=5, shards=(str(trained / "shards" / "{0,2}.tar"),)))
    embed(embed_config(trained, tmp_path / "b", workers=2))
    for path in (tmp_path / "a").glob("*.parquet"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_the_output_does_not_depend_on_the_number_of_cores(trained: Path, tmp_path: Path, monkeypatch) -> None:
    """Each batch runs in one thread, so another machine writes the same bits."""
    import maekit.embedding.embed as module

    for cores in (1, 2, 5):
        monkeypatch.setattr(module, "cores", lambda cores=cores: cores)
        embed(embed_config(trained, tmp_path / f"{cores}"))
    for path in (tmp_path / "1").rglob("*.*"):
        if path.is_file():
            for other in "25":
                assert path.read_bytes() == (tmp_path / other / path.relative_to(tmp_path / "1")).read_bytes()


def test_a_rerun_does_only_what_is_left(trained: Path, tmp_path: Path) -> None:
    config = embed_config(trained, tmp_path / "out")
    embed(config)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.parquet")}
    again = embed(config)
    assert (again.rows, again.shards, again.skipped) == (30, 0, 3)
    # A file without its record, and a record without its file, are both done again.
    (tmp_path / "out" / "_maekit" / "0.tar.json").unlink()
    (tmp_path / "out" / "2.parquet").unlink()
    third = embed(config)
    assert (third.rows, third.shards, third.skipped) == (30, 2, 1)
    assert (tmp_path / "out" / "1.parquet").stat().st_mtime_ns == before[tmp_path / "out" / "1.parquet"]


def test_a_changed_shard_is_embedded_again(trained: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    write_shard(shards / "a.tar", {"x": {"jpg": jpeg(1)}})
    config = embed_config(trained, tmp_path / "out", shards=(str(shards),))
    embed(config)
    write_shard(shards / "a.tar", {"x": {"jpg": jpeg(1)}, "y": {"jpg": jpeg(2)}})
    write_shard(shards / "b.tar", {"z": {"jpg": jpeg(3)}})
    result = embed(config)
    assert (result.rows, result.shards) == (3, 2)
    assert rows(tmp_path / "out")["key"] == ["x", "y", "z"]


def test_every_key_without_a_row_has_a_reason(trained: Path, tmp_path: Path) -> None:
    samples = {
        "good1": {"jpg": jpeg(1)},
        "html": {"jpg": b"<html>"},
        "zero": {"jpg": b""},
        "text": {"txt": b"no image here"},
        "cut": {"jpg": jpeg(2)[:300]},
        "good2": {"png": jpeg(3)},  # the extension is only a hint
    }
    write_shard(tmp_path / "shards" / "mixed.tar", samples)
    write_shard(tmp_path / "shards" / "none.tar", {"a": {"jpg": b"x"}, "b": {"txt": b""}})
    result = embed(embed_config(trained, tmp_path / "out", shards=(str(tmp_path / "shards"),)))
    assert (result.rows, result.errors) == (2, 6)
    assert rows(tmp_path / "out")["key"] == ["good1", "good2"]
    assert not (tmp_path / "out" / "none.parquet").exists()
    errors = [
        json.loads(line)
        for line in (tmp_path / "out" / "_maekit" / "errors" / "mixed.tar.jsonl").read_text().splitlines()
    ]
    assert [(e["index"], e["key"], e["reason"]) for e in errors] == [
        (1, "html", "not_an_image"),
        (2, "zero", "empty"),
        (3, "text", "no_image"),
        (4, "cut", "undecodable"),
    ]
    assert embed(embed_config(trained, tmp_path / "out", shards=(str(tmp_path / "shards"),))).skipped == 2


def test_a_damaged_shard_does_not_stop_the_others(trained: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "shards" / "a.tar", {"x": {"jpg": jpeg(1)}})
    write_shard(tmp_path / "shards" / "b.tar", {"y": {"jpg": jpeg(2)}})
    cut = tmp_path / "shards" / "a.tar"
    cut.write_bytes(cut.read_bytes()[:900])
    result = embed(embed_config(trained, tmp_path / "out", shards=(str(tmp_path / "shards"),)))
    assert (result.rows, result.shards) == (1, 1)
    assert "a.tar" in result.damaged[0]


def test_a_shard_that_changes_meanwhile_does_not_stop_the_others(trained: Path, tmp_path: Path, monkeypatch) -> None:
    import maekit.embedding.inputs as module

    for name in "abc":
        write_shard(tmp_path / "shards" / f"{name}.tar", {f"{name}{i}": {"jpg": jpeg(i)} for i in range(20)})
    original = module.load_index

    def index_then_change(path: Path):
        index = original(path)
        if path.name == "b.tar":
            path.write_bytes(path.read_bytes() + bytes(512))
        return index

    config = embed_config(trained, tmp_path / "out", shards=(str(tmp_path / "shards"),))
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_index", index_then_change)
        result = embed(config)
    assert (result.rows, len(result.damaged)) == (40, 1)
    assert "changed since" in json.loads((tmp_path / "out" / "_maekit" / "b.tar.json").read_text())["damaged"]
    assert embed(config).rows == 60


def test_earlier_embeddings_outlive_a_failing_input(trained: Path, tmp_path: Path) -> None:
    """A shard that cannot be read now keeps what was embedded from it; mended or changed, it is judged by its bytes."""
    shards = tmp_path / "shards"
    for name in "ab":
        write_shard(shards / f"{name}.tar", {f"{name}{i}": {"jpg": jpeg(i)} for i in range(5)})
    config = embed_config(trained, tmp_path / "out", shards=(str(shards),))
    assert embed(config).rows == 10
    whole, rows = (shards / "a.tar").read_bytes(), (tmp_path / "out" / "a.parquet").read_bytes()
    (shards / "a.tar").write_bytes(whole[:3000])
    result = embed(config)
    assert (result.rows, result.skipped, len(result.damaged)) == (10, 1, 1)
    assert "earlier embeddings stay" in result.damaged[0]
    assert (tmp_path / "out" / "a.parquet").read_bytes() == rows
    (shards / "a.tar").write_bytes(whole)  # mended: another time, the same bytes
    for _ in range(2):
        result = embed(config)
        assert (result.rows, result.shards, result.skipped, result.damaged) == (10, 0, 2, [])
    broken = bytearray(whole)
    offset = build_index(shards / "a.tar").image(2).offset
    broken[offset : offset + 400] = bytes(400)
    (shards / "a.tar").write_bytes(broken)  # the same names and sizes, other bytes
    result = embed(config)
    assert (result.rows, result.errors, result.shards, result.skipped) == (9, 1, 1, 1)
    (shards / "a.tar").write_bytes(whole)
    result = embed(config)
    assert (result.rows, result.errors, result.shards, result.skipped) == (10, 0, 1, 1)
    write_shard(shards / "a.tar", {})
    result = embed(config)
    assert (result.rows, result.errors) == (5, 0)
    assert not (tmp_path / "out" / "a.parquet").exists()


def test_no_sample_at_all(trained: Path, tmp_path: Path) -> None:
    for number in range(2):
        write_shard(tmp_path / "empty" / f"{number}.tar", {})
    with raises(InputError, match="the 2 shards hold no sample at all"):
        embed(embed_config(trained, tmp_path / "out", shards=(str(tmp_path / "empty"),)))


def test_the_same_shard_under_another_name_is_refused(trained: Path, tmp_path: Path) -> None:
    """Names are relative to the common folder: another input beside the first one would double its rows."""
    for folder in "ab":
        write_shard(tmp_path / folder / "000.tar", {f"{folder}{i}": {"jpg": jpeg(i)} for i in range(3)})
    one, both = (str(tmp_path / "a"),), (str(tmp_path / "a"), str(tmp_path / "b"))
    embed(embed_config(trained, tmp_path / "out", shards=one))
    with raises(InputError, match=r"000\.tar of an earlier run would be a/000\.tar now"):
        embed(embed_config(trained, tmp_path / "out", shards=both))
    # Another shard of the same name, size and time is not taken for it.
    status = (tmp_path / "a" / "000.tar").stat()
    write_shard(tmp_path / "c" / "x" / "000.tar", {f"c{i}": {"jpg": jpeg(i)} for i in range(3)})
    os.utime(tmp_path / "c" / "x" / "000.tar", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (tmp_path / "c" / "x" / "000.tar").stat().st_size == status.st_size
    assert embed(embed_config(trained, tmp_path / "out", shards=(str(tmp_path / "c"),))).rows == 3
    assert embed(embed_config(trained, tmp_path / "out2", shards=both)).rows == 6
    assert inspect(InspectConfig(str(tmp_path / "out2")))["rows"] == 6


def test_float16(trained: Path, tmp_path: Path) -> None:
    embed(embed_config(trained, tmp_path / "full"))
    embed(embed_config(trained, tmp_path / "half", dtype="float16"))
    full, half = (pq.read_table(tmp_path / name / "2.parquet")["embedding"] for name in ("full", "half"))
    np.testing.assert_array_equal(
        np.array(full.to_pylist(), np.float32).astype(np.float16), np.array(half.to_pylist(), np.float16)
    )


@pytest.mark.parametrize("change", [{"dtype": "float16"}, {"batch_size": 4}])
def test_an_output_belongs_to_one_model_and_set_of_options(trained: Path, tmp_path: Path, change: dict) -> None:
    embed(embed_config(trained, tmp_path / "out"))
    (tmp_path / "out" / "mine.txt").write_text("kept")
    other = embed_config(trained, tmp_path / "out", **change)
    with raises(InputError, match=f"{next(iter(change))} = .*--overwrite"):
        embed(other)
    other.overwrite = True
    assert embed(other).shards == 3
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"


def test_another_model_is_refused(trained: Path, tmp_path: Path) -> None:
    embed(embed_config(trained, tmp_path / "out"))
    export(ExportConfig(trained / "run", tmp_path / "cls.onnx", pool="cls"))
    other = embed_config(trained, tmp_path / "out")
    other.model = str(tmp_path / "cls.onnx")
    with raises(InputError, match="model = "):
        embed(other)


def test_embed_refuses(trained: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("")
    with raises(InputError, match="thesis"):
        embed(embed_config(trained, foreign))
    with raises(InputError, match="--dtype"):
        embed(embed_config(trained, tmp_path / "out", dtype="int8"))
    with raises(InputError, match="--batch-size 0"):
        embed(embed_config(trained, tmp_path / "out", batch_size=0))
    with raises(InputError, match="sync"):
        embed(embed_config(trained, "s3://bucket/out"))
    config = embed_config(trained, tmp_path / "out")
    config.model = str(tmp_path / "missing.onnx")
    with raises(InputError, match="no such file"):
        embed(config)
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    config.model = str(tmp_path / "broken.onnx")
    with raises(InputError, match="cannot load"):
        embed(config)
    assert not (tmp_path / "out").exists()


EMBED = """
import sys
from maekit.config.embed import EmbedConfig
from maekit.embedding.embed import embed
from maekit.system.errors import Stopped
import maekit.embedding.session as session, time
call = session.EncoderSession.__call__
session.EncoderSession.__call__ = lambda self, images: (time.sleep(0.03), call(self, images))[1]
try:
    embed(EmbedConfig({model!r}, ({shards!r},), {out!r}, device="cpu", runtime="onnxruntime", batch_size=4))
except Stopped:
    sys.exit(75)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_at_any_moment_the_rerun_ends_byte_identical(trained: Path, tmp_path: Path, number) -> None:
    shards = tmp_path / "shards"
    for shard in range(12):
        write_shard(shards / f"{shard:02d}.tar", {f"{shard}-{i}": {"jpg": jpeg(i + shard)} for i in range(7)})
    config = embed_config(trained, tmp_path / "whole", shards=(str(shards),), batch_size=4)
    embed(config)
    out = tmp_path / "stopped"
    script = EMBED.format(model=config.model, shards=str(shards), out=str(out))
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path)
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.parquet"))) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    assert process.wait(30) == (75 if number == signal.SIGTERM else -9)
    config.out = str(out)
    result = embed(config)
    assert result.skipped >= 2
    assert result.rows == 84
    assert not [p for p in out.rglob("*.tmp") if p.is_file()]
    for path in (tmp_path / "whole").glob("*.parquet"):
        assert path.read_bytes() == (out / path.name).read_bytes()


def test_embedding_without_torch(trained: Path, tmp_path: Path) -> None:
    """A fresh interpreter in which torch and its friends cannot be imported writes the same bytes."""
    embed(embed_config(trained, tmp_path / "with"))
    script = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "timm", "webdataset", "safetensors", "onnx"):
            raise ImportError(f"{{name}} must not be imported for embedding")
sys.meta_path.insert(0, Blocker())
import maekit
for runtime, out in (("onnxruntime", {str(tmp_path / "without")!r}), ("auto", {str(tmp_path / "auto")!r})):
    maekit.embed(maekit.EmbedConfig({str(trained / "encoder.onnx")!r}, ({str(trained / "shards")!r},), out,
                 device="cpu", runtime=runtime, batch_size=8))
maekit.Embedder({str(trained / "encoder.onnx")!r}, device="cpu")
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    for path in (tmp_path / "with").glob("*.parquet"):
        assert path.read_bytes() == (tmp_path / "without" / path.name).read_bytes()
