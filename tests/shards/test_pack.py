"""Packing folders of images, and what happens when it is killed."""

import csv
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from support.errors import raises
from support.shards import jpeg

from maekit.checking import check_shards
from maekit.cli.options import with_flags
from maekit.config.pack import PackConfig
from maekit.shards.index import index_path, read_index
from maekit.shards.pack import pack
from maekit.shards.spec import find_shards
from maekit.system.errors import InputError, MaekitError, Stopped
from maekit.system.progress import Silent

pytestmark = pytest.mark.whole


def read(folder: Path) -> list[dict[str, bytes]]:
    """Return all samples as webdataset reads them."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    return [{k: v for k, v in sample.items() if k not in ("__url__", "__local_path__")} for sample in dataset]


def fill(folder: Path, count: int) -> Path:
    for number in range(count):
        path = folder / ("cat" if number % 2 else "dog") / f"{number:03d}.v1.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".index"}


def count_shards(folder: Path) -> int:
    try:
        return len(list(folder.glob("*.tar")))
    except FileNotFoundError:  # renamed while it was looked at
        return 0


@pytest.mark.parametrize("workers", [1, 3])
def test_round_trip(tmp_path: Path, workers: int) -> None:
    images = fill(tmp_path / "images", 7)
    (images / "cat" / "001.v1.json").write_text('{"a": 1}')
    (images / "cat" / "001.v1.txt").write_text("a cat")
    (images / "cat" / "notes.txt").write_text("of no image")
    (images / "cat" / "README").write_text("no image")
    options = dict(samples_per_shard=3, workers=workers)
    report = pack(PackConfig(images, tmp_path / "out", **options))
    assert (report.samples, len(report.shards), report.classes) == (7, 3, ["cat", "dog"])
    assert report.passed_over == {".txt": 1, "no extension": 1}
    assert report.sidecars == {"json": 1, "txt": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "out"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *("00000.tar", "00000.tar.index", "00001.tar", "00001.tar.index", "00002.tar", "00002.tar.index"),
        "classes.txt",
    ]
    assert (tmp_path / "out" / "classes.txt").read_text() == "cat\ndog\n"
    expected = sorted((f"{'cat' if n % 2 else 'dog'}/{n:03d}_v1", n) for n in range(7))
    samples = read(tmp_path / "out")
    assert [sample["__key__"] for sample in samples] == [key for key, _ in expected]
    for sample, (key, number) in zip(samples, expected, strict=True):
        assert (sample["jpg"], sample["cls"]) == (jpeg(number), b"0" if key.startswith("cat") else b"1")
    assert (samples[0]["json"], samples[0]["txt"]) == (b'{"a": 1}', b"a cat")
    checked = check_shards(find_shards(str(tmp_path / "out")))
    assert (checked.samples, len(checked.damaged), [s.verified for s in checked.shards]) == (7, 0, [True] * 3)
    pack(PackConfig(images, tmp_path / "again", samples_per_shard=3, workers=4 - workers))
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_shards_of_limited_size(tmp_path: Path) -> None:
    images = fill(tmp_path / "images", 40)
    (images / "cat" / "001.v1.jpg").write_bytes(jpeg(1) + bytes(90_000))  # larger than a shard may be
    (images / "dog" / ("ü" * 60 + ".jpg")).write_bytes(jpeg(0))  # an extended header
    report = pack(PackConfig(images, tmp_path / "out", shard_mb=0.04))
    sizes = [path.stat().st_size for path in report.shards]
    assert report.samples == 41
    assert len([size for size in sizes if size > 40_000]) == 1
    assert sum(sizes) / len(sizes) > 25_000  # the limit is used


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_a_table_names_paths_and_labels(tmp_path: Path, kind: str) -> None:
    images = fill(tmp_path / "images", 6)
    table = images / f"table.{kind}"
    rows = [("dog/004.v1.jpg", 7), (str(images / "cat" / "001.v1.jpg"), 2), ("./dog/000.v1.jpg", None)]
    if kind == "parquet":
        pq.write_table(pa.table({"path": [r[0] for r in rows], "label": [r[1] for r in rows]}), table)
    else:
        with open(table, "w", newline="") as file:
            writer = csv.writer(file, delimiter="," if kind == "csv" else "\t")
            writer.writerows([("path", "label"), *rows])
    report = pack(PackConfig(images, tmp_path / "out", table=table))
    assert report.passed_over == {"images not in the table": 3}
    assert [(s["__key__"], s.get("cls")) for s in read(tmp_path / "out")] == [
        ("dog/004_v1", b"7"),
        ("cat/001_v1", b"2"),
        ("dog/000_v1", None),
    ]


def test_a_table_with_class_names(tmp_path: Path) -> None:
    images = fill(tmp_path / "images", 3)
    table = tmp_path / "t.csv"
    table.write_text("picture,kind\ndog/000.v1.jpg,wolf\ncat/001.v1.jpg,lynx\n")
    report = pack(PackConfig(images, tmp_path / "out", table=table, path_column="picture", label_column="kind"))
    assert report.classes == ["lynx", "wolf"]
    assert [s["cls"] for s in read(tmp_path / "out")] == [b"1", b"0"]


def test_what_is_told_of_labels(tmp_path: Path) -> None:
    images = fill(tmp_path / "images", 4)
    notes: list[str] = []

    class Notes(Silent):
        def note(self, text: str) -> None:
            notes.append(with_flags(text))

    assert pack(PackConfig(images, tmp_path / "out"), Notes()).class_counts == {"cat": 2, "dog": 2}
    (images / "stray.jpg").touch()
    (images / "cat" / "001.v1.cls").write_text("9")
    report = pack(PackConfig(images, tmp_path / "out2"), Notes())
    assert (report.classes, report.empty, report.unlabelled, report.sidecars) == ([], 1, 4, {"cls": 1})
    assert any("no classes: stray.jpg lies in no folder (1 of 5 images)" in note for note in notes)
    assert [s.get("cls") for s in read(tmp_path / "out2")] == [b"9", None, None, None, None]


def test_labels_stay_as_they_are_written(tmp_path: Path) -> None:
    images = fill(tmp_path / "images", 4)
    table = tmp_path / "t.csv"
    table.write_text("path,label\ndog/000.v1.jpg,01\ncat/001.v1.jpg,1\ndog/002.v1.jpg,NA\ncat/003.v1.jpg,\n")
    assert pack(PackConfig(images, tmp_path / "out", table=table)).classes == ["01", "1", "NA"]
    assert [s.get("cls") for s in read(tmp_path / "out")] == [b"0", b"1", b"2", None]
    pq.write_table(pa.table({"path": ["cat/001.v1.jpg"], "label": [1.5]}), tmp_path / "t.parquet")
    with raises(InputError, match="neither a whole number nor text"):
        pack(PackConfig(images, tmp_path / "out2", table=tmp_path / "t.parquet"))
    table.write_text("path,label\ndog/000.v1.jpg,4.0\ncat/001.v1.jpg,\n")
    report = pack(PackConfig(images, tmp_path / "out4", table=table))
    assert (report.unlabelled, read(tmp_path / "out4")[0]["cls"]) == (1, b"4")
    table.write_bytes("path,größe\n".encode("latin-1"))
    with raises(InputError, match="cannot read the table"):
        pack(PackConfig(images, tmp_path / "out3", table=table))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("where,label\ncat/001.v1.jpg,1\n", "no column of paths .*there are where, label.*--path-column"),
        ("path,file\na,b\n", "may both be the column of paths"),
        ("path,label,cls\na,1,2\n", "may both be the column of labels"),
        ("path\nnowhere.jpg\nb\nc\nd\n", "row 1: there is no file 'nowhere.jpg'.*; and 1 more"),
        ("path\n../images/../../x.jpg\n", "there is no file"),
        ("path\ncat/001.v1.jpg\n./cat/001.v1.jpg\n", "row 2.*comes twice"),
        ('path,label\ncat/001.v1.jpg,"a\nb"\n', "more than one line"),
        ("path,label,label\ncat/001.v1.jpg,1,2\n", "label and label may both be"),
        ("path,label\ncat/001.v1.jpg,-1\n", "is negative"),
        ("path\ntable.csv\n", "no image extension"),
        ("path\n", "names no image"),
        ("", "cannot read the table"),
    ],
)
def test_tables_that_do_not_fit(tmp_path: Path, text: str, said: str) -> None:
    images = fill(tmp_path / "images", 3)
    (images / "table.csv").write_text(text)
    with raises(InputError, match=said):
        pack(PackConfig(images, tmp_path / "out", table=images / "table.csv"))
    assert not (tmp_path / "out").exists()


def test_refused(tmp_path: Path) -> None:
    with raises(InputError, match="no such file or directory"):
        pack(PackConfig(tmp_path / "missing", tmp_path / "out"))
    (tmp_path / "images").mkdir()
    with raises(InputError, match="no image file"):
        pack(PackConfig(tmp_path / "images", tmp_path / "out"))
    for name in ("a.b.jpg", "a_b.png", "c.d.png", "c_d.png"):
        (tmp_path / "images" / name).write_bytes(jpeg(0))
    with raises(InputError, match=r"both get the key 'a_b'.*both get the key 'c_d'"):
        pack(PackConfig(tmp_path / "images", tmp_path / "out"))
    for name in ("a_b.png", "c_d.png"):
        (tmp_path / "images" / name).unlink()
    pack(PackConfig(tmp_path / "images", tmp_path / "out"))
    with raises(InputError, match="already holds"):
        pack(PackConfig(tmp_path / "images", tmp_path / "out"))
    (tmp_path / "images" / "__x__").mkdir()
    (tmp_path / "images" / "__x__" / "y.jpg").write_bytes(jpeg(0))
    with raises(InputError, match="aside as its own"):
        pack(PackConfig(tmp_path / "images", tmp_path / "out2"))
    for options, said in (
        ({"samples_per_shard": 0}, "`samples_per_shard` = 0: must be at least 1"),
        ({"shard_mb": 0}, "`shard_mb` = 0: must be greater than 0"),
        ({"workers": 0}, "`workers` = 0: must be at least 1"),
        ({"path_column": "x"}, "`table`"),
    ):
        with raises(InputError, match=said):
            pack(PackConfig(tmp_path / "images", tmp_path / "out3", **options))


def test_an_image_that_goes_away(tmp_path: Path, monkeypatch) -> None:
    import maekit.shards.pack as module

    images = fill(tmp_path / "images", 3)
    original = module._read

    def lose(source):
        (images / "dog" / "002.v1.jpg").unlink(missing_ok=True)
        return original(source)

    monkeypatch.setattr(module, "_read", lose)
    with raises(MaekitError, match=r"cannot read .*002\.v1\.jpg"):
        pack(PackConfig(images, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_stopped_by_a_signal_it_goes_on(tmp_path: Path) -> None:
    images = fill(tmp_path / "images", 9)

    class Kill(Silent):
        def advance(self, done: int) -> None:
            if done == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    options = dict(samples_per_shard=2, workers=1)
    with pytest.raises(Stopped):
        pack(PackConfig(images, tmp_path / "out", **options), Kill())
    assert not (tmp_path / "out").exists()
    report = pack(PackConfig(images, tmp_path / "out", **options))
    assert (report.resumed, report.samples) == (2, 9)
    pack(PackConfig(images, tmp_path / "whole", **options))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_killed_again_and_again_it_ends_with_the_same_bytes(tmp_path: Path, rounds) -> None:
    """SIGKILL at random moments; every start takes up what is finished, and nothing unfinished is ever seen."""
    images = fill(tmp_path / "images", 60)
    options = dict(samples_per_shard=2, workers=2)
    pack(PackConfig(images, tmp_path / "whole", **options))
    aside, resumed, unfinished = tmp_path / ".out.packing" / "shards", 0, 0
    for number in range(rounds(5, 300)):
        process = multiprocessing.get_context("fork").Process(
            target=pack, args=(PackConfig(images, tmp_path / "out", **options),)
        )
        process.start()
        before = count_shards(aside)
        resumed += before > 0
        wanted = before + 1 + number % 9
        while process.is_alive() and not (tmp_path / "out").exists() and count_shards(aside) < wanted:
            time.sleep(0.0005)
        process.kill()
        process.join()
        unfinished += not (tmp_path / "out").exists()
        if (tmp_path / "out").exists():
            assert contents(tmp_path / "out") == contents(tmp_path / "whole")
            shutil.rmtree(tmp_path / "out")
    pack(PackConfig(images, tmp_path / "out", **options))
    print(f"pack: killed {unfinished} times before its end, {resumed} starts took up finished shards")
    assert resumed > 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not aside.parent.exists()
    for shard in (tmp_path / "out").glob("*.tar"):
        assert read_index(shard, index_path(shard)).has_crc


def test_a_damaged_left_over_is_written_again(tmp_path: Path) -> None:
    images = fill(tmp_path / "images", 6)

    class Fail(Silent):
        def advance(self, done: int) -> None:
            if done == 6:
                raise KeyboardInterrupt

    options = dict(samples_per_shard=2, workers=1)
    with pytest.raises(KeyboardInterrupt):
        pack(PackConfig(images, tmp_path / "out", **options), Fail())
    aside = tmp_path / ".out.packing" / "shards"
    data = bytearray((aside / "00000.tar").read_bytes())
    data[1600] ^= 1  # within an image
    (aside / "00000.tar").write_bytes(data)
    (aside / "00001.tar").write_bytes((aside / "00001.tar").read_bytes()[:800])
    pack(PackConfig(images, tmp_path / "out", **options))
    pack(PackConfig(images, tmp_path / "whole", **options))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_class_names_belong_to_the_plan(tmp_path: Path, monkeypatch) -> None:
    import maekit.shards.pack as module

    images = fill(tmp_path / "images", 2)
    table = tmp_path / "t.csv"
    table.write_text("path,label\ndog/000.v1.jpg,dog\ncat/001.v1.jpg,cat\n")

    def fail(aside: Path, out: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_publish", fail)
        with pytest.raises(KeyboardInterrupt):
            pack(PackConfig(images, tmp_path / "out", table=table))
    table.write_text("path,label\ndog/000.v1.jpg,1\ncat/001.v1.jpg,0\n")
    pack(PackConfig(images, tmp_path / "out", table=table))
    assert sorted(contents(tmp_path / "out")) == ["00000.tar"]


def test_where_the_folder_may_lie(tmp_path: Path, monkeypatch) -> None:
    images = fill(tmp_path / "images", 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    report = pack(PackConfig(images, tmp_path / "link"))
    assert report.shards == [tmp_path / "empty" / "00000.tar"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with raises(InputError, match="name a new folder in it"):
        pack(PackConfig(images, Path(".")))
    assert pack(PackConfig(images, Path("new"))).shards[0].is_file()


def test_another_plan_starts_anew(tmp_path: Path) -> None:
    images = fill(tmp_path / "images", 6)

    class Fail(Silent):
        def advance(self, done: int) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(PackConfig(images, tmp_path / "out", samples_per_shard=2, workers=1), Fail())
    (images / "cat" / "001.v1.jpg").write_bytes(jpeg(50))
    report = pack(PackConfig(images, tmp_path / "out", samples_per_shard=2, workers=1))
    assert report.resumed == 0
    assert read(tmp_path / "out")[0]["jpg"] == jpeg(50)
