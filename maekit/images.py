"""Bytes of an image file -> uint8 RGB, and the preprocessing that training, export and embedding share.

There is one rule per kind of image, the same everywhere:

    EXIF orientation is applied; other metadata are left out before decoding (image_metadata.py), ICC profiles as well;
    an animation gives its first frame, a phone's JPEG with several images (MPO) its first image;
    Pillow converts grey, palette, CMYK and YCbCr to RGB; alpha is composited over white;
    16-bit channels keep their high byte (12-bit ones their upper 8 bits), and "white is zero" is inverted;
    signed, 32-bit and float samples are refused, and so is a colour key on 16-bit colours;
    a 32-bit BMP has alpha only if its header says so;
    more than 64 megapixels (by the header) are refused before decoding.

The bytes determine the format; a file's extension is only a hint.
"""

import contextlib
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from maekit.config import IMAGENET_MEAN, IMAGENET_STD
from maekit.image_metadata import orientation_of, separate
from maekit.system.errors import ImageError, InputError, MaekitError
from maekit.system.file_kinds import HEAD, kind_of

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF")
MAX_PIXELS = 64_000_000
_START_OF_SCAN = b"\xff\xda"  # cannot occur within entropy-coded data
_SMALLEST_SCAN = 10  # bytes: the header of a scan with one component
_MAX_SCANNED = 32 * MAX_PIXELS
_HEAD_FOR_MESSAGE = 12
_ORIENTATION = 0x0112  # the EXIF tag
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT = 258, 262, 339
_SIGNED = 2
_SIDEWAYS = (5, 6, 7, 8)  # orientations that swap width and height
_STRIP = 512  # rows
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LARGEST_SIDE = 16384
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

CROP_DRAWS = 22
# Weights of red, green and blue in grey (ITU-R BT.601, as in Pillow); a grey image stays as it is.
LUMA = (0.299, 0.587, 0.114)

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Preprocess:
    """Preprocessing from a decoded image to the model's input; stored in the ONNX file as JSON.

    The image is resized to just cover `resize` (antialiased, aspect ratio kept), then centre-cropped to `size`.
    The model itself scales to [0, 1] and normalises by `mean` and `std`.

    Attributes:
        size: (height, width) of the model's input, in pixels.
        resize: (height, width) in pixels that the resized image just covers.
        mean: mean per channel, for values in [0, 1].
        std: standard deviation per channel, for values in [0, 1].
        interpolation: `bicubic` or `bilinear`, antialiased, by Pillow.
        crop_mode: `center`, as above; `squash` (timm's name) resizes to exactly `resize`, whatever the aspect ratio,
            before the crop.

    Raises:
        InputError: a value is impossible.
    """

    size: tuple[int, int]
    resize: tuple[int, int]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        if self.interpolation not in _RESAMPLING:
            raise InputError(f"interpolation {self.interpolation!r}: must be one of {', '.join(_RESAMPLING)}")
        if self.crop_mode not in ("center", "squash"):
            raise InputError(f"crop mode {self.crop_mode!r}: must be one of center, squash")
        if not all(0 < side <= covered <= _LARGEST_SIDE for side, covered in zip(self.size, self.resize, strict=True)):
            raise InputError(f"images resized to {self.resize} and cut to {self.size}: impossible sizes")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(map(math.isfinite, values)) or (name == "std" and min(values) <= 0):
                raise InputError(f"{name} {values}: must be three finite numbers, those of std greater than 0")

    @classmethod
    def for_size(cls, size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]) -> "Preprocess":
        """Return the usual evaluation preprocessing: a centre crop of 0.875, or no margin below 128 pixels."""
        ratio = 0.875 if min(size) >= 128 else 1.0
        return cls(size, (math.floor(size[0] / ratio), math.floor(size[1] / ratio)), mean, std)

    def at(self, size: tuple[int, int]) -> "Preprocess":
        """Return the same preprocessing for another input (height, width): the crop keeps its share of the image."""
        height, width = (
            math.floor(new * covered / old) for new, covered, old in zip(size, self.resize, self.size, strict=True)
        )
        return replace(self, size=size, resize=(height, width))

    def __call__(self, data: bytes) -> Pixels:
        """Decode an image file and prepare it for evaluation: bytes -> uint8 `[H, W, 3]`.

        Raises:
            ImageError: the bytes cannot be decoded.
        """
        # At twice the needed size, reduced JPEG scales differ from full decoding by a cosine of 1e-7.
        return self.prepare(open_rgb(data, at_least=(2 * self.resize[0], 2 * self.resize[1])))

    def prepare(self, image: Image.Image) -> Pixels:
        """Resize and crop a decoded RGB image -> uint8 `[H, W, 3]`.

        Raises:
            ImageError: the image is so elongated that resizing it would fill the memory.
        """
        height, width = self.size
        if not image.width * image.height:
            raise ImageError("empty", f"{image.width} x {image.height} pixels")
        scale = max(self.resize[0] / image.height, self.resize[1] / image.width)
        # The limiting side gets its exact size; the other is rounded down to whole pixels, as in torchvision.
        # An image of one pixel row would become extremely long.
        covered = (max(int(image.width * scale + 1e-6), width), max(int(image.height * scale + 1e-6), height))
        if self.crop_mode == "squash":
            covered = (self.resize[1], self.resize[0])
        if covered[0] * covered[1] > MAX_PIXELS:
            raise ImageError("too_large", f"{image.width} x {image.height} pixels: too long for {width} x {height}")
        resized = image.resize(covered, _RESAMPLING[self.interpolation])
        left, top = round((covered[0] - width) / 2.0), round((covered[1] - height) / 2.0)
        return np.asarray(resized.crop((left, top, left + width, top + height)))

    def to_json(self) -> dict[str, Any]:
        """Return the spec as JSON values."""
        return {**asdict(self), "antialias": True, "channels": "RGB"}

    @classmethod
    def from_json(cls, spec: dict[str, Any]) -> "Preprocess":
        """Return the spec from what `to_json` gave."""
        size, resize = (int(spec["size"][0]), int(spec["size"][1])), (int(spec["resize"][0]), int(spec["resize"][1]))
        mean, std = (tuple(float(value) for value in spec[name]) for name in ("mean", "std"))
        return cls(size, resize, mean, std, str(spec["interpolation"]), str(spec.get("crop_mode", "center")))


def decode(data: bytes) -> Pixels:
    """Decode an image file at its full size: bytes -> uint8 `[H, W, 3]`.

    Raises:
        ImageError: the bytes cannot be decoded.
    """
    return np.asarray(open_rgb(data))


def open_rgb(data: bytes, *, at_least: tuple[int, int] | None = None) -> Image.Image:
    """Decode an image file to a Pillow image of mode RGB, upright.

    Args:
        data: the file's bytes.
        at_least: (height, width) in pixels; a JPEG may be decoded at a reduced scale not smaller than this.

    Raises:
        ImageError: the bytes cannot be decoded; its `reason` is one of `ImageError.REASONS`.
    """
    with _opened(data) as (image, orientation):
        if image.format == "JPEG" and at_least is not None:
            # The orientation may swap the sides later, so both must keep the longer of the two lengths.
            image.draft(None, (max(at_least), max(at_least)))
        return _upright_rgb(image, orientation)


def open_crop(data: bytes, choose: Callable[[int, int], Box], *, at_least: tuple[int, int]) -> tuple[Image.Image, Box]:
    """Decode an image file for one crop: a JPEG at a reduced scale if the crop stays large enough.

    Args:
        data: the file's bytes.
        choose: returns the crop box for the width and height of the whole upright image, in pixels.
        at_least: minimum (height, width) of the decoded crop, in pixels.

    Returns:
        an RGB image, and the crop box within it.

    Raises:
        ImageError: the bytes cannot be decoded.
    """
    with _opened(data) as (image, orientation):
        width, height = image.size if orientation not in _SIDEWAYS else image.size[::-1]
        left, top, right, bottom = choose(width, height)
        reduction = reduction_of((right - left, bottom - top), at_least) if image.format == "JPEG" else 1
        if reduction > 1:
            image.draft(None, (image.width // reduction, image.height // reduction))
        rgb = _upright_rgb(image, orientation)
        # Rounded to whole pixels of the decoded image: each edge is at most half a pixel off the chosen box.
        x, y = rgb.width / width, rgb.height / height
        return rgb, (round(left * x), round(top * y), round(right * x), round(bottom * y))


def reduction_of(crop: tuple[int, int], at_least: tuple[int, int]) -> int:
    """Return the factor (1, 2, 4 or 8) by which a JPEG may be reduced while a crop keeps its minimum size.

    Args:
        crop: (width, height) of the crop at full scale, in pixels.
        at_least: minimum (height, width) of the reduced crop, in pixels.
    """
    room = min(crop[0] // at_least[1], crop[1] // at_least[0])
    return next((scale for scale in (8, 4, 2) if room >= scale), 1)


class Examined(NamedTuple):
    """A decoded image, with the format and pixel mode of its file.

    Attributes:
        format: file format, as Pillow names it.
        mode: pixel mode before conversion, as Pillow names it.
        rgb: the upright RGB image, converted by the rules above.
    """

    format: str
    mode: str
    rgb: Image.Image


def examine(data: bytes) -> Examined:
    """Decode an image file at its full size; also return its format and pixel mode.

    Raises:
        ImageError: the bytes cannot be decoded.
    """
    with _opened(data) as (image, orientation):
        image.load()
        return Examined(str(image.format), image.mode, _upright_rgb(image, orientation))


def rgb_of(image: Image.Image) -> Image.Image:
    """Return a Pillow image in mode RGB and upright, by the same rules; it may still have to read its file.

    Raises:
        ImageError: it cannot be decoded, or there is no rule for its mode.
    """
    with _refusals(b""):
        if getattr(image, "tile", None):  # its pixels are still in the file
            _refuse_too_large(image, b"")
        _refuse_without_rule(image)
        image.load()
        orientation = 1
        # Pillow turns a TIFF while loading it.
        if not isinstance(image, TiffImagePlugin.TiffImageFile):
            with contextlib.suppress(Exception):  # whatever broken metadata make Pillow raise
                orientation = image.getexif().get(_ORIENTATION, 1)
        return _upright_rgb(image, orientation)


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[tuple[Image.Image, int]]:
    """Read an image file's header; yield the image and its EXIF orientation, under `_refusals`."""
    with _refusals(data):
        if not data:
            raise ImageError("empty", "zero bytes")
        pixels, orientation = separate(data)
        image = Image.open(io.BytesIO(pixels), formats=FORMATS)
        if orientation is None:
            orientation = orientation_of(image.info.get("exif"), image.info.get("xmp"))
        _refuse_too_large(image, data)
        _refuse_without_rule(image)
        yield image, orientation


@contextlib.contextmanager
def _refusals(data: bytes) -> Iterator[None]:
    """Convert any exception of decoding to an ImageError."""
    try:
        yield
    except MaekitError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", str(error)) from error
    except UnidentifiedImageError as error:
        raise _unidentified(data) from error
    except Exception as error:  # Pillow's decoders raise no documented set of exceptions on damaged files
        raise ImageError("undecodable", f"{type(error).__name__}: {error}") from error


def _unidentified(data: bytes) -> ImageError:
    """Return what is wrong with bytes that Pillow does not take for an image of any format decoded here."""
    kind = kind_of(data[:HEAD])
    if kind is None:
        return ImageError("not_an_image", f"no known image format (starts with {data[:_HEAD_FOR_MESSAGE]!r})")
    if kind.is_decoded:
        return ImageError("undecodable", f"starts as {kind.name}, and is damaged or cut off")
    if kind.is_image:
        return ImageError("unsupported_format", f"{kind.name} is not decoded; {kind.remedy}")
    return ImageError("not_an_image", f"this is {kind.name}")


def _refuse_too_large(image: Image.Image, data: bytes) -> None:
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise ImageError("too_large", f"{image.width} x {image.height} pixels (at most {MAX_PIXELS} are decoded)")
    # Each scan of a progressive JPEG covers all pixels: a small file with thousands of scans would take hours.
    if image.format == "JPEG" and len(data) // _SMALLEST_SCAN * pixels > _MAX_SCANNED:
        scans = data.count(_START_OF_SCAN)
        if scans * pixels > _MAX_SCANNED:
            raise ImageError("too_large", f"{scans} scans of {image.width} x {image.height} pixels")


def _upright_rgb(image: Image.Image, orientation: int) -> Image.Image:
    """Load an opened image; return it in mode RGB and upright, by the rules above.

    Raises:
        ImageError: there is no rule for its mode.
    """
    image.load()
    turn = _TURNS.get(orientation)
    rgb = _to_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def _refuse_without_rule(image: Image.Image) -> None:
    """Refuse images without a rule that can no longer be recognised once their pixels are loaded as 8-bit."""
    if isinstance(image, TiffImagePlugin.TiffImageFile) and _SIGNED in _tiff_tag(image, _TIFF_SAMPLE_FORMAT):
        raise ImageError("unsupported_mode", "TIFF of signed samples has no 8-bit rule")
    if isinstance(image, PngImagePlugin.PngImageFile):
        is_deep = any("RGB;16" in str(tile.args) for tile in image.tile)
        if is_deep and "transparency" in image.info:
            raise ImageError("unsupported_mode", "PNG of 16-bit colours, one of them transparent, has no 8-bit rule")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray(_high_byte(image)).convert("RGB")
    if image.mode in ("I", "F") or image.mode.startswith(("I;", "F;")):
        raise ImageError("unsupported_mode", f"{image.format} of mode {image.mode} (32-bit or float) has no 8-bit rule")
    if image.has_transparency_data:
        return _over_white(image.convert("RGBA"))
    return image.convert("RGB")


def _high_byte(image: Image.Image) -> NDArray[np.uint8]:
    """Return the upper 8 bits of a deep grey image: uint8 `[H, W]`."""
    deep = np.asarray(image)
    bits, is_white_zero = 16, False
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = max((b for b in _tiff_tag(image, _TIFF_BITS) if 8 < b < 16), default=16)
        is_white_zero = _tiff_tag(image, _TIFF_PHOTOMETRIC) == (0,)
    grey = (deep >> (bits - 8)).astype(np.uint8)
    if is_white_zero:
        grey = 255 - grey
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # a colour key, with all 16 bits
        grey = np.where(deep == transparent, np.uint8(255), grey)
    return grey


def _tiff_tag(image: TiffImagePlugin.TiffImageFile, tag: int) -> tuple[int, ...]:
    value = image.tag_v2.get(tag, ())
    return value if isinstance(value, tuple) else (value,)


def _over_white(layer: Image.Image) -> Image.Image:
    """Composite an RGBA image over white, in strips: whole copies of a large image would fill the memory."""
    result = Image.new("RGB", layer.size)
    for top in range(0, layer.height, _STRIP):
        strip = layer.crop((0, top, layer.width, min(top + _STRIP, layer.height)))
        result.paste(Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip).convert("RGB"), (0, top))
    return result


def fixed_crop(
    width: int, height: int, covered: tuple[int, int], size: tuple[int, int], offset: tuple[float, float]
) -> Box:
    """Choose the box equivalent to resizing an image to cover a rectangle, then cropping (Krizhevsky et al. 2012).

    Args:
        width: width of the image, in pixels.
        height: height of the image, in pixels.
        covered: (height, width) in pixels that the resized image would just cover.
        size: (height, width) in pixels of the crop within the resized image.
        offset: (horizontal, vertical) offset of the box as a fraction of the free space, in [0, 1].

    Returns:
        (left, top, right, bottom) in pixels of the original image.
    """
    scale = min(height / covered[0], width / covered[1])
    w, h = min(width, max(1, round(size[1] * scale))), min(height, max(1, round(size[0] * scale)))
    left, top = round(offset[0] * (width - w)), round(offset[1] * (height - h))
    return left, top, left + w, top + h


def random_resized_crop(
    width: int, height: int, draws: NDArray[np.float64], *, scale: tuple[float, float], aspect: float = 1.0
) -> Box:
    """Choose a crop of random area and aspect (Szegedy et al. 2015; the procedure of torchvision).

    Args:
        width: width of the image, in pixels.
        height: height of the image, in pixels.
        draws: uniform numbers in [0, 1), float64 `[CROP_DRAWS]`: ten pairs of area and aspect, then the offset (x, y).
        scale: bounds of the crop area as a fraction of the image area. For a non-square input, it is a fraction of the
            largest box of the input's aspect; otherwise hardly any crop for an elongated input would fit.
        aspect: width / height of the input; the crop's is log-uniform between 3/4 and 4/3 of it.

    Returns:
        (left, top, right, bottom) in pixels, at least one pixel wide and high.
    """
    low, high = 3 / 4 * aspect, 4 / 3 * aspect
    whole = width * height if aspect == 1 else min(width, height * aspect) * min(height, width / aspect)
    log_low, log_high = math.log(low), math.log(high)
    for attempt in range(10):
        area = whole * (scale[0] + (scale[1] - scale[0]) * draws[2 * attempt])
        drawn = math.exp(log_low + (log_high - log_low) * draws[2 * attempt + 1])
        w, h = round(math.sqrt(area * drawn)), round(math.sqrt(area / drawn))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draws[20] * (width - w + 1)), int(draws[21] * (height - h + 1))
            return left, top, left + w, top + h
    # On a very elongated image no attempt fits: take the largest centre crop within the aspect bounds.
    w = max(1, min(width, round(height * high)))
    h = max(1, min(height, round(width / low)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
