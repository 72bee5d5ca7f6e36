"""What a folder holds, by extension and by the first bytes."""

import struct
from pathlib import Path

import pytest
from support.errors import raises
from support.shards import jpeg, write_shard

from maekit.config.pack import PackConfig
from maekit.embedding.inputs import find_inputs
from maekit.shards.folder import look_into
from maekit.shards.pack import pack
from maekit.shards.spec import find_shards
from maekit.system.errors import InputError
from maekit.system.file_kinds import kind_of

HEIC = struct.pack(">I", 24) + b"ftypheic" + b"\0\0\0\0mif1heic" + bytes(100)


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize(
    ("head", "name", "is_decoded"),
    [
        (jpeg(1), "JPEG", True),
        (b"\x89PNG\r\n\x1a\n", "PNG", True),
        (b"II*\0\x08\0\0\0", "TIFF", True),
        (b"RIFF\0\0\0\0WEBPVP8 ", "WebP", True),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avif", "AVIF", True),
        (HEIC, "HEIF (HEIC)", False),
        (b"\xff\x0a", "JPEG XL", False),
        (bytes(128) + b"DICM", "DICOM", False),
        (b"\xef\xbb\xbf <svg xmlns='http://www.w3.org/2000/svg'/>", "SVG", False),
        (b"<?xml version='1.0'?><svg/>", "SVG", False),
        (b"\n<!DOCTYPE html>", "a web page", False),
        (b"PK\x03\x04", "zip archive", False),
    ],
)
def test_kinds_by_first_bytes(head: bytes, name: str, is_decoded: bool) -> None:
    kind = kind_of(head)
    assert kind is not None
    assert (kind.name, kind.is_decoded) == (name, is_decoded)


def test_every_file_of_a_folder_is_accounted_for(tmp_path: Path) -> None:
    names = ("0.jfif", "1.img", "2.pjpeg", "noext", "a.jpg:large", "sub/b.JPG")
    files = {name: jpeg(number) for number, name in enumerate(names)}
    files |= {"c.HEIC": HEIC, "d.heic": HEIC, "notes.txt": b"x", "e.xyz": b"?", "Makefile": b"all:"}
    folder = fill(tmp_path / "images", files)
    found = look_into(folder)
    assert [path.relative_to(folder).as_posix() for path in found.images] == sorted(names)
    assert found.unused == {"HEIF (HEIC)": 2, "txt": 1, "xyz": 1, "no extension": 1}
    notes: list[str] = []
    (part,) = find_inputs([str(folder)], on_note=notes.append)
    assert (part.paths, part.unused) == (tuple(sorted(names)), found.unused)
    assert notes == [
        "2 files of HEIF (HEIC) are not decoded; convert it to JPEG or PNG first (heif-convert, or ImageMagick)"
    ]
    report = pack(PackConfig(folder, tmp_path / "shards"))
    assert report.samples == 6
    assert report.passed_over == {"HEIF (HEIC)": 2, "no extension": 1, ".txt": 0, ".xyz": 1} | {
        ".txt": report.sidecars.get("txt", 0) == 0
    }
    assert sum(report.passed_over.values()) == 5


def test_a_folder_without_an_image_says_what_it_holds(tmp_path: Path) -> None:
    folder = fill(tmp_path / "images", {f"{n}.heic": HEIC for n in range(3)})
    for call in (lambda: find_shards(str(folder)), lambda: pack(PackConfig(folder, tmp_path / "out"))):
        with raises(InputError, match=r"it holds 3 HEIF \(HEIC\), not decoded: convert it to JPEG or PNG first"):
            call()


@pytest.mark.parametrize("beside", ["x.tar", "x.zip", "deep/x.tgz"])
def test_archives_beside_images_are_refused(tmp_path: Path, beside: str) -> None:
    folder = fill(tmp_path / "images", {"a.jpg": jpeg(1), beside: b"PK\x03\x04"})
    with raises(InputError, match="holds 1 images .such as a.jpg. beside 1 archives"):
        find_inputs([str(folder)])
    with raises(InputError, match="beside 1 archives"):
        pack(PackConfig(folder, tmp_path / "out"))


def test_pictures_of_a_run_among_shards_are_no_input(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.tar", {"a": {"jpg": jpeg(1)}})
    fill(tmp_path, {"run/pictures/step-1.png": b"", "run/checkpoints/step-1/model": b""})
    assert [shard.name for shard in find_shards(str(tmp_path))] == ["x.tar"]
