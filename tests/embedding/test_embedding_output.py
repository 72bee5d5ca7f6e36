"""What `maekit embed` writes besides rows: layouts, members kept, limits, splits, and what --verify sees."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.errors import raises
from support.models import embed_config
from support.processes import finish, start
from support.rows import rows
from support.shards import jpeg, write_shard

from maekit.embedding.embed import embed, raise_if_incomplete
from maekit.embedding.splits import Split, find_split
from maekit.system.errors import InputError, MaekitError
from maekit.system.locks import owned


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Return three shards in two folders, one sample of them broken, with json, cls and binary members."""
    for shard, (name, count) in enumerate((("a/0.tar", 7), ("a/1.tar", 5), ("b/0.tar", 11))):
        samples = {}
        for i in range(count):
            members = {"jpg": jpeg(10 * shard + i), "json": b'{"n": %d}' % i, "cls": b"%d" % (i % 3)}
            if i == 2:
                members = {"jpg": b"broken", "json": b"{}"}
            if i == 3:
                members = {"jpg": jpeg(i), "mask.npy": bytes([0, 255, i])}
            samples[f"{name[0]}{shard}-{i}"] = members
        write_shard(tmp_path / "input" / name, samples)
    return tmp_path / "input"


def test_npy_layout(trained: Path, shards: Path, tmp_path: Path) -> None:
    """Equal numbers, equal rows; the numbers stay when shards are added before or between the others."""
    (shards / "b").rename(tmp_path / "later")
    config = embed_config(trained, tmp_path / "npy", shards=(str(shards),), format="npy", keep=("cls",))
    embed(config)
    (tmp_path / "later").rename(shards / "0-first")
    embed(config)
    config.verify = True
    raise_if_incomplete(embed(config))
    out = tmp_path / "npy"
    assert sorted(p.name for p in (out / "img_emb").iterdir()) == [f"img_emb_0000{i}.npy" for i in range(3)]
    assert sorted(p.name for p in (out / "metadata").iterdir()) == [f"metadata_0000{i}.parquet" for i in range(3)]
    embed(embed_config(trained, tmp_path / "parquet", shards=(str(shards),)))
    for number, name in enumerate(("a/0", "a/1", "0-first/0")):
        matrix = np.load(out / "img_emb" / f"img_emb_{number:05d}.npy", mmap_mode="r")
        metadata = pq.read_table(out / "metadata" / f"metadata_{number:05d}.parquet")
        expected = pq.read_table(tmp_path / "parquet" / f"{name}.parquet")
        assert matrix.dtype == np.dtype("<f4")
        assert matrix.flags.c_contiguous
        np.testing.assert_array_equal(matrix, np.array(expected["embedding"].to_pylist(), np.float32))
        assert metadata.column_names == ["key", "shard", "index", "cls"]
        assert metadata.select(["key", "shard", "index"]).equals(expected.select(["key", "shard", "index"]))


def test_npy_of_a_shard_without_rows(trained: Path, tmp_path: Path) -> None:
    """There is no empty part: the number is given and not used."""
    write_shard(tmp_path / "in" / "0.tar", {"a": {"jpg": b"x"}})
    write_shard(tmp_path / "in" / "1.tar", {"b": {"jpg": jpeg(1)}})
    config = embed_config(
        trained, tmp_path / "out", shards=(str(tmp_path / "in"),), format="npy", dtype="float16", verify=True
    )
    raise_if_incomplete(embed(config))
    assert [p.name for p in (tmp_path / "out" / "img_emb").iterdir()] == ["img_emb_00001.npy"]
    assert np.load(tmp_path / "out" / "img_emb" / "img_emb_00001.npy").dtype == np.dtype("<f2")


def test_files_do_not_depend_on_how_rows_come(trained: Path, tmp_path: Path, monkeypatch) -> None:
    """More rows than a group holds: as many as fill it go to the disk at once, whatever the batches are."""
    import maekit.embedding.formats as module

    monkeypatch.setattr(module, "_GROUP", 10)
    write_shard(tmp_path / "in" / "0.tar", {f"k{i}": {"jpg": jpeg(i % 5)} for i in range(37)})
    for format_ in ("parquet", "npy"):
        for size in (4, 16):
            out = tmp_path / f"{format_}{size}"
            config = embed_config(trained, out, shards=(str(tmp_path / "in"),), format=format_, batch_size=size)
            raise_if_incomplete(embed(config))
    table = pq.ParquetFile(tmp_path / "parquet4" / "0.parquet")
    assert [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)] == [10, 10, 10, 7]
    assert table.read()["key"].to_pylist() == [f"k{i}" for i in range(37)]
    matrix = np.load(tmp_path / "npy4" / "img_emb" / "img_emb_00000.npy")
    np.testing.assert_array_equal(matrix, np.array(table.read()["embedding"].to_pylist(), np.float32))
    np.testing.assert_allclose(matrix, np.load(tmp_path / "npy16" / "img_emb" / "img_emb_00000.npy"), atol=1e-5)
    metadata = [(tmp_path / f"npy{size}" / "metadata" / "metadata_00000.parquet").read_bytes() for size in (4, 16)]
    assert metadata[0] == metadata[1]


def test_keep(trained: Path, shards: Path, tmp_path: Path) -> None:
    """Members ride along as they stand in the shard; text that is not UTF-8 stays readable."""
    write_shard(shards / "c.tar", {"x": {"jpg": jpeg(1), "json": b"caf\xe9"}})
    config = embed_config(trained, tmp_path / "out", shards=(str(shards),), keep=("json", "cls", "mask.npy"))
    embed(config)
    table = pq.read_table(tmp_path / "out" / "a" / "0.parquet")
    assert table.column_names == ["key", "shard", "index", "embedding", "json", "cls", "mask.npy"]
    assert table["json"].to_pylist() == ['{"n": 0}', '{"n": 1}', None, '{"n": 4}', '{"n": 5}', '{"n": 6}']
    assert table["cls"].to_pylist() == ["0", "1", None, "1", "2", "0"]
    assert table["mask.npy"].to_pylist() == [None, None, b"\x00\xff\x03", None, None, None]
    assert (table.schema.field("cls").type, table.schema.field("mask.npy").type) == (pa.string(), pa.binary())
    assert pq.read_table(tmp_path / "out" / "c.parquet")["json"].to_pylist() == ["caf\\xe9"]
    # A member kept that changes makes the shard another one, although its images are the same.
    before = table["json"].to_pylist()
    data = (shards / "a" / "0.tar").read_bytes()
    (shards / "a" / "0.tar").write_bytes(data.replace(b'{"n": 4}', b'{"n": 9}'))
    result = embed(config)
    assert (result.shards, result.skipped) == (1, 3)
    after = pq.read_table(tmp_path / "out" / "a" / "0.parquet")["json"].to_pylist()
    assert [value for value in after if value not in before] == ['{"n": 9}']
    # Without members kept, it is the same shard.
    (shards / "a" / "0.tar").write_bytes(data)
    plain = embed_config(trained, tmp_path / "plain", shards=(str(shards),))
    embed(plain)
    (shards / "a" / "0.tar").write_bytes(data.replace(b'{"n": 4}', b'{"n": 8}'))
    assert embed(plain).skipped == 4


def test_limit_and_select(trained: Path, shards: Path, tmp_path: Path) -> None:
    """The first samples of the whole input, in its order; keys that match; both together; errors count as samples."""

    def run(name: str, **changes):
        config = embed_config(trained, tmp_path / name, shards=(str(shards),), verify=True, **changes)
        result = embed(config)
        raise_if_incomplete(result)
        assert embed(config).shards == 0
        return result, rows(tmp_path / name)["key"]

    everything = run("all")[1]
    result, keys = run("limit", limit=9)
    assert (result.rows, result.errors) == (8, 1)
    assert keys == everything[:8]
    result, keys = run("select", select="*-[14]")
    assert keys == [key for key in everything if key[-2:] in ("-1", "-4")]
    result, keys = run("both", select="*-[1-4]", limit=6)
    assert (result.rows, result.errors) == (4, 2)
    assert keys == ["a0-1", "a0-3", "a0-4", "a1-1"]
    with raises(InputError, match="limit = 9, and 10 is asked"):
        run("limit", limit=10)
    with raises(InputError, match="hold no sample at all whose key matches dog"):
        run("none", select="dog*")
    assert not list((tmp_path / "none").iterdir())  # a slip does not decide what the directory is for


def test_a_folder_of_images(trained: Path, tmp_path: Path, monkeypatch) -> None:
    """Keys are paths; a changed, a new and an unreadable image are each seen by the next run."""
    import maekit.embedding.inputs as module

    monkeypatch.setattr(module, "IMAGES_PER_PART", 4)
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for i in range(6):
        (folder / ("sub" if i % 2 else ".") / f"{i}.jpg").write_bytes(jpeg(i))
    (folder / "3.json").write_text("{}")
    (folder / "notes.txt").write_text("no image")
    (folder / "bad.png").write_bytes(b"nothing")
    config = embed_config(trained, tmp_path / "out", shards=(str(folder),), verify=True)
    result = embed(config)
    raise_if_incomplete(result)
    assert (result.rows, result.errors, result.shards) == (6, 1, 2)
    got = rows(tmp_path / "out")
    assert got["key"] == ["0.jpg", "2.jpg", "4.jpg", "sub/1.jpg", "sub/3.jpg", "sub/5.jpg"]
    write_shard(tmp_path / "in" / "x.tar", {f"{i}": {"jpg": jpeg(i)} for i in (0, 2, 4, 1, 3, 5)})
    embed(embed_config(trained, tmp_path / "tar", shards=(str(tmp_path / "in"),)))
    np.testing.assert_allclose(got["embedding"], rows(tmp_path / "tar")["embedding"], atol=1e-6)
    assert embed(config).skipped == 2
    os.utime(folder / "0.jpg")  # another time, the same bytes
    assert (embed(config).skipped, embed(config).skipped) == (2, 2)
    (folder / "4.jpg").write_bytes(jpeg(40))
    assert embed(config).shards == 1
    with raises(InputError, match="give it alone"):
        embed(embed_config(trained, tmp_path / "two", shards=(str(folder), str(tmp_path / "in"))))
    (folder / "sub" / "5.jpg").unlink()
    (folder / "sub" / "5.jpg").symlink_to(folder / "sub" / "1.jpg")
    raise_if_incomplete(embed(config))


def test_a_folder_that_changes_while_it_is_embedded(trained: Path, tmp_path: Path, monkeypatch) -> None:
    """Its rows are not committed: they would be of images that nobody has."""
    import maekit.embedding.inputs as module

    (tmp_path / "pictures").mkdir()
    for i in range(3):
        (tmp_path / "pictures" / f"{i}.jpg").write_bytes(jpeg(i))
    config = embed_config(trained, tmp_path / "out", shards=(str(tmp_path / "pictures"),))
    open_ = module.FolderPart.open

    def open_then_remove(self, remote):
        images = open_(self, remote)
        (tmp_path / "pictures" / "2.jpg").unlink()
        return images

    with monkeypatch.context() as patch:
        patch.setattr(module.FolderPart, "open", open_then_remove)
        result = embed(config)
    assert (result.rows, len(result.damaged)) == (0, 1)
    assert "changed while it was embedded" in result.damaged[0]
    assert embed(config).rows == 2


def test_splits_share_an_output(trained: Path, shards: Path, tmp_path: Path) -> None:
    embed(embed_config(trained, tmp_path / "whole", shards=(str(shards),)))
    results = [
        embed(embed_config(trained, tmp_path / "out", shards=(str(shards),), num_splits=2, split=split, verify=True))
        for split in (1, 0)
    ]
    assert [(result.shards, result.split) for result in results] == [(1, "1-of-2"), (2, "0-of-2")]
    whole = embed(embed_config(trained, tmp_path / "out", shards=(str(shards),), verify=True))
    raise_if_incomplete(whole)
    assert (whole.shards, whole.skipped, whole.rows) == (0, 3, 20)
    for path in (tmp_path / "whole").rglob("*.*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "out" / path.relative_to(tmp_path / "whole")).read_bytes()


def test_which_split_a_launcher_means(monkeypatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in (
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
            "LOCAL_WORLD_SIZE",
        ):
            monkeypatch.delenv(name)

    def split(*asked: int | str | None, **environment: str) -> Split:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            return find_split(*(asked or (None, None)))

    assert split() == Split()
    assert split(2, 5) == Split(2, 5, "options")
    ranks = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert split(**ranks, TORCHELASTIC_RUN_ID="1") == Split(5, 8, "torchrun", 1, 4)
    assert split(**ranks) == Split()  # of a platform: every worker may have an input of its own
    assert split("auto", None, **ranks) == Split(5, 8, "torchrun", 1, 4)
    tasks = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}
    assert split(**tasks) == Split()  # the script of a job, not one of its tasks
    slurm = split(**tasks, SLURM_STEP_ID="0")
    assert (slurm.number, slurm.count, slurm.origin) == (3, 4, "SLURM")
    array = dict(zip(("ID", "MIN", "MAX", "COUNT", "STEP"), ("7", "1", "10", "4", "3"), strict=True))
    variables = {f"SLURM_ARRAY_TASK_{name}": value for name, value in array.items()}
    assert split(**variables) == Split()  # each task of an array may have an input of its own
    found = split("auto", None, **variables, SLURM_NTASKS="1")
    assert (found.number, found.count) == (2, 4)
    gaps = {f"SLURM_ARRAY_TASK_{k}": v for k, v in {"ID": "1", "MIN": "1", "MAX": "9", "COUNT": "3"}.items()}
    with raises(InputError, match="gaps"):
        split("auto", None, **gaps)
    with raises(InputError, match="name a split"):
        split("auto", None)
    assert split(0, 1, RANK="1", WORLD_SIZE="2").count == 1  # what was asked for goes first
    for number, count, said in ((5, 5, "0 to 4"), (None, 5, "go together"), (1, None, "go together")):
        with raises(InputError, match=said):
            find_split(number, count)
    parts = list(range(10))
    shares = [Split(number, 3).of(parts) for number in range(3)]
    assert sorted(part for share in shares for part in share) == parts


def test_a_second_run_is_refused(trained: Path, shards: Path, tmp_path: Path) -> None:
    config = embed_config(trained, tmp_path / "out", shards=(str(shards),))
    embed(config)
    with owned(tmp_path / "out" / "_maekit" / ".locks" / "runs" / "all"):
        assert finish(start(config, tmp_path / "log")) == [2]
        assert f"is in use by process {os.getpid()} on" in (tmp_path / "log").read_text()
    write_shard(shards / "new.tar", {"n": {"jpg": jpeg(1)}})
    with owned(tmp_path / "out" / "_maekit" / ".locks" / "shards" / "new.tar"):
        assert finish(start(config, tmp_path / "log")) == [1]  # all but the shard that another run has
        assert "1 shard is in the hands of another run: new.tar" in (tmp_path / "log").read_text()
    assert embed(config).shards == 1


def test_overwrite_waits_for_splits_at_work(trained: Path, shards: Path, tmp_path: Path) -> None:
    config = embed_config(trained, tmp_path / "out", shards=(str(shards),))
    embed(config)
    config.overwrite = True
    lock = tmp_path / "out" / "_maekit" / ".locks" / "runs" / "1-of-2"
    script = f"""
import sys, time
from pathlib import Path
from maekit.system.locks import owned
with owned(Path({str(lock)!r})):
    print("locked", flush=True)
    sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, text=True, **pipes) as other:
        assert other.stdout.readline() == "locked\n"
        with raises(InputError, match=r"--overwrite: .* is in use by process"):
            embed(config)
        other.stdin.close()
    assert embed(config).shards == 3
    with raises(InputError, match="--overwrite with several splits"):
        embed(embed_config(trained, tmp_path / "out", overwrite=True, num_splits=2, split=0))


@pytest.mark.parametrize("format_", ["parquet", "npy"])
def test_what_a_killed_run_published_without_a_record_goes(trained: Path, tmp_path: Path, format_: str) -> None:
    """Of two files, one: readers pair files by their order, and would give every later row another's key."""
    for name in "abc":
        write_shard(tmp_path / "in" / f"{name}.tar", {name: {"jpg": jpeg(ord(name))}})
    config = embed_config(trained, tmp_path / "out", shards=(str(tmp_path / "in"),), format=format_)
    embed(config)
    out = tmp_path / "out"
    published = sorted(path.relative_to(out) for path in out.rglob("*.*") if path.suffix in (".npy", ".parquet"))
    mine = [out / path for path in published if "b" in path.stem or "1" in path.stem][-1]
    (out / "mine.parquet").write_bytes(b"not written by embed")
    for gone in ((tmp_path / "in" / "b.tar").unlink, lambda: (tmp_path / "in" / "b.tar").write_bytes(b"cut")):
        write_shard(tmp_path / "in" / "b.tar", {"b": {"jpg": jpeg(1)}})
        embed(config)
        paths = [str(path) for path in published if "b" in path.stem or "1" in path.stem]
        (out / "_maekit" / "b.tar.json").write_text(json.dumps({"shard": "b.tar", "about_to_write": paths}))
        for path in published:
            if "00001" in path.name and out / path != mine:
                (out / path).unlink()
        assert mine.exists()
        gone()
        embed(config)
        assert not mine.exists()
        left = [path for path in out.rglob("*.*") if path.suffix in (".npy", ".parquet")]
        assert len(left) == (3 if format_ == "parquet" else 5)
    assert (out / "mine.parquet").exists()


def test_names_that_would_be_taken_for_bookkeeping(trained: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "in" / "_maekit" / "0.tar", {"a": {"jpg": jpeg(1)}})
    write_shard(tmp_path / "in" / "1.tar", {"a\u2028b": {"jpg": b"broken"}, "c": {"jpg": jpeg(1)}})
    config = embed_config(trained, tmp_path / "out", shards=(str(tmp_path / "in"),), verify=True)
    with raises(InputError, match="a folder named _maekit is no input"):
        embed(config)
    config.shards = (str(tmp_path / "in" / "1.tar"),)
    raise_if_incomplete(embed(config))


def _damage_parquet(out: Path) -> None:
    path = out / "a" / "1.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _rewritten(out: Path, change) -> None:
    """Rewrite a table and its commit record, as a program with an error in it would have."""
    import hashlib

    path, record_path = out / "a" / "1.parquet", out / "_maekit" / "a" / "1.tar.json"
    table = pq.read_table(path)
    pq.write_table(change(table), path)
    record = json.loads(record_path.read_text())
    data = path.read_bytes()
    record["outputs"] = [{"path": "a/1.parquet", "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}]
    record_path.write_text(json.dumps(record))


def _with_embedding(table: pa.Table, value: float) -> pa.Table:
    values = np.array(table["embedding"].to_pylist(), np.float32)
    values[1] = value
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    return table.set_column(3, table.schema.field("embedding"), column)


SABOTAGE = {
    "a flipped bit": (_damage_parquet, r"1\.parquet: its SHA-256 is not that"),
    "a row is missing": (lambda out: _rewritten(out, lambda t: t.slice(0, 3)), "neither row nor error"),
    "a row twice": (lambda out: _rewritten(out, lambda t: pa.concat_tables([t, t.slice(3)])), "should come where"),
    "rows in another order": (lambda out: _rewritten(out, lambda t: t.take([1, 0, 2, 3])), "should come where"),
    "a value that is not finite": (lambda out: _rewritten(out, lambda t: _with_embedding(t, np.nan)), "not finite"),
    "a wrong length": (lambda out: _rewritten(out, lambda t: _with_embedding(t, 0.9)), "has not the length 1"),
    "an error is missing": (
        lambda out: (out / "_maekit" / "errors" / "a" / "1.tar.jsonl").write_text(""),
        "0 errors are listed, 1 in its commit record",
    ),
    "an error under another key": (
        lambda out: (out / "_maekit" / "errors" / "a" / "1.tar.jsonl").write_text('{"key": "z", "index": 2}\n'),
        "stands under another key",
    ),
    "an error of another sample": (
        lambda out: (out / "_maekit" / "errors" / "a" / "1.tar.jsonl").write_text('{"key": "a1-3", "index": 3}\n'),
        "should come where",
    ),
    "a foreign file": (lambda out: (out / "old.parquet").write_bytes(b""), r"old\.parquet: belongs to no committed"),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_verify_sees(trained: Path, shards: Path, tmp_path: Path, name: str) -> None:
    sabotage, said = SABOTAGE[name]
    config = embed_config(trained, tmp_path / "out", shards=(str(shards),), verify=True)
    raise_if_incomplete(embed(config))
    sabotage(tmp_path / "out")
    with raises(MaekitError, match=said):
        raise_if_incomplete(embed(config))


def test_the_record_says_how(trained: Path, shards: Path, tmp_path: Path) -> None:
    result = embed(embed_config(trained, tmp_path / "out", shards=(str(shards),)))
    record = json.loads((tmp_path / "out" / "_maekit" / "a" / "0.tar.json").read_text())
    assert record["providers"] == ["CPUExecutionProvider"]
    assert record["nodes"]["CPUExecutionProvider"] > 20
    assert (record["rows"], record["errors"], record["keys"]) == (6, 1, 7)
    assert record["options"]["batch_size"] == result.batch_size == 8
    assert result.limit_share > 0
    assert set(result.rates) == {"decode", "model", "write"}
    assert all(rate > 0 for rate in result.rates.values())
    assert result.binds in ("decoding", "the model", "writing")
