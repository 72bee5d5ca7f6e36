"""Folders and tars built at random of every oddity: each file is a row, an error with its reason, or unused by kind.

What is expected comes from the list by which each input was built, never from maekit's own listing.
"""

import io
import json
import os
import random
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image
from support.models import embed_config
from support.shards import jpeg

from maekit.embedding.embed import embed

HEIC = struct.pack(">I", 24) + b"ftypheic" + b"\0\0\0\0mif1heic" + bytes(100)
PICTURES = [jpeg(number, (24, 20)) for number in range(4)]


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG with further chunks behind its header, checksums included."""
    out = io.BytesIO()
    Image.open(io.BytesIO(PICTURES[0])).save(out, "PNG")
    data = out.getvalue()
    more = b"".join(struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks)
    return data[:33] + more + data[33:]


BROKEN_METADATA = png((b"pHYs", b"\0\0"), (b"zTXt", b"note\0\0garbage"), (b"eXIf", b"garbage"))


@dataclass
class Expected:
    """What an input is built of: keys with a row, the reason of each other key, and unused files by kind."""

    rows: list[str] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    unused: Counter[str] = field(default_factory=Counter)


# What a sample of a tar is made of: members by extension (None for a link), row or reason, and unused kinds.
Sample = tuple[dict[str, bytes | None], str, tuple[str, ...]]
SAMPLES: list[Sample] = [
    ({"jpg": PICTURES[0]}, "row", ()),
    ({"jpg": PICTURES[1], "json": b"{}", "cls": b"1"}, "row", ()),
    ({"jfif": PICTURES[2]}, "row", ()),
    ({"img": PICTURES[3], "txt": b"a caption"}, "row", ()),
    ({"png": BROKEN_METADATA}, "row", ()),
    ({"jpg": BROKEN_METADATA}, "row", ()),
    ({"jpg": PICTURES[0], "mask.png": png()}, "row", ("mask.png",)),
    ({"seg.png": png(), "rgb.png": png()}, "row", ("seg.png",)),
    ({"jpg": b""}, "empty", ()),
    ({"jpg": b"<html>404</html>"}, "not_an_image", ()),
    ({"jpg": PICTURES[0][:300]}, "undecodable", ()),
    ({"heic": HEIC}, "unsupported_format", ()),
    ({"jpg": HEIC}, "unsupported_format", ()),
    ({"txt": b"a caption"}, "no_image", ()),
    ({"mask.png": png()}, "no_image", ("mask.png",)),
    ({"jpg": None}, "bad_member", ()),
    ({"jpg": None, "json": b"{}"}, "bad_member", ()),
]
NAMES = ("{}", "deep/er/{}", "./{}", "gr\u00fcn {}")


def add(tar: tarfile.TarFile, name: str, data: bytes | None) -> None:
    info = tarfile.TarInfo(name)
    if data is None:
        info.type, info.linkname = tarfile.LNKTYPE, "elsewhere.jpg"
    else:
        info.size = len(data)
    tar.addfile(info, io.BytesIO(data or b""))


def build_tar(path: Path, chance: random.Random, expected: Expected) -> None:
    with tarfile.open(path, "w", format=chance.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))) as tar:
        for number in range(chance.randrange(1, 9)):
            members, verdict, unused = chance.choice(SAMPLES)
            key = chance.choice(NAMES).format(f"{number:03d}")
            if chance.random() < 0.1:  # a name that leads out of the archive
                key, verdict, unused = f"/data/{number}", "bad_member", ()
            for extension, data in members.items():
                add(tar, f"{key}.{extension}", data)
            if verdict == "row":
                expected.rows.append(key)
            else:
                expected.errors[key] = verdict
            expected.unused.update(unused)
            if chance.random() < 0.1:
                add(tar, f"README{number}", b"belongs to nothing")
                expected.unused["outside samples"] += 1


FILES: list[tuple[str, bytes, str]] = [
    *((f".{end}", PICTURES[0], "row") for end in ("jpg", "JPG", "jfif", "pjpeg", "img", "jpg:large", "x.y.jpeg")),
    ("", PICTURES[1], "row"),
    (".png", BROKEN_METADATA, "row"),
    (".jpg", b"", "empty"),
    (".jpg", b"<!DOCTYPE html>", "not_an_image"),
    (".jpg", HEIC, "unsupported_format"),
    (".HEIC", HEIC, "HEIF (HEIC)"),
    (".jxl", b"\xff\x0a" + bytes(40), "JPEG XL"),
    (".txt", b"text", "txt"),
    (".json", b"{}", "json"),
    (".xyz", b"?", "xyz"),
    ("", b"all:\n\ttrue\n", "no extension"),
]
REASONS = ("row", "empty", "not_an_image", "unsupported_format")


def build_folder(path: Path, chance: random.Random, expected: Expected) -> None:
    (path / "deep").mkdir(parents=True)
    (path / "always.jpg").write_bytes(PICTURES[2])
    expected.rows.append("always.jpg")
    for number in range(chance.randrange(1, 12)):
        ending, data, verdict = chance.choice(FILES)
        name = f"{chance.choice(('', 'deep/'))}{number:02d}{ending}"
        (path / name).write_bytes(data)
        if verdict == "row":
            expected.rows.append(name)
        elif verdict in REASONS:
            expected.errors[name] = verdict
        else:
            expected.unused[verdict] += 1


def found_in(out: Path) -> tuple[list[str], dict[str, str]]:
    """Return the keys with a row and the reasons of the others, from the files of an output alone."""
    rows = [key for path in sorted(out.glob("*.parquet")) for key in pq.read_table(path)["key"].to_pylist()]
    lines = [line for path in (out / "_maekit" / "errors").rglob("*.jsonl") for line in path.read_text().split("\n")]
    return rows, {error["key"]: error["reason"] for error in map(json.loads, filter(None, lines))}


def test_every_file_is_a_row_an_error_or_unused(
    trained: Path, tmp_path: Path, rounds: Callable[[int, int], int]
) -> None:
    verdicts: Counter[str] = Counter()
    for number in range(rounds(24, 2000)):
        chance, expected = random.Random(number), Expected()
        is_folder = number % 2 == 0
        source = tmp_path / f"{number}{'' if is_folder else '.tar'}"
        (build_folder if is_folder else build_tar)(source, chance, expected)
        out = tmp_path / f"{number}-out"
        result = embed(embed_config(trained, out, shards=(str(source),), workers=1, verify=True))
        rows, errors = found_in(out)
        said = f"input {number}, built by random.Random({number})"
        assert (sorted(rows), errors) == (sorted(expected.rows), expected.errors), said
        assert result.unused == dict(expected.unused), said
        assert (result.rows, result.errors, result.damaged) == (len(rows), len(errors), []), said
        assert result.verified is not None
        assert result.verified.problems == [], said
        again = embed(embed_config(trained, out, shards=(str(source),), workers=1))
        assert (again.shards, again.rows, again.errors) == (0, len(rows), len(errors)), said
        assert again.unused == dict(expected.unused), said
        verdicts.update(["row"] * len(rows), unused=sum(expected.unused.values()))
        verdicts.update(errors.values())
    print(f"accounting: {dict(verdicts)}, {os.cpu_count()} cores")
    assert set(verdicts) >= {"row", "unused", *(reason for _, reason, _ in SAMPLES)}
