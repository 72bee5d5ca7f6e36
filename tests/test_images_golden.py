"""One written rule per image mode: generated files against what the rule says, computed without Pillow.

PNG and TIFF files are written here byte by byte; the lossy formats are written by Pillow at their best quality from
smooth pictures. What is expected is computed from the original numbers alone, and may differ by 2 of 255.
"""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import PIL
import pytest
from PIL import Image, features

from maekit.images import Preprocess, decode, examine, open_rgb
from maekit.system.errors import ImageError

H, W = 40, 56
Y, X = np.mgrid[:H, :W]
# Smooth, so that lossy formats keep it, and different in each channel and direction.
RGB = np.stack([40 + 3 * X, 30 + 4 * Y, 200 - 2 * X - Y], -1).astype(np.uint8)
GREY = RGB[..., 0]
# For formats that round the strengths of cosines: one hue, so that only the grey of it is rounded.
HUE = np.stack([40 + 2 * X + 2 * Y + shift for shift in (20, 0, -25)], -1).astype(np.uint8)
LOW = np.random.default_rng(0).integers(0, 256, (H, W, 3), np.uint8)
DEEP = RGB.astype(np.uint16) << 8 | LOW  # 16 bits whose high byte is RGB
ALPHA = (X * 4).astype(np.uint8)
BITS = ((X // 3 + Y // 5) % 2).astype(np.uint8)
PALETTE = np.random.default_rng(1).integers(0, 256, (16, 3), np.uint8)
INDEX = ((X // 4 + Y) % 16).astype(np.uint8)
CMYK = np.dstack([255 - RGB, Y * 2]).astype(np.uint8)


def rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, -1)


def over_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    weight = alpha[..., None] / 255
    return colours * weight + 255 * (1 - weight)


def from_cmyk(inks: np.ndarray) -> np.ndarray:
    return (255 - inks[..., :3].astype(float)) * (255 - inks[..., 3:].astype(float)) / 255


def from_ycbcr(samples: np.ndarray) -> np.ndarray:
    """ITU-R BT.601, full range, as JFIF has it."""
    y, cb, cr = (samples[..., i].astype(float) for i in range(3))
    return np.stack(
        [y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)], -1
    ).clip(0, 255)


def through_ycbcr(colours: np.ndarray) -> np.ndarray:
    """What is left of colours that a format keeps as whole numbers of Y, Cb and Cr."""
    red, green, blue = (colours[..., i].astype(float) for i in range(3))
    y = 0.299 * red + 0.587 * green + 0.114 * blue
    return from_ycbcr(np.round(np.stack([y, 128 + (blue - y) / 1.772, 128 + (red - y) / 1.402], -1)))


def turned(picture: np.ndarray, orientation: int) -> np.ndarray:
    """EXIF 2.32, tag 0x0112: where row 0 and column 0 of the file lie in the scene."""
    across = picture.transpose(1, 0, 2)
    return {
        1: picture,
        2: picture[:, ::-1],
        3: picture[::-1, ::-1],
        4: picture[::-1],
        5: across,
        6: across[:, ::-1],
        7: across[::-1, ::-1],
        8: across[::-1],
    }[orientation]


def png(samples: np.ndarray, colour: int, depth: int = 8, *chunks: tuple[bytes, bytes]) -> bytes:
    """Write a PNG (ISO/IEC 15948): colour 0 grey, 2 RGB, 3 palette, 4 grey + alpha, 6 RGBA."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    if depth < 8:
        bits = np.unpackbits(samples[..., None], axis=-1)[..., 8 - depth :].reshape(H, -1)
        rows = np.packbits(bits, axis=-1)
    else:
        rows = samples.astype(">u2" if depth == 16 else "u1").reshape(H, -1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff(samples: np.ndarray, photometric: int, bits: int = 8, *, big: bool = False, **tags: int) -> bytes:
    """Write an uncompressed TIFF 6.0; photometric 0 white is zero, 1 black is zero, 2 RGB, 5 CMYK."""
    order = ">" if big else "<"
    count = samples.shape[2] if samples.ndim == 3 else 1
    data = samples.tobytes()
    entries = {
        256: (4, [tags.get("width", samples.shape[1])]),
        257: (4, [samples.shape[0]]),
        258: (3, [bits] * count),
        259: (3, [1]),
        262: (3, [photometric]),
        274: (3, [tags.get("orientation", 1)]),
        277: (3, [count]),
        278: (4, [samples.shape[0]]),
        279: (4, [len(data)]),
        339: (3, [tags.get("sample_format", 1)] * count),
    }
    if "extra" in tags:
        entries[338] = (3, [tags["extra"]])
    start = 8 + 2 + 12 * (len(entries) + 1) + 4  # one more entry: where the strip is
    outside = b""
    body = b""
    entries[273] = (4, [0])
    length = sum(2 * len(v) for kind, v in entries.values() if kind == 3 and len(v) > 2)
    entries[273] = (4, [start + length])
    for tag, (kind, values) in sorted(entries.items()):
        packed = struct.pack(order + {3: "H", 4: "I"}[kind] * len(values), *values)
        if len(packed) > 4:
            outside, packed = outside + packed, struct.pack(order + "I", start + len(outside))
        body += struct.pack(order + "HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    head = (b"MM\0*" if big else b"II*\0") + struct.pack(order + "I", 8)
    return head + struct.pack(order + "H", len(entries)) + body + bytes(4) + outside + data


def written(picture: np.ndarray, image_format: str, mode: str | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture, mode).save(buffer, image_format, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def twelve_bits(samples: np.ndarray) -> np.ndarray:
    """Pack 12-bit samples, two in three bytes."""
    even, odd = samples[:, 0::2], samples[:, 1::2]
    packed = np.stack([even >> 4, (even & 15) << 4 | odd >> 8, odd & 255], -1)
    return packed.astype(np.uint8).reshape(H, -1)


BEST = {"quality": 100, "subsampling": 0}
SECOND = Image.new("RGB", (W, H), "blue")
PREMULTIPLIED = np.round(RGB * (ALPHA[..., None] / 255)).astype(np.uint8)

CASES: dict[str, tuple[Callable[[], bytes], np.ndarray]] = {
    "jpeg": (lambda: written(HUE, "JPEG", **BEST), through_ycbcr(HUE)),
    "jpeg, progressive": (lambda: written(HUE, "JPEG", progressive=True, **BEST), through_ycbcr(HUE)),
    "jpeg, grey": (lambda: written(GREY, "JPEG", quality=100), rgb(GREY)),
    "jpeg, grey, progressive": (lambda: written(GREY, "JPEG", quality=100, progressive=True), rgb(GREY)),
    "jpeg, CMYK": (lambda: written(CMYK, "JPEG", "CMYK", **BEST), from_cmyk(CMYK)),
    "jpeg, CMYK, turned": (
        lambda: written(CMYK, "JPEG", "CMYK", exif=exif(6), **BEST),
        turned(from_cmyk(CMYK), 6),
    ),
    "jpeg, halved colour": (lambda: written(HUE, "JPEG", quality=100, subsampling=2), through_ycbcr(HUE)),
    "png, RGB": (lambda: png(RGB, 2), RGB),
    "png, RGB, 16 bits": (lambda: png(DEEP, 2, 16), RGB),
    "png, RGB, one colour transparent": (
        lambda: png(RGB, 2, 8, (b"tRNS", struct.pack(">HHH", *map(int, RGB[3, 5])))),
        np.where((RGB[3, 5] == RGB).all(-1)[..., None], 255, RGB),
    ),
    "png, RGBA": (lambda: png(np.dstack([RGB, ALPHA]), 6), over_white(RGB, ALPHA)),
    "png, RGBA, 16 bits": (
        lambda: png(np.dstack([DEEP, ALPHA.astype(np.uint16) << 8]), 6, 16),
        over_white(RGB, ALPHA),
    ),
    "png, grey": (lambda: png(GREY, 0), rgb(GREY)),
    "png, grey, 1 bit": (lambda: png(BITS, 0, 1), rgb(BITS * 255)),
    "png, grey, 2 bits": (lambda: png(INDEX % 4, 0, 2), rgb(INDEX % 4 * 85)),
    "png, grey, 4 bits": (lambda: png(INDEX, 0, 4), rgb(INDEX * 17)),
    "png, grey, 16 bits": (lambda: png(DEEP[..., 0], 0, 16), rgb(GREY)),
    "png, grey, 16 bits, one grey transparent": (
        lambda: png(DEEP[..., 0], 0, 16, (b"tRNS", struct.pack(">H", int(DEEP[3, 5, 0])))),
        rgb(np.where(DEEP[..., 0] == DEEP[3, 5, 0], 255, GREY)),
    ),
    "png, grey, one grey transparent": (
        lambda: png(GREY, 0, 8, (b"tRNS", struct.pack(">H", int(GREY[3, 5])))),
        rgb(np.where(GREY[3, 5] == GREY, 255, GREY)),
    ),
    "png, grey + alpha": (lambda: png(np.dstack([GREY, ALPHA]), 4), over_white(rgb(GREY), ALPHA)),
    "png, grey + alpha, 16 bits": (
        lambda: png(np.dstack([DEEP[..., 0], ALPHA.astype(np.uint16) << 8]), 4, 16),
        over_white(rgb(GREY), ALPHA),
    ),
    "png, palette": (lambda: png(INDEX, 3, 8, (b"PLTE", PALETTE.tobytes())), PALETTE[INDEX]),
    "png, palette, 4 bits": (lambda: png(INDEX, 3, 4, (b"PLTE", PALETTE.tobytes())), PALETTE[INDEX]),
    "png, palette with alpha": (
        lambda: png(INDEX, 3, 8, (b"PLTE", PALETTE.tobytes()), (b"tRNS", bytes(range(0, 256, 16)))),
        over_white(PALETTE[INDEX], INDEX * 16),
    ),
    "png, animated": (lambda: written(RGB, "PNG", save_all=True, append_images=[SECOND]), RGB),
    "png, 16 bits, turned": (lambda: written(DEEP[..., 0], "PNG", exif=exif(8)), turned(rgb(GREY), 8)),
    "webp, lossless": (lambda: written(RGB, "WEBP", lossless=True), RGB),
    "webp, alpha": (
        lambda: written(np.dstack([RGB, ALPHA]), "WEBP", lossless=True, exact=True),
        over_white(RGB, ALPHA),
    ),
    "webp, animated": (
        lambda: written(RGB, "WEBP", save_all=True, append_images=[SECOND], lossless=True),
        RGB,
    ),
    "webp, turned": (lambda: written(RGB, "WEBP", lossless=True, exif=exif(5)), turned(RGB, 5)),
    "tiff, RGB": (lambda: tiff(RGB, 2), RGB),
    "tiff, RGB, 16 bits": (lambda: tiff(DEEP, 2, 16), RGB),
    "tiff, RGB, 16 bits, big-endian": (lambda: tiff(DEEP.astype(">u2"), 2, 16, big=True), RGB),
    "tiff, RGBA": (lambda: tiff(np.dstack([RGB, ALPHA]), 2, extra=2), over_white(RGB, ALPHA)),
    "tiff, premultiplied RGBA": (
        lambda: tiff(np.dstack([PREMULTIPLIED, ALPHA]), 2, extra=1),
        PREMULTIPLIED + 255.0 - ALPHA[..., None],
    ),
    "tiff, grey": (lambda: tiff(GREY, 1), rgb(GREY)),
    "tiff, grey, white is zero": (lambda: tiff(GREY, 0), rgb(255 - GREY)),
    "tiff, grey, 12 bits": (lambda: tiff(twelve_bits(DEEP[..., 0] >> 4), 1, 12, width=W), rgb(GREY)),
    "tiff, grey, 16 bits": (lambda: tiff(DEEP[..., 0].copy(), 1, 16), rgb(GREY)),
    "tiff, grey, 16 bits, big-endian": (lambda: tiff(DEEP[..., 0].astype(">u2"), 1, 16, big=True), rgb(GREY)),
    "tiff, grey, 16 bits, white is zero": (lambda: tiff(DEEP[..., 0].copy(), 0, 16), rgb(255 - GREY)),
    "tiff, grey, 16 bits, turned": (
        lambda: tiff(DEEP[..., 0].copy(), 1, 16, orientation=7),
        turned(rgb(GREY), 7),
    ),
    "tiff, CMYK": (lambda: tiff(CMYK, 5), from_cmyk(CMYK)),
    "tiff, YCbCr": (lambda: written(RGB, "TIFF", "YCbCr"), from_ycbcr(RGB)),
    "tiff, LZW": (lambda: written(RGB, "TIFF", compression="tiff_lzw"), RGB),
    "tiff, LZW, turned": (lambda: written(RGB, "TIFF", compression="tiff_lzw", exif=exif(6)), turned(RGB, 6)),
    "tiff, many pages": (lambda: written(RGB, "TIFF", save_all=True, append_images=[SECOND]), RGB),
    "bmp, RGB": (lambda: written(RGB, "BMP"), RGB),
    "bmp, grey": (lambda: written(GREY, "BMP"), rgb(GREY)),
    "bmp, alpha that its header does not name": (lambda: written(np.dstack([RGB, ALPHA]), "BMP"), RGB),
    "gif, animated": (lambda: written(GREY, "GIF", save_all=True, append_images=[SECOND.convert("L")]), rgb(GREY)),
    "ppm, 16 bits": (lambda: b"P6 %d %d 65535\n" % (W, H) + DEEP.astype(">u2").tobytes(), RGB),
    "pgm, 16 bits": (lambda: b"P5 %d %d 65535\n" % (W, H) + DEEP[..., 0].astype(">u2").tobytes(), rgb(GREY)),
}
for number in range(1, 9):
    CASES[f"jpeg, orientation {number}"] = (
        lambda number=number: written(HUE, "JPEG", exif=exif(number), **BEST),
        turned(through_ycbcr(HUE), number),
    )
    CASES[f"png, orientation {number}"] = (
        lambda number=number: written(RGB, "PNG", exif=exif(number)),
        turned(RGB, number),
    )
    CASES[f"tiff, orientation {number}"] = (
        lambda number=number: tiff(RGB, 2, orientation=number),
        turned(RGB, number),
    )
if features.check("avif"):
    CASES["avif"] = (lambda: written(HUE, "AVIF", quality=100, subsampling="4:4:4"), through_ycbcr(HUE))
    CASES["avif, alpha"] = (
        lambda: written(np.dstack([HUE, ALPHA]), "AVIF", quality=100, subsampling="4:4:4"),
        over_white(through_ycbcr(HUE), ALPHA),
    )
    CASES["avif, turned"] = (
        lambda: written(HUE, "AVIF", quality=100, subsampling="4:4:4", exif=exif(6)),
        turned(through_ycbcr(HUE), 6),
    )


@pytest.mark.parametrize("name", CASES)
def test_image_of_each_kind(name: str) -> None:
    make, expected = CASES[name]
    data = make()
    if name == "tiff, YCbCr" and int(PIL.__version__.partition(".")[0]) < 13:
        with pytest.raises(ImageError):
            decode(data)
        pytest.skip("Pillow before 13 refuses this kind")
    got = decode(data)
    assert (got.shape, got.dtype) == (expected.shape, np.uint8)
    assert np.abs(got - expected.astype(float)).max() <= 2
    # The same rule in training, in embedding and in `check --images`.
    np.testing.assert_array_equal(np.asarray(examine(data).rgb), got)
    prepared = Preprocess.for_size((32, 32), (0.5,) * 3, (0.5,) * 3)
    np.testing.assert_array_equal(prepared(data), prepared.prepare(open_rgb(data)))


@pytest.mark.parametrize(
    "data",
    [
        tiff(RGB[..., 0].astype(np.float32), 1, 32, sample_format=3),
        tiff(RGB[..., 0].astype(np.uint32), 1, 32),
        tiff(DEEP[..., 0].copy(), 1, 16, sample_format=2),
        tiff(GREY, 1, 8, sample_format=2),
        png(DEEP, 2, 16, (b"tRNS", struct.pack(">HHH", *map(int, DEEP[3, 5])))),
    ],
    ids=["float", "32 bits", "16 bits, signed", "8 bits, signed", "16-bit colour key"],
)
def test_kinds_without_a_rule_are_refused(data: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        decode(data)
    assert caught.value.reason == "unsupported_mode"
