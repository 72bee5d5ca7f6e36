"""Mutated images and decompression bombs: each is decoded or given a reason, in little time and memory."""

import io
import os
import random
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, features
from support.shards import jpeg

from maekit.images import decode
from maekit.shards.read import open_shards
from maekit.shards.spec import find_shards
from maekit.system.errors import ImageError

SIZE = (61, 47)


def encode(picture: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def sources() -> list[bytes]:
    picture = Image.open(io.BytesIO(jpeg(3, SIZE)))
    exif = Image.Exif()
    exif[0x0112] = 6
    found = [
        jpeg(1, SIZE),
        encode(picture, "JPEG", progressive=True, exif=exif),
        encode(picture.convert("CMYK"), "JPEG"),
        encode(picture, "PNG", exif=exif),
        encode(picture.quantize(16), "PNG"),
        encode(picture.convert("RGBA"), "PNG"),
        encode(Image.fromarray(np.arange(2000, dtype=np.uint16).reshape(40, 50)), "PNG"),
        encode(picture, "WEBP", exif=exif),
        encode(picture, "WEBP", lossless=True),
        encode(picture, "TIFF"),
        encode(picture, "TIFF", compression="tiff_lzw", exif=exif),
        encode(picture, "TIFF", compression="tiff_deflate"),
        encode(picture, "BMP"),
        encode(picture.quantize(16), "GIF", save_all=True, append_images=[picture.quantize(4)]),
        encode(picture, "PPM"),
    ]
    if features.check("avif"):
        found.append(encode(picture, "AVIF"))
    if shards := os.environ.get("MAEKIT_CAMPAIGN_SHARDS"):  # real images beside the generated ones
        opened = open_shards(find_shards(shards))
        reader = opened.reader()
        for number in range(0, opened.samples, max(1, opened.samples // 60)):
            shard, ordinal = opened.locate(number)
            found.append(reader.read_image(opened.index(shard), ordinal))
    return found


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Damage a file as disks, networks and attackers do: bits, bytes, cuts, repeats, and numbers at the limit."""
    mutated = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        kind, at = rng.randrange(6), rng.randrange(max(1, len(mutated)))
        if rng.random() < 0.2:
            at = min(at, rng.randrange(200))  # headers are where it hurts
        if kind == 0 and mutated:
            mutated[min(at, len(mutated) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            mutated[at : at + 1] = rng.randbytes(1)
        elif kind == 2:
            del mutated[at : at + rng.randrange(1, 50)]
        elif kind == 3:
            mutated[at:at] = mutated[at : at + rng.randrange(1, 50)]
        elif kind == 4:
            limit = rng.choice([0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF])
            mutated[at : at + 4] = limit.to_bytes(4, rng.choice(["big", "little"]))
        else:
            del mutated[rng.randrange(len(mutated) + 1) :]
    return bytes(mutated)


def test_mutated_images(rounds) -> None:
    rng, count, refused, slowest = random.Random(1), rounds(600, 10_000), 0, 0.0
    kinds = sources()
    reasons: set[str] = set()
    for number in range(count):
        data = mutate(kinds[number % len(kinds)], rng)
        before = time.perf_counter()
        try:
            pixels = decode(data)
            assert (pixels.dtype, pixels.ndim, pixels.shape[2]) == (np.uint8, 3, 3)
        except ImageError as error:
            reasons.add(error.reason)
            refused += 1
        slowest = max(slowest, time.perf_counter() - before)
    print(f"mutated images: {count}, from {len(kinds)} files, decoded {count - refused}, refused {refused}")
    print(f"slowest {slowest * 1000:.0f} ms")
    assert reasons <= set(ImageError.REASONS)
    assert 0 < refused < count
    assert slowest < 5


def png_header(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )


def webp(kind: bytes, body: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", 12 + len(body)) + b"WEBP" + kind + struct.pack("<I", len(body)) + body


def bombs() -> list[bytes]:
    """Return fifty small files that claim or unfold into far more than an image."""
    found = []
    zeros = zlib.compress(bytes(100_000_000), 9)
    for side in (8001, 10_000, 20_000, 40_000, 65_000, 100_000, 1_000_000, 0x7FFFFFFF):
        found.append(png_header(side, side, (b"IDAT", zeros)))
        found.append(png_header(64_000_001, 1 + side // 100_000, (b"IDAT", zeros)))
    for _ in range(2):  # text that unfolds
        found.append(png_header(10, 10, *[(b"zTXt", b"k\0\0" + zeros)] * 8))
        found.append(png_header(10, 10, (b"iTXt", b"k\0\1\0\0\0" + zeros), (b"IDAT", zeros[:50])))
    found.append(png_header(10, 10, (b"iCCP", b"k\0\0" + zeros)))
    small = jpeg(1, (64, 64))
    frame = small.index(b"\xff\xc0")
    for height, width in ((65_500, 65_500), (30_000, 30_000), (65_500, 1_000), (9_000, 9_000), (8_001, 8_000)):
        found.append(small[: frame + 5] + struct.pack(">HH", height, width) + small[frame + 9 :])
    # Thousands of scans over many pixels.
    progressive = encode(Image.new("L", (7900, 7900)), "JPEG", progressive=True)
    scan = progressive.rindex(b"\xff\xda")
    for count in (60, 500, 5_000):
        found.append(progressive[:scan] + progressive[scan:-2] * count + b"\xff\xd9")
    for order, mark in (("<", b"II*\0"), (">", b"MM\0*")):
        for width, height, strips in (
            (100_000, 100_000, 1),
            (0xFFFFFFFF, 0xFFFFFFFF, 1),
            (9_000, 9_000, 1),
            (8_001, 8_000, 1),
            (10, 10, 0x0FFFFFFF),
        ):
            entries = [
                (256, 4, 1, width),
                (257, 4, 1, height),
                (258, 3, 1, 8),
                (259, 3, 1, 1),
                (262, 3, 1, 1),
                (273, 4, strips, 8),
                (279, 4, strips, 0x7FFFFFFF),
            ]
            body = b"".join(
                struct.pack(order + "HHI", tag, kind, count) + struct.pack(order + ("H2x" if kind == 3 else "I"), value)
                for tag, kind, count, value in entries
            )
            found.append(mark + struct.pack(order + "IH", 8, len(entries)) + body + bytes(600))
    for size in (16_383, 12_000, 9_000, 8_001):
        bits = (size - 1) | (size - 1) << 14
        found.append(webp(b"VP8L", b"\x2f" + struct.pack("<I", bits) + bytes(64)))
        found.append(webp(b"VP8X", struct.pack("<I", 0x02) + (size - 1).to_bytes(3, "little") * 2))
    for width, height in ((65_535, 65_535), (20_000, 20_000)):
        screen = b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\0\0" + bytes(6)
        found.append(screen + b"," + struct.pack("<HHHH", 0, 0, width, height) + b"\0\2\2\x4c\1\0;")
    found.append(b"BM" + struct.pack("<IIIIiiHHIIiiII", 1000, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0))
    found.append(b"P6 60000 60000 255\n" + bytes(100))
    return found


def test_bombs(tmp_path: Path) -> None:
    """Fifty bombs, each in a process of its own: refused or passed over within a second and 300 MB."""
    made = bombs()
    assert len(made) >= 50
    for number, data in enumerate(made):
        (tmp_path / f"{number:02d}").write_bytes(data)
    # One process, forked for each bomb: its highest memory is that bomb's alone.
    script = """
import os, resource, sys, time, warnings
warnings.simplefilter("ignore")
from maekit.system.errors import ImageError
from maekit.images import open_rgb
for name in sorted(os.listdir(sys.argv[1])):
    data = open(os.path.join(sys.argv[1], name), "rb").read()
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        before = time.perf_counter()
        try:
            open_rgb(data)
            verdict = "decoded"
        except ImageError as error:
            verdict = error.reason
        seconds = time.perf_counter() - before
        print(name, verdict, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert len(rows) == len(made)
    slowest, largest = max(float(row[2]) for row in rows), max(float(row[3]) for row in rows)
    print(f"bombs: {len(rows)}, slowest {slowest * 1000:.0f} ms, largest {largest:.0f} MB")
    for name, verdict, seconds, megabytes in rows:
        # Text that unfolds is passed over: what lies behind it is decoded.
        passed_over = made[int(name)].startswith(b"\x89PNG") and verdict == "decoded" and b"iTXt" in made[int(name)]
        assert verdict in ImageError.REASONS or passed_over, f"{name} {verdict} {len(made[int(name)])} bytes"
        assert float(seconds) < 1, name
        assert float(megabytes) < 300, name
