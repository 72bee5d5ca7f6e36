"""Separates the metadata of an image file from its pixels, so that metadata can never cost an image its pixels.

Pillow parses text, profiles, resolutions and EXIF data while it opens a file, and refuses the image if any of them is
broken or large. Nothing of this determines a pixel except the orientation, which is read here, in a bounded way:

    JPEG   ITU-T T.81, B.2.4.6   segments APP0 to APP15 and COM; JFIF and Adobe stay, which tell the colour space
    PNG    W3C PNG, 5.4 and 11   ancillary chunks; tRNS stays, which is transparency
    TIFF   TIFF 6.0, section 2   fields of the first directory that describe no pixels, and all further directories
    GIF    GIF 89a, 23 to 26     extensions before the first image; a sound graphic control stays, which is transparency
    AVIF   HEIF, 6 and A.2.1     the EXIF item; libavif takes the orientation from the properties of the image

Other formats keep their metadata in chunks that their libraries pass over; Pillow is asked for their orientation.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from typing import Any

from PIL import Image

_ORIENTATION = 0x0112  # the EXIF tag
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_LARGEST = 1 << 20  # bytes of text or EXIF data that are looked at
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_XMP, _PNG_EXIF = b"XML:com.adobe.xmp", b"Raw profile type exif"
_SEGMENT = struct.Struct(">HH")  # marker and length
_JPEG_EXIF, _JPEG_XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
# What decides how the pixels are stored: TIFF 6.0, and its technical notes on JPEG.
_TIFF_FIELDS = frozenset(
    (
        *(256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284),  # size, bits, compression, strips, planes
        *(292, 293, 317, 320, 322, 323, 324, 325, 332, 333, 334, 336),  # fax, predictor, palette, tiles, inks
        *(338, 339, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521),  # extra samples, sample format, JPEG
        *(529, 530, 531, 532),  # YCbCr
    )
)
_TIFF_XMP = 700


def separate(data: bytes) -> tuple[bytes, int | None]:
    """Return an image file without its metadata, and its orientation.

    Args:
        data: the file's bytes; they need not be an image.

    Returns:
        the bytes (the given ones where there is nothing to leave out), and the EXIF orientation, 1 to 8; None for
        formats whose metadata stay in place.
    """
    try:
        if data.startswith(b"\xff\xd8"):
            return _separate_jpeg(data)
        if data.startswith(_PNG):
            return _separate_png(data)
        if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return _separate_tiff(data)
        if data.startswith((b"GIF87a", b"GIF89a")):
            return _separate_gif(data), 1
        if data[4:12] in (b"ftypavif", b"ftypavis"):
            return _separate_avif(data), None
    except (struct.error, ValueError, IndexError):  # not the structure of its format: the decoder says what is wrong
        return data, 1
    return data, None


def orientation_of(exif: bytes | None, xmp: bytes | None) -> int:
    """Return the orientation, 1 to 8, that EXIF data state, or else the XMP packet; 1 if both are broken or silent.

    Args:
        exif: a TIFF structure, with or without the prefix of its JPEG segment.
        xmp: an XMP packet.
    """
    found: Any = None
    if exif is not None:
        reader = Image.Exif()
        try:
            reader.load(exif[:_LARGEST])
            found = reader.get(_ORIENTATION)
        except Exception:  # whatever broken bytes make Pillow raise
            found = None
    if found is None and xmp is not None and (match := _XMP_ORIENTATION.search(xmp, 0, _LARGEST)):
        found = int(match[1])
    try:
        return int(found) if found in range(1, 9) else 1
    except (TypeError, ValueError):
        return 1


def _separate_jpeg(data: bytes) -> tuple[bytes, int]:
    exif = xmp = None
    kept = [b"\xff\xd8"]
    copied = at = 2
    last = len(data) - 4
    while at <= last:
        marker, length = _SEGMENT.unpack_from(data, at)
        if marker == 0xFFFF:  # a fill byte
            at += 1
            continue
        if marker == 0xFFDA or marker < 0xFFC0 or length < 2:  # the first scan; or nothing that stands before it
            break
        end = at + 2 + length
        if 0xFFE0 <= marker <= 0xFFEF or marker == 0xFFFE:
            body = data[at + 4 : end]
            if marker == 0xFFE1 and exif is None and body.startswith(_JPEG_EXIF):
                exif = body
            elif marker == 0xFFE1 and xmp is None and body.startswith(_JPEG_XMP):
                xmp = body
            # Shorter ones mean nothing to libjpeg, but end Pillow's parser.
            is_jfif = marker == 0xFFE0 and body.startswith(b"JFIF\0") and len(body) >= 14
            is_adobe = marker == 0xFFEE and body.startswith(b"Adobe") and len(body) >= 12
            if not (is_jfif or is_adobe):
                kept.append(data[copied:at])
                copied = end
        at = end
    if len(kept) == 1 and copied == 2:
        return data, 1
    return b"".join((*kept, data[copied:])), orientation_of(exif, xmp)


def _separate_png(data: bytes) -> tuple[bytes, int]:
    exif = xmp = None
    colour = data[25] if len(data) > 25 else 0
    kept = []
    copied = 0
    for kind, at, end in _png_chunks(data):
        if not kind[0] & 0x20 or (kind == b"tRNS" and _is_transparency(data, at, end, colour)):
            continue
        body = data[at + 8 : min(end - 4, at + 8 + _LARGEST)]
        if kind == b"eXIf":
            exif = body
        elif kind == b"iTXt" and body.startswith(_PNG_XMP + b"\0"):
            xmp = _international_text(body)
        elif kind == b"zTXt" and body.startswith(_PNG_EXIF + b"\0") and exif is None:
            exif = _raw_profile(body)
        kept.append(data[copied:at])
        copied = end
    if not kept:
        return data, 1
    return b"".join((*kept, data[copied:])), orientation_of(exif, xmp)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (type, first byte, byte behind) of each whole chunk."""
    at = len(_PNG)
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data) or not kind.isalpha():
            return
        yield kind, at, end
        at = end


def _is_transparency(data: bytes, at: int, end: int, colour: int) -> bool:
    """Whether a tRNS chunk is sound: of the length that its colour type asks for, with its checksum."""
    length = end - at - 12
    is_fitting = {0: length == 2, 2: length == 6, 3: 0 < length <= 256}.get(colour, False)
    return is_fitting and zlib.crc32(data[at + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big")


def _inflate(data: bytes) -> bytes | None:
    try:
        return zlib.decompressobj().decompress(data, _LARGEST)
    except zlib.error:
        return None


def _international_text(body: bytes) -> bytes | None:
    """Return the text of an iTXt chunk: keyword, 0, is compressed, method, language, 0, translated keyword, 0, text."""
    _, _, rest = body.partition(b"\0")
    fields = rest[2:].split(b"\0", 2)
    if len(fields) < 3:
        return None
    return _inflate(fields[2]) if rest[0] else fields[2]


def _raw_profile(body: bytes) -> bytes | None:
    """Return the EXIF data that ImageMagick writes as text: a line of name, a line of length, then hexadecimal."""
    text = _inflate(body[len(_PNG_EXIF) + 2 :]) or b""
    try:
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return None


def _separate_tiff(data: bytes) -> tuple[bytes, int]:
    order = "<" if data[:2] == b"II" else ">"
    # BigTIFF has fields of 20 bytes and 8-byte offsets.
    count_format, offset_format, field_size, header_size = ("H", "I", 12, 4)
    if data[2:4] in (b"+\0", b"\0+"):
        count_format, offset_format, field_size, header_size = ("Q", "Q", 20, 8)
    (start,) = struct.unpack_from(order + offset_format, data, header_size)
    (count,) = struct.unpack_from(order + count_format, data, start)
    first = start + struct.calcsize(order + count_format)
    fields = [data[first + field_size * i : first + field_size * (i + 1)] for i in range(min(count, 65536))]
    fields = [field for field in fields if len(field) == field_size]
    tags = [struct.unpack_from(order + "H", field)[0] for field in fields]
    orientation, xmp = 0, None
    for tag, field in zip(tags, fields, strict=True):
        kind, length = struct.unpack_from(order + "H" + offset_format, field, 2)
        value = field[-struct.calcsize(offset_format) :]
        if tag == _ORIENTATION and kind in (3, 4) and length == 1:
            (orientation,) = struct.unpack_from(order + ("H" if kind == 3 else "I"), value)
        elif tag == _TIFF_XMP:
            (at,) = struct.unpack_from(order + offset_format, value)
            xmp = data[at : at + min(length, _LARGEST)]
    kept = [field for tag, field in zip(tags, fields, strict=True) if tag in _TIFF_FIELDS]
    padding = bytes(len(data) % 2)
    directory = struct.pack(order + count_format, len(kept)) + b"".join(kept) + bytes(struct.calcsize(offset_format))
    header = data[:header_size] + struct.pack(order + offset_format, len(data) + len(padding))
    rest = data[len(header) :]
    if orientation not in range(1, 9):
        orientation = orientation_of(None, xmp)
    return b"".join((header, rest, padding, directory)), orientation


def _separate_gif(data: bytes) -> bytes:
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    kept = [data[:at]]
    while data[at : at + 1] == b"!":
        start, at = at, at + 2
        while size := data[at]:
            at += 1 + size
        at += 1
        if data[start + 1] == 0xF9 and data[start + 2] == 4 and at == start + 8:
            kept.append(data[start:at])
    return b"".join((*kept, data[at:]))


def _separate_avif(data: bytes) -> bytes:
    """Give the EXIF item a type that no reader knows; lengths and offsets stay."""
    at = 0
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"meta":
            meta = re.sub(rb"(infe.{8})Exif", rb"\1none", data[at : at + size], flags=re.DOTALL)
            return b"".join((data[:at], meta, data[at + size :]))
        if size < 8:
            break
        at += size
    return data
