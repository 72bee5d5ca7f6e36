"""Shards of other writers, packed anew: unsorted, doubled, without an end, with names that no strict reader takes."""

import io
import os
import tarfile
from pathlib import Path

import pytest
from support.errors import raises

from maekit.checking import check_shards
from maekit.config.pack import PackConfig
from maekit.shards.index import build_index
from maekit.shards.pack import PackReport, pack
from maekit.shards.read import open_shards
from maekit.shards.spec import find_shards
from maekit.system.errors import InputError
from maekit.system.progress import Silent


def write_tar(path: Path, members: list[tuple[str, bytes]], **options: object) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT, **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def repacked(source: Path, out: Path, **options: object) -> tuple[PackReport, dict[str, dict[str, bytes]]]:
    report = pack(PackConfig(source, out, **options))
    assert check_shards(find_shards(str(out))).damaged == []
    samples = {}
    for path in report.shards:
        index = build_index(path)
        with open(path, "rb") as file:
            for ordinal in range(index.samples):
                members = index.members(ordinal)
                samples[index.key(ordinal)] = {m.extension: os.pread(file.fileno(), m.size, m.offset) for m in members}
    return report, samples


def test_members_apart_and_doubled(tmp_path: Path) -> None:
    members = [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.json", b"{}"), ("b.jpg", b"2"), ("a.jpg", b"3"), ("README", b"")]
    report, samples = repacked(write_tar(tmp_path / "x.tar", members), tmp_path / "out")
    assert samples == {"a": {"jpg": b"3", "json": b"{}"}, "b": {"jpg": b"2"}}
    assert report.passed_over == {"repeated": 1, "replaced by a later one": 1, "without a sample": 1}


@pytest.mark.parametrize("cut", ["no end", "one block", "concatenated"])
def test_ends_of_archives(tmp_path: Path, cut: str) -> None:
    first = write_tar(tmp_path / "x.tar", [("a.jpg", b"1")]).read_bytes()
    second = write_tar(tmp_path / "x.tar", [("b.jpg", b"2")]).read_bytes()
    data = {"no end": first[:1024], "one block": first[:1024] + bytes(512), "concatenated": first + second}[cut]
    (tmp_path / "x.tar").write_bytes(data)
    _, samples = repacked(tmp_path / "x.tar", tmp_path / "out")
    assert list(samples) == (["a", "b"] if cut == "concatenated" else ["a"])


def test_a_sample_for_each_image_with_the_dots_of_its_name(tmp_path: Path) -> None:
    members = [(f"set/scan.{n:03d}.jpg", b"%d" % n) for n in range(20)]
    members += [("both.jpg", b"j"), ("both.png", b"p"), ("both.json", b"{}"), ("plain.JPG", b"x"), ("alone.txt", b"t")]
    report, samples = repacked(write_tar(tmp_path / "x.tar", members), tmp_path / "out", key_by="name")
    assert report.samples == 23
    assert samples["set/scan.007/image"] == {"jpg": b"7"}
    assert samples["both/image"] == {"jpg": b"j", "json": b"{}"}
    assert samples["both/image1"] == {"png": b"p", "json": b"{}"}
    assert samples["plain"] == {"jpg": b"x"}
    open_shards(find_shards(str(tmp_path / "out"))).refuse_ambiguous()


def test_names_and_links(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
        for name in ("grün.jpg", "/data/a.jpg", "../up.jpg"):
            tar.addfile(tarfile.TarInfo(name))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "a.jpg"
        tar.addfile(link)
    notes: list[str] = []
    progress = Silent()
    progress.note = notes.append  # type: ignore[method-assign]
    report = pack(PackConfig(path, tmp_path / "out"), progress)
    assert list(build_index(report.shards[0]).keys()) == ["gr\\xfcn", "data/a"]
    assert report.passed_over == {"refused": 2}
    assert "leads out of the archive" in notes[1]
    assert "hard link" in notes[2]


def test_labels_and_equal_keys_of_several_shards(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("one", "two"):
        write_tar(tmp_path / "in" / f"{name}.tar", [("0.jpg", name.encode()), ("0.cls", b"1")])
    (tmp_path / "in" / "classes.txt").write_text("cat\ndog\n")
    _, samples = repacked(tmp_path / "in", tmp_path / "out")
    assert samples == {"0": {"cls": b"1", "jpg": b"one"}, "two/0": {"cls": b"1", "jpg": b"two"}}
    assert (tmp_path / "out" / "classes.txt").read_text() == "cat\ndog\n"


def test_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"1" * 600)])
    with raises(InputError, match="is for a folder of images"):
        pack(PackConfig(path, tmp_path / "out", table="t.csv"))
    path.write_bytes(path.read_bytes()[:900])
    with raises(InputError, match="damaged at byte 0: the file is cut off"):
        pack(PackConfig(path, tmp_path / "out"))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"1")
    with raises(InputError, match="--key-by name: is for shards"):
        pack(PackConfig(tmp_path / "images", tmp_path / "out", key_by="name"))
    assert not (tmp_path / "out").exists()
