"""What a file is, by its first bytes: an image that maekit decodes, one that it does not, or something else.

The signatures are those of the formats' specifications (also: file(1), PRONOM). Extensions are only hints.
"""

from dataclasses import dataclass

HEAD = 132  # bytes that decide, as many as DICOM needs
_CONVERT = "convert it to JPEG or PNG first"


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of file.

    Attributes:
        name: the format, for messages and counts.
        is_image: whether it holds pixels.
        remedy: what to do where maekit does not decode it; empty for formats that it decodes.
    """

    name: str
    is_image: bool = False
    remedy: str = ""

    @property
    def is_decoded(self) -> bool:
        """Whether maekit decodes it."""
        return self.is_image and not self.remedy


_HEIF = Kind("HEIF (HEIC)", True, f"{_CONVERT} (heif-convert, or ImageMagick)")
_AVIF = Kind("AVIF", True)
_GIF, _TIFF, _PPM = Kind("GIF", True), Kind("TIFF", True), Kind("PPM", True)
_JXL = Kind("JPEG XL", True, f"{_CONVERT} (djxl)")
_J2K = Kind("JPEG 2000", True, f"{_CONVERT} (opj_decompress)")
_ARCHIVE = "unpack it first"
_SIGNATURES: tuple[tuple[int, bytes, Kind], ...] = (
    (0, b"\xff\xd8\xff", Kind("JPEG", True)),
    (0, b"\x89PNG\r\n\x1a\n", Kind("PNG", True)),
    (0, b"GIF87a", _GIF),
    (0, b"GIF89a", _GIF),
    *((0, start, _TIFF) for start in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    (8, b"WEBP", Kind("WebP", True)),
    *((0, b"P%d" % number + space, _PPM) for number in range(1, 7) for space in (b"\n", b" ", b"\t", b"\r", b"#")),
    *((4, b"ftyp" + brand, _AVIF) for brand in (b"avif", b"avis")),
    *(
        (4, b"ftyp" + brand, _HEIF)
        for brand in (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
    ),
    (0, b"\xff\x0a", _JXL),
    (0, b"\0\0\0\x0cJXL ", _JXL),
    (0, b"\0\0\0\x0cjP  ", _J2K),
    (0, b"\xff\x4f\xff\x51", _J2K),
    (0, b"8BPS", Kind("Photoshop", True, _CONVERT)),
    (128, b"DICM", Kind("DICOM", True, f"{_CONVERT} (dcm2img, or pydicom)")),
    (0, b"\x76\x2f\x31\x01", Kind("OpenEXR", True, _CONVERT)),
    (0, b"#?RADIANCE", Kind("Radiance HDR", True, _CONVERT)),
    (0, b"SIMPLE  =", Kind("FITS", True, _CONVERT)),
    (0, b"DDS ", Kind("DDS", True, _CONVERT)),
    (0, b"FUJIFILMCCD-RAW", Kind("camera raw", True, f"{_CONVERT} (dcraw, or darktable-cli)")),
    (0, b"\x93NUMPY", Kind("NumPy array")),
    (0, b"\x89HDF", Kind("HDF5")),
    (0, b"%PDF", Kind("PDF")),
    (0, b"%!PS", Kind("PostScript")),
    (0, b"PK\x03\x04", Kind("zip archive", remedy=_ARCHIVE)),
    (0, b"7z\xbc\xaf\x27\x1c", Kind("7z archive", remedy=_ARCHIVE)),
    (0, b"Rar!", Kind("rar archive", remedy=_ARCHIVE)),
    (0, b"\x1f\x8b", Kind("gzip data", remedy=_ARCHIVE)),
    (0, b"\x28\xb5\x2f\xfd", Kind("zstd data", remedy=_ARCHIVE)),
    (0, b"BZh", Kind("bzip2 data", remedy=_ARCHIVE)),
    (0, b"\xfd7zXZ", Kind("xz data", remedy=_ARCHIVE)),
    (4, b"ftyp", Kind("video (MP4)")),
    (0, b"\x1a\x45\xdf\xa3", Kind("video (Matroska)")),
    (8, b"AVI ", Kind("video (AVI)")),
    # Two bytes alone prove little, so they come last.
    (0, b"BM", Kind("BMP", True)),
)
_WEB_PAGE = Kind("a web page")
_SVG = Kind("SVG", True, f"{_CONVERT} (rsvg-convert)")


def kind_of(head: bytes) -> Kind | None:
    """Return what a file is by its first `HEAD` bytes; None for what is not known.

    Args:
        head: the first bytes of the file, or all of them.
    """
    if head[4:8] == b"ftyp" and b"avif" in head[8:64]:
        return _AVIF  # some writers name a general brand first
    for offset, start, kind in _SIGNATURES:
        if head.startswith(start, offset):
            return kind
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<svg", b"<!doctype svg")) or (text.startswith(b"<?xml") and b"<svg" in text):
        return _SVG
    return _WEB_PAGE if text.startswith((b"<html", b"<!doctype html", b"<head", b"<body")) else None
