"""The strict tar scan against damaged and crafted archives."""

import contextlib
import gzip
import io
import resource
import tarfile
import time
from pathlib import Path

import pytest
from support.errors import raises
from support.shards import write_shard

from maekit.shards.index import build_index, read_index
from maekit.system.errors import DamagedShard, ImageError

END = bytes(1024)


def header(name: bytes = b"a.jpg", *, size: bytes | int = 0, kind: bytes = b"0", prefix: bytes = b"") -> bytes:
    """Return a ustar header block with a right checksum over whatever fields."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    block = bytearray(512)
    block[:100] = name.ljust(100, b"\0")
    block[100:136] = b"0000644\0" + b"0000000\0" * 2 + field.rjust(12, b"\0")[:12]
    block[136:148] = b"00000000000\0"
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[345:500] = prefix.ljust(155, b"\0")
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def base256(value: int) -> bytes:
    """A GNU number: the high bit of the first byte is set, and the rest is two's complement."""
    return (value % (1 << 95) | 1 << 95).to_bytes(12, "big")


def extended(*records: bytes, kind: bytes = b"x") -> bytes:
    """Return a PAX header of `key=value` records."""
    body = b""
    for record in records:
        length = len(record) + 3
        while len(b"%d %b\n" % (length, record)) != length:
            length += 1
        body += b"%d %b\n" % (length, record)
    return header(b"pax", size=len(body), kind=kind) + padded(body)


def test_damage_is_named_with_its_offset(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "s.tar", {"a": {"jpg": b"x" * 600}, "b": {"jpg": b"y" * 600}})
    second = 512 + 1024
    whole = path.read_bytes()

    def damage(data: bytes) -> DamagedShard:
        path.write_bytes(data)
        with pytest.raises(DamagedShard) as caught:
            build_index(path)
        return caught.value

    assert damage(whole[: second + 700]).offset == second
    assert "cut off" in damage(whole[: second + 700]).reason
    assert "empty" in damage(b"").reason
    assert "end-of-archive" in damage(whole[: 2 * second]).reason
    assert damage(whole + b"x").offset == len(whole)
    assert "gzip" in damage(gzip.compress(whole)).reason
    assert "no tar header" in damage(b"text" + bytes(2000)).reason


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.FIFOTYPE, "fifo"),
        (tarfile.CHRTYPE, "character device"),
    ],
)
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes, said: str) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
        data = b"whole"
        info = tarfile.TarInfo("b.jpg")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    index = build_index(path)
    assert said in index.problems[0]
    assert (list(index.keys()), list(index.problems)) == (["a", "b"], [0])
    with pytest.raises(ImageError) as caught:
        index.image(0)
    assert caught.value.reason == "bad_member"
    assert index.image(1).size == 5


LIMIT = 1 << 20
FILE = header(size=3) + padded(b"abc")

CRAFTED = {
    "a header that leads back to itself": (header(size=base256(-512)) + END, "negative"),
    "a header that leads back to the start": (FILE + header(b"b.jpg", size=base256(-1536)) + END, "negative"),
    "an extended header that leads back": (header(size=base256(-512), kind=b"x") + FILE + END, "negative"),
    "a PAX size that is negative": (extended(b"size=-512") + FILE + END, "not a number"),
    "a PAX size of zero digits": (extended(b"size=") + FILE + END, "not a number"),
    "a PAX size of a million digits": (extended(b"size=" + b"9" * 900_000) + FILE + END, "not a number"),
    "a PAX size beyond the file": (extended(b"size=9223372036854775807") + FILE + END, "cut off"),
    "a size beyond the file": (header(size=b"77777777777\0") + END, "cut off"),
    "a size of 2^94": (header(size=base256(1 << 94)) + END, "impossibly large"),
    "a size that is no number": (header(size=b"12x45678901\0") + END, "is not a number"),
    "a size with a minus": (header(size=b"-0000000512\0") + END, "is not a number"),
    "an extended header of 2 MiB": (header(kind=b"x", size=2 * LIMIT) + bytes(2 * LIMIT) + FILE + END, "at most"),
    "an extended header of 8 GiB": (header(kind=b"x", size=b"77777777777\0") + FILE + END, "at most"),
    "a name of 8 GiB": (header(kind=b"L", size=b"77777777777\0") + FILE + END, "at most"),
    "a PAX record longer than its header": (header(kind=b"x", size=10) + padded(b"99 path=a\n") + FILE + END, "PAX"),
    "a PAX record of length zero": (header(kind=b"x", size=9) + padded(b"0 path=a\n") + FILE + END, "PAX"),
    "a PAX record without a length": (header(kind=b"x", size=7) + padded(b"path=a\n") + FILE + END, "PAX"),
    "data in the padding of an extended header": (
        header(kind=b"x", size=9) + padded(b"9 path=a\nx") + FILE + END,
        "in its padding",
    ),
    "an unknown keyword": (extended(b"pauh=a.jpg") + FILE + END, "unknown keyword"),
    "two names that differ by one bit": (
        extended(b"path=" + b"n" * 120) + header(b"n" * 40 + b"o" + b"n" * 59) + END,
        "by one",
    ),
    "a global header that names all": (extended(b"path=z.jpg", kind=b"g") + FILE + END, "global header"),
    "a global header that sizes all": (extended(b"size=0", kind=b"g") + FILE + END, "global header"),
    "a PAX sparse file": (extended(b"GNU.sparse.major=1", b"GNU.sparse.minor=0") + FILE + END, "sparse"),
    "a GNU sparse file": (header(size=3, kind=b"S") + padded(b"abc") + END, "sparse"),
    "a hard link with data": (header(kind=b"1", size=3) + padded(b"abc") + END, "hard link"),
    "a member of no known type": (header(kind=b"Z") + END, "unknown type"),
    "no name": (header(b"") + END, "no member name"),
    "a PAX name with a zero byte": (extended(b"path=a\0.jpg") + FILE + END, "no member name"),
    "a directory with data": (header(b"folder/", size=512, kind=b"5") + bytes(512) + END, "directory"),
    "an extended header and nothing behind it": (extended(b"path=x.jpg") + END, "before its member"),
    "one block of zeros for an end": (FILE + bytes(512), "end-of-archive"),
    "a second archive behind the first": (FILE + END + FILE + END, "behind the end"),
    "a block of zeros between members": (FILE + bytes(512) + FILE + END, "behind the end"),
    "an end within a block": (FILE + END + bytes(100), "whole number"),
    "gzip under another name": (gzip.compress(FILE + END), "gzip"),
    "a web page": (b"<html>404 Not Found</html>".ljust(2048), "a web page"),
    "a short web page": (b"<!DOCTYPE html>log in", "a web page"),
    "text": (b"version https://git-lfs.github.com/spec/v1\n".ljust(2048), "no tar header"),
}


NAMES = {
    "a name that climbs out": (header(b"../../etc/passwd.jpg"), "leads out"),
    "a name that climbs out later": (header(b"a/../../b.jpg"), "leads out"),
    "an absolute name": (header(b"/etc/passwd.jpg"), "leads out"),
    "a prefix that climbs out": (header(b"b.jpg", prefix=b".."), "leads out"),
    "a PAX name that climbs out": (extended(b"path=../x.jpg") + FILE, "leads out"),
    "a GNU name that climbs out": (header(kind=b"L", size=9) + padded(b"../x.jpg\0") + FILE, "leads out"),
    "a name that is not UTF-8": (header(b"gr\xfcn.jpg"), "not UTF-8"),
    "a PAX name that is not UTF-8": (extended(b"path=gr\xfcn.jpg") + FILE, "not UTF-8"),
}


@pytest.mark.parametrize("what", NAMES)
def test_a_name_that_is_refused_costs_its_sample_alone(tmp_path: Path, what: str) -> None:
    data, said = NAMES[what]
    path = tmp_path / "x.tar"
    path.write_bytes(data + header(b"sound.jpg", size=3) + padded(b"abc") + END)
    index = build_index(path)
    assert said in index.problems[0]
    assert (index.samples, index.key(1), index.image(1).size) == (2, "sound", 3)
    file = tmp_path / "x.tar.index"
    file.write_bytes(index.to_bytes())
    kept = read_index(path, file)
    assert kept is not None
    assert (kept.problems, kept.digest) == (index.problems, index.digest)


@pytest.mark.parametrize(
    "write", [lambda s: (b"%o " % s).rjust(7) + b"\0", lambda s: b"%6o\0 " % s], ids=["7-Zip", "SunOS"]
)
def test_padded_checksums_of_a_whole_archive(tmp_path: Path, write) -> None:
    path = tmp_path / "x.tar"
    whole = bytearray(header(b"a.jpg", size=3) + padded(b"abc") + header(b"b.jpg", size=3) + padded(b"def") + END)
    for start in (0, 1024):
        block = whole[start : start + 512]
        block[148:156] = b" " * 8
        whole[start + 148 : start + 156] = write(sum(block))
    path.write_bytes(whole)
    assert list(build_index(path).keys()) == ["a", "b"]
    canonical = header(b"a.jpg", size=3) + padded(b"abc")
    path.write_bytes(canonical + whole[1024:])
    with raises(DamagedShard, match="not a checksum"):  # one alone may be a flipped bit
        build_index(path)


@pytest.mark.parametrize("what", CRAFTED)
def test_crafted_archives_are_refused(tmp_path: Path, what: str) -> None:
    """Each with its reason, at once, and in little memory."""
    data, said = CRAFTED[what]
    path = tmp_path / "crafted.tar"
    path.write_bytes(data)
    before, memory = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with raises(DamagedShard, match=said) as caught:
        build_index(path)
    assert time.perf_counter() - before < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 50_000  # kilobytes
    assert 0 <= caught.value.offset <= len(data)


def test_many_extended_headers_in_a_row_are_only_read_through(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(extended(b"comment=" + b"c" * 900_000) * 20 + FILE + END)
    before = time.perf_counter()
    assert list(build_index(path).keys()) == ["a"]
    assert time.perf_counter() - before < 1


def test_what_is_unusual_and_sound_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    sound = {
        "./a": header(b"./a.jpg", size=3) + padded(b"abc"),
        "b..c/d": header(b"b..c/d.jpg", size=3) + padded(b"abc"),
        "large numbers": header(b"large numbers.jpg", size=base256(3)) + padded(b"abc"),
        "pax size": extended(b"size=3", b"mtime=1.5") + header(b"pax size.jpg", size=0) + padded(b"abc"),
        "old": header(b"old.jpg", size=3, kind=b"\0") + padded(b"abc"),
        "contiguous": header(b"contiguous.jpg", size=3, kind=b"7") + padded(b"abc"),
        "after a global comment": extended(b"comment=x", kind=b"g")
        + header(b"after a global comment.jpg", size=3)
        + padded(b"abc"),
    }
    path.write_bytes(header(b"folder/", kind=b"5") + b"".join(sound.values()) + END)
    index = build_index(path, crc=True)
    assert list(index.keys()) == list(sound)
    assert all(index.image(i).size == 3 for i in range(index.samples))


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_bit_flips_in_extended_headers(tmp_path: Path, tar_format: int) -> None:
    """They have no checksum; what can be held against the header behind them is: nothing changes in silence there."""
    names = ["d" * 40 + "/" + "n" * 55 + "x" * 20 + ".jpg", "grün/bär.jpg"]
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    whole = path.read_bytes()
    keys = list(build_index(path).keys())
    with tarfile.open(path) as tar:
        spans = [(member.offset, member.offset_data) for member in tar]
    changed = total = 0
    for start, stop in spans:
        for bit in range(8 * start, 8 * stop, 11):
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            total += 1
            with contextlib.suppress(DamagedShard):
                changed += list(build_index(path).keys()) != keys
    # What is left: characters behind the hundredth, and those that are not ASCII.
    assert changed / total < 0.02


def test_a_size_of_nine_gigabytes_is_read(tmp_path: Path) -> None:
    """Sizes of 8 GiB and more do not fit into octal digits; the file here is a hole on the disk."""
    path, size = tmp_path / "x.tar", 9 << 30
    with open(path, "wb") as file:
        file.write(header(size=base256(size)))
        file.seek(512 + size)
        file.write(header(b"b.jpg", size=3) + padded(b"abc") + END)
    index = build_index(path)
    assert [index.image(i).size for i in range(2)] == [size, 3]


def test_only_an_archive_that_ends_with_a_member_is_said_to_be_repairable(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    for data, is_repairable in ((FILE, True), (FILE[:-100], False), (FILE + FILE[:300], False)):
        path.write_bytes(data)
        with raises(DamagedShard, match="no end-of-archive marker") as caught:
            build_index(path)
        assert ("maekit pack" in caught.value.reason) is is_repairable
