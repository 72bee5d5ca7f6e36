"""Metadata never cost an image its pixels: every kind of it, empty, short, garbage, huge or with a wrong checksum."""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from maekit.image_metadata import orientation_of, separate
from maekit.images import decode, open_crop

GARBAGE = np.random.default_rng(5).integers(0, 256, 300, dtype=np.uint8).tobytes()
HUGE = bytes(range(256)) * 16384
BODIES = {"empty": b"", "short": b"\0", "garbage": GARBAGE, "huge": HUGE}
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")


def picture(seed: int = 1) -> Image.Image:
    grid = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(grid).resize((64, 48), Image.Resampling.BICUBIC)


def encoded(form: str, mode: str = "RGB", **options: Any) -> bytes:
    out = io.BytesIO()
    picture().convert(mode).save(out, form, **options)
    return out.getvalue()


def by_pillow(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def refused(cases: Iterator[tuple[str, bytes]], expected: Any) -> list[str]:
    """Return the cases that do not give the expected pixels, by both ways in."""
    wrong = []
    for name, data in cases:
        try:
            crop, box = open_crop(data, lambda width, height: (0, 0, width, height), at_least=(64, 64))
            same = np.array_equal(decode(data), expected) and np.array_equal(np.asarray(crop.crop(box)), expected)
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}")
        else:
            wrong += [] if same else [f"{name}: other pixels"]
    return wrong


def png_chunk(kind: bytes, body: bytes, *, wrong_crc: bool = False) -> bytes:
    crc = 0 if wrong_crc else zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


PNG_KINDS = (
    *(b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"bKGD", b"hIST"),
    *(b"tIME", b"sPLT", b"acTL", b"fcTL", b"fdAT", b"tRNS", b"oFFs", b"vpAg", b"caBX", b"cICP", b"iDOT", b"zzZz"),
)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_png_chunks(mode: str) -> None:
    plain = encoded("PNG", mode)

    def cases() -> Iterator[tuple[str, bytes]]:
        for kind in PNG_KINDS:
            for what, body in BODIES.items():
                for wrong_crc in (False, True):
                    # Behind IHDR, or where a palette must come first, before the end.
                    for at in (33, len(plain) - 12):
                        chunk = png_chunk(kind, body, wrong_crc=wrong_crc)
                        yield f"{kind!r} {what} {wrong_crc} at {at}", plain[:at] + chunk + plain[at:]

    assert refused(cases(), decode(plain)) == []


def test_png_text_of_many_megabytes_in_all() -> None:
    plain = encoded("PNG")
    texts = b"".join(png_chunk(b"zTXt", b"n%d\0\0" % i + zlib.compress(bytes(1_000_000))) for i in range(70))
    assert refused(iter([("70 MB", plain[:33] + texts + plain[33:])]), by_pillow(plain)) == []


def test_png_transparency_stays() -> None:
    image = picture().convert("P")
    image.info["transparency"] = bytes([0] * 128)
    out = io.BytesIO()
    image.save(out, "PNG")
    over_white = Image.new("RGBA", image.size, "white")
    over_white.alpha_composite(Image.open(io.BytesIO(out.getvalue())).convert("RGBA"))
    assert np.array_equal(decode(out.getvalue()), np.asarray(over_white.convert("RGB")))


@pytest.mark.parametrize("default_image", [False, True])
def test_an_animated_png_gives_its_default_image(default_image: bool) -> None:
    out = io.BytesIO()
    picture(0).save(out, "PNG", save_all=True, append_images=[picture(1), picture(2)], default_image=default_image)
    assert np.array_equal(decode(out.getvalue()), np.asarray(picture(0)))


JPEG_STARTS = (
    *(b"", b"JFIF\0", b"JFXX\0", b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"ICC_PROFILE\0\1\1", b"MPF\0"),
    *(b"Photoshop 3.0\0", b"Adobe", b"Ducky", b"\xff\xd8"),
)


@pytest.mark.parametrize(("mode", "options"), [("RGB", {}), ("RGB", {"progressive": True}), ("L", {}), ("CMYK", {})])
def test_jpeg_segments(mode: str, options: dict[str, Any]) -> None:
    plain = encoded("JPEG", mode, **options)

    def cases() -> Iterator[tuple[str, bytes]]:
        for marker in (*range(0xE0, 0xF0), 0xFE):
            for start in JPEG_STARTS:
                for what, rest in BODIES.items():
                    body = (start + rest)[:65533]
                    if (marker, start) in ((0xE0, b"JFIF\0"), (0xEE, b"Adobe")) and len(body) > 11:
                        continue  # a second, whole segment of the two that tell the colour space
                    segment = struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body
                    yield f"{marker:x} {start!r} {what}", plain[:2] + segment + plain[2:]

    assert refused(cases(), by_pillow(plain)) == []


@pytest.mark.parametrize("lossless", [False, True])
def test_webp_chunks(lossless: bool) -> None:
    plain = encoded("WEBP", lossless=lossless)
    extended = encoded("WEBP", lossless=lossless, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0")

    def cases() -> Iterator[tuple[str, bytes]]:
        for what, body in BODIES.items():
            for key in ("exif", "xmp", "icc_profile"):
                yield f"{key} {what}", encoded("WEBP", lossless=lossless, **{key: body})
            for kind in (b"EXIF", b"XMP ", b"ICCP", b"ABCD"):
                chunk = kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)
                file = extended + chunk
                yield f"{kind!r} {what}", file[:4] + struct.pack("<I", len(file) - 8) + file[8:]

    assert refused(cases(), decode(plain)) == []


@needs_avif
def test_avif_items() -> None:
    exif = Image.Exif()
    exif[0x010E] = "a description of some length"
    with_exif = encoded("AVIF", exif=exif)
    at = max(with_exif.find(b"II*\0"), with_exif.find(b"MM\0*"))
    cases = [(f"{key} huge", encoded("AVIF", **{key: HUGE})) for key in ("xmp", "icc_profile")]
    cases += [
        (f"exif from byte {cut}", with_exif[: at + cut] + b"\xa8" * (40 - cut) + with_exif[at + 40 :])
        for cut in (0, 4, 10)
    ]
    assert at > 0
    assert refused(iter(cases), decode(encoded("AVIF"))) == []


TIFF_TAGS = (
    *(254, 255, 269, 270, 271, 272, 274, 280, 281, 282, 283, 285, 296, 297, 305, 306, 315, 316, 318, 319, 330, 700),
    *(33432, 33723, 34377, 34665, 34675, 34853, 37724, 40965, 42112, 50706, 65000),
)
TIFF_VALUES = (
    *((2, 0, b""), (3, 1, b"\xff\xff"), (4, 1, b"\xff\xff\xff\x7f"), (5, 1, bytes(8)), (7, 300, GARBAGE)),
    *((2, 2**31, b"\0\0\0\x10abcde"), (99, 5, b"hello"), (12, 3, b"\0\0"), (3, 70000, bytes(140000))),
)


def with_field(data: bytes, tag: int, kind: int, count: int, value: bytes) -> bytes:
    """Return a TIFF with a field more in its first directory, which moves to the end of the file."""
    big = data[2] == 43
    counts, offsets, size, start = ("<Q", "<Q", 20, 8) if big else ("<H", "<I", 12, 4)
    (directory,) = struct.unpack_from(offsets, data, start)
    (fields,) = struct.unpack_from(counts, data, directory)
    first = directory + struct.calcsize(counts)
    kept = [data[first + size * i : first + size * (i + 1)] for i in range(fields)]
    room = struct.calcsize(offsets)
    blob_at = len(data) + len(data) % 2
    stored = value.ljust(room, b"\0") if len(value) <= room else struct.pack(offsets, blob_at)
    kept.append(struct.pack("<HH" + offsets[1], tag, kind, count) + stored)
    kept.sort(key=lambda field: struct.unpack_from("<H", field)[0])
    blob = value if len(value) > room else b""
    blob += bytes(len(blob) % 2)
    head = data[:start] + struct.pack(offsets, blob_at + len(blob))
    body = data[len(head) :] + bytes(len(data) % 2) + blob
    return head + body + struct.pack(counts, len(kept)) + b"".join(kept) + bytes(room)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "RGBA", "1"])
@pytest.mark.parametrize(
    "options", [{}, {"compression": "tiff_lzw"}, {"big_tiff": True}, {"compression": "jpeg"}], ids=str
)
def test_tiff_fields(mode: str, options: dict[str, Any]) -> None:
    if "jpeg" in options.values() and mode in ("P", "RGBA", "1"):
        pytest.skip("JPEG holds no such pixels")
    plain = encoded("TIFF", mode, **options)

    def cases() -> Iterator[tuple[str, bytes]]:
        for tag in TIFF_TAGS:
            for kind, count, value in TIFF_VALUES:
                yield f"{tag} {kind} {count}", with_field(plain, tag, kind, count, value)

    assert refused(cases(), decode(plain)) == []


def test_tiff_directories_in_a_circle() -> None:
    plain = bytearray(encoded("TIFF"))
    (directory,) = struct.unpack_from("<I", plain, 4)
    (fields,) = struct.unpack_from("<H", plain, directory)
    struct.pack_into("<I", plain, directory + 2 + 12 * fields, directory)
    assert refused(iter([("circle", bytes(plain))]), np.asarray(picture())) == []


def test_gif_extensions() -> None:
    plain = encoded("GIF")
    start = 13 + 3 * (2 << (plain[10] & 7))

    def cases() -> Iterator[tuple[str, bytes]]:
        for label in (0xFE, 0xFF, 0x01, 0xF9, 0x77):
            for what, body in BODIES.items():
                blocks = b"".join(bytes([len(body[i : i + 255])]) + body[i : i + 255] for i in range(0, len(body), 255))
                yield f"{label:x} {what}", plain[:start] + bytes([0x21, label]) + blocks + b"\0" + plain[start:]

    assert refused(cases(), decode(plain)) == []


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP", "MPO", pytest.param("AVIF", marks=needs_avif)])
def test_format_and_orientation(form: str, orientation: int) -> None:
    options: dict[str, Any] = {
        "WEBP": {"lossless": True},
        "MPO": {"save_all": True, "append_images": [picture(7)]},
    }.get(form, {})
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = encoded(form, exif=exif, **options)
    if form == "AVIF":  # the writer of Pillow turns the pixels by a property of the image
        upright = np.asarray(Image.fromarray(decode(encoded("AVIF"))))
    else:
        upright = by_pillow(encoded(form, **options))
    expected = upright if orientation == 1 else np.asarray(Image.fromarray(upright).transpose(TURNS[orientation]))
    asked = []

    def choose(width: int, height: int) -> tuple[int, int, int, int]:
        asked.append((height, width))
        return 0, 0, width, height

    crop, _ = open_crop(stored, choose, at_least=(64, 64))
    assert asked == [expected.shape[:2]]
    assert np.array_equal(np.asarray(crop), expected)
    assert np.array_equal(decode(stored), expected)


@pytest.mark.parametrize(
    ("exif", "xmp", "orientation"),
    [
        (None, None, 1),
        (b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0", None, 6),
        (b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x08\0\0\0\0\0\0", None, 8),
        (b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0", None, 1),
        (b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\0a\0\0\0\0\0\0\0", None, 1),
        (b"Exif\0\0garbage!", None, 1),
        (b"Exif\0\0garbage!", b'<x tiff:Orientation="6"/>', 6),
        (None, b"<tiff:Orientation>3</tiff:Orientation>", 3),
        (None, b'<x tiff:Orientation="9"/>\xa8', 1),
    ],
)
def test_orientation(exif: bytes | None, xmp: bytes | None, orientation: int) -> None:
    assert orientation_of(exif, xmp) == orientation


def test_orientation_in_text_chunks_of_png() -> None:
    plain = encoded("PNG")
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    profile = b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n%8d\n" % len(exif) + exif.hex().encode() + b"\n")
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    packed = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b'<x tiff:Orientation="6"/>')
    expected = np.asarray(picture().transpose(Image.Transpose.ROTATE_270))
    for kind, body in ((b"zTXt", profile), (b"iTXt", xmp), (b"iTXt", packed)):
        assert np.array_equal(decode(plain[:33] + png_chunk(kind, body) + plain[33:]), expected)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "GIF", "WEBP", "BMP"])
def test_any_cut_of_a_file_can_be_separated(form: str) -> None:
    data = encoded(form)
    for length in (*range(0, 200), len(data) - 1):
        separate(data[:length])
    assert separate(data)[0][:2] == data[:2]
