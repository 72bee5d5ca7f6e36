"""Random damage to generated tars: none of it is accepted, and none takes long."""

import io
import random
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from maekit.checking import check_shards
from maekit.shards.index import ShardIndex, build_index, parse_index
from maekit.shards.spec import find_shards
from maekit.system.errors import DamagedShard

FORMATS = (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)


def generate(path: Path, rng: random.Random) -> bytes:
    """Write a tar of random format, names and members; return its bytes."""
    tar_format = rng.choice(FORMATS)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for number in range(rng.randrange(1, 12)):
            folder = rng.choice(["", "folder/", "d" * 60 + "/", "grün/"])
            # Long names take extended headers, which USTAR has not.
            stem = f"{number:03d}" + "n" * (0 if tar_format == tarfile.USTAR_FORMAT else rng.choice([0, 0, 120]))
            for extension in rng.sample(["jpg", "cls", "json", "seg.png"], rng.randrange(1, 4)):
                info = tarfile.TarInfo(f"{folder}{stem}.{extension}")
                info.size = rng.randrange(3000)
                tar.addfile(info, io.BytesIO(rng.randbytes(info.size)))
    return path.read_bytes()


def members_of(index: ShardIndex) -> list[tuple[int, int]]:
    """Return (offset, size) of each member."""
    return [(m.offset, m.size) for i in range(index.samples) for m in index.members(i)]


def timed(work: Callable[[], object]) -> tuple[object, float]:
    before = time.perf_counter()
    try:
        return work(), time.perf_counter() - before
    except DamagedShard as damage:
        return damage, time.perf_counter() - before


def report(what: str, count: int, accepted: int, slowest: float) -> None:
    print(f"{what}: {count}, accepted {accepted}, slowest {slowest * 1000:.1f} ms")


def test_truncations(tmp_path: Path, rounds) -> None:
    """A tar cut before its end marker is whole is refused, wherever the cut is."""
    rng, slowest, count = random.Random(1), 0.0, rounds(200, 10_000)
    path = tmp_path / "x.tar"
    for number in range(count):
        if number % 20 == 0:
            whole = generate(tmp_path / "whole.tar", rng)
            offset, size = members_of(build_index(tmp_path / "whole.tar"))[-1]
            end = offset + -(-size // 512) * 512 + 1024
        # Behind the marker writers pad with zeros: there a cut at a whole block loses nothing, any other is seen.
        in_padding = end < len(whole) and rng.random() < 0.1
        cut = rng.randrange(end, len(whole)) // 512 * 512 + 1 if in_padding else rng.randrange(end)
        path.write_bytes(whole[:cut])
        found, seconds = timed(lambda: build_index(path))
        assert isinstance(found, DamagedShard), f"cut at {cut} of {len(whole)}"
        slowest = max(slowest, seconds)
    report("truncations", count, 0, slowest)
    assert slowest < 1


def test_header_bit_flips(tmp_path: Path, rounds) -> None:
    """One flipped bit in any header block: refused, or no key and no member is another than before.

    A header's checksum covers all of it, so nothing is ever accepted; the body of an extended header has no checksum.
    """
    rng, slowest, count = random.Random(2), 0.0, rounds(200, 10_000)
    path = tmp_path / "x.tar"
    for number in range(count):
        if number % 20 == 0:
            whole = generate(tmp_path / "whole.tar", rng)
            with tarfile.open(tmp_path / "whole.tar") as tar:
                headers = [block for m in tar for block in range(m.offset, m.offset_data, 512)]
                # Of the blocks between a member's first header and its data, those that are headers themselves.
                headers = [h for h in headers if whole[h + 257 : h + 262] == b"ustar"]
        flipped = bytearray(whole)
        flipped[rng.choice(headers) + rng.randrange(512)] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        found, seconds = timed(lambda: build_index(path))
        assert isinstance(found, DamagedShard)
        slowest = max(slowest, seconds)
    report("header bit flips", count, 0, slowest)
    assert slowest < 1


def test_payload_bit_flips(tmp_path: Path, rounds) -> None:
    """One flipped bit in any member: found by `check` through the CRC-32 in the index beside the shard."""
    rng, slowest, count = random.Random(3), 0.0, rounds(200, 10_000)
    path = tmp_path / "x.tar"
    for number in range(count):
        if number % 20 == 0:
            whole = generate(path, rng)
            (tmp_path / "x.tar.index").unlink(missing_ok=True)
            report_ = check_shards(find_shards(str(path)), write_indexes=True, crc=True)
            spans = [span for span in members_of(build_index(path)) if span[1]]
            assert not report_.damaged
            if not spans:
                continue
        offset, size = rng.choice(spans)
        flipped = bytearray(whole)
        flipped[offset + rng.randrange(size)] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        checked, seconds = timed(lambda: check_shards(find_shards(str(path))))
        (damaged,) = checked.damaged
        assert damaged.damage.offset == offset
        slowest = max(slowest, seconds)
        path.write_bytes(whole)
    report("payload bit flips", count, 0, slowest)
    assert slowest < 1


def test_noise(tmp_path: Path, rounds) -> None:
    """Many random bytes anywhere: the scan ends, with an index or a reason."""
    rng, slowest, count, refused = random.Random(4), 0.0, rounds(200, 10_000), 0
    path = tmp_path / "x.tar"
    for number in range(count):
        if number % 20 == 0:
            whole = generate(tmp_path / "whole.tar", rng)
        noisy = bytearray(whole)
        for _ in range(rng.randrange(1, 40)):
            at = rng.randrange(len(noisy))
            noisy[at : at + rng.randrange(1, 9)] = rng.randbytes(rng.randrange(0, 9))
        path.write_bytes(noisy)
        found, seconds = timed(lambda: build_index(path))
        refused += isinstance(found, DamagedShard)
        slowest = max(slowest, seconds)
    report("noise", count, count - refused, slowest)
    assert slowest < 1


def test_index_files(tmp_path: Path, rounds) -> None:
    """A damaged index file is not used; one with a right checksum over wrong numbers raises nothing but that."""
    rng, count = random.Random(5), rounds(300, 10_000)
    path = tmp_path / "x.tar"
    generate(path, rng)
    raw = build_index(path, crc=True).to_bytes()
    for number in range(count):
        damaged = bytearray(raw)
        for _ in range(rng.randrange(1, 6)):
            damaged[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        if number % 2 and damaged[:8] == raw[:8]:
            damaged[12:16] = zlib.crc32(damaged[16:]).to_bytes(4, "little")
        index = parse_index(path, np.frombuffer(bytes(damaged), np.uint8))
        if bytes(damaged) != raw and number % 2 == 0:
            assert index is None
        elif index is not None:
            try:
                list(index.keys())
                members_of(index)
            except (UnicodeDecodeError, IndexError) as error:
                pytest.fail(f"{error!r}")
