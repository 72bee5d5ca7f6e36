import io
import math

import numpy as np
import pytest
from PIL import Image
from support.shards import jpeg

from maekit.config import IMAGENET_MEAN, IMAGENET_STD
from maekit.images import Preprocess, decode, open_crop, open_rgb, random_resized_crop
from maekit.system.draws import Purpose, permutation, uniform_rows, uniforms
from maekit.system.errors import ImageError

RNG = np.random.default_rng(0)
PINNED = [0.6183657700572531, 0.7459779950048457]
RGB = RNG.integers(0, 256, (20, 30, 3), np.uint8)


def encode(image: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def test_lossless_rgb() -> None:
    for image_format in ("PNG", "BMP", "TIFF", "PPM"):
        np.testing.assert_array_equal(decode(encode(Image.fromarray(RGB), image_format)), RGB)
    np.testing.assert_array_equal(decode(encode(Image.fromarray(RGB), "WEBP", lossless=True)), RGB)


def test_grey_palette_and_sixteen_bits() -> None:
    grey = RGB[..., 0]
    np.testing.assert_array_equal(decode(encode(Image.fromarray(grey), "PNG")), np.stack([grey] * 3, -1))
    palette = Image.fromarray(RGB).quantize(16)
    np.testing.assert_array_equal(decode(encode(palette, "PNG")), np.asarray(palette.convert("RGB")))
    deep = RNG.integers(0, 65536, (20, 30), np.uint16)
    expected = np.stack([(deep >> 8).astype(np.uint8)] * 3, -1)
    for image_format in ("PNG", "TIFF"):
        np.testing.assert_array_equal(decode(encode(Image.fromarray(deep), image_format)), expected)


def test_alpha_lies_over_white() -> None:
    alpha = RNG.integers(0, 256, (20, 30), np.uint8)
    weight = alpha[..., None] / 255
    expected = RGB * weight + 255 * (1 - weight)
    got = decode(encode(Image.fromarray(np.dstack([RGB, alpha])), "PNG"))
    assert np.abs(got - expected).max() <= 1
    grey = decode(encode(Image.fromarray(np.dstack([RGB[..., 0], alpha]), "LA"), "PNG"))
    assert np.abs(grey - expected[..., :1]).max() <= 1


def test_first_frame_of_an_animation() -> None:
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    data = encode(first, "GIF", save_all=True, append_images=[second])
    np.testing.assert_array_equal(decode(data)[0, 0], [255, 0, 0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    """Against the definition in EXIF 2.32, tag 0x0112: where row 0 and column 0 of the file lie in the scene."""
    opaque = np.dstack([RGB, np.full(RGB.shape[:2], 255, np.uint8)])
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.transpose(1, 0, 2),
        6: RGB.transpose(1, 0, 2)[:, ::-1],
        7: RGB.transpose(1, 0, 2)[::-1, ::-1],
        8: RGB.transpose(1, 0, 2)[::-1],
    }[orientation]
    np.testing.assert_array_equal(decode(encode(Image.fromarray(RGB), "PNG", exif=exif)), upright)
    np.testing.assert_array_equal(decode(encode(Image.fromarray(opaque), "PNG", exif=exif)), upright)
    deep = RGB[..., 0].astype(np.uint16) << 8
    np.testing.assert_array_equal(decode(encode(Image.fromarray(deep), "PNG", exif=exif))[..., 0], upright[..., 0])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html><body>404</body></html>", "not_an_image"),
        (jpeg(0)[:200], "undecodable"),
        (encode(Image.fromarray(RGB), "PNG")[:-400], "undecodable"),
        (encode(Image.fromarray(RNG.random((4, 4), np.float32)), "TIFF"), "unsupported_mode"),
        (encode(Image.new("1", (9000, 8000)), "PNG"), "too_large"),
        (encode(Image.new("1", (30000, 30000)), "PNG"), "too_large"),
    ],
)
def test_what_gives_no_image_has_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError) as caught:
        open_rgb(data)
    assert caught.value.reason == reason
    assert reason in ImageError.REASONS


def test_an_image_of_one_row_does_not_fill_the_memory() -> None:
    data = encode(Image.new("RGB", (60000, 1)), "PNG")
    with pytest.raises(ImageError) as caught:
        Preprocess.for_size((224, 224), IMAGENET_MEAN, IMAGENET_STD)(data)
    assert caught.value.reason == "too_large"


def test_fuzzed_images_are_decoded_or_refused() -> None:
    """Random damage never raises anything but ImageError."""
    rng = np.random.default_rng(1)
    sources = [
        jpeg(0),
        *(encode(Image.fromarray(RGB), f) for f in ("PNG", "WEBP", "GIF", "TIFF", "BMP")),
        encode(Image.fromarray(RGB), "JPEG", progressive=True),
    ]
    refused = 0
    for number in range(700):
        data = bytearray(sources[number % len(sources)])
        for _ in range(rng.integers(1, 12)):
            data[rng.integers(len(data))] = rng.integers(256)
        try:
            assert decode(bytes(data)).dtype == np.uint8
        except ImageError:
            refused += 1
    assert 0 < refused < 700


@pytest.mark.parametrize("size", [(640, 480), (333, 500), (200, 200), (1000, 90), (224, 224), (30, 40)])
def test_evaluation_transform_equals_torchvision(size: tuple[int, int]) -> None:
    from torchvision import transforms

    image = Image.fromarray(RNG.integers(0, 256, (size[1], size[0], 3), np.uint8))
    for side in (224, 64):
        preprocess = Preprocess.for_size((side, side), IMAGENET_MEAN, IMAGENET_STD)
        resize = math.floor(side / 0.875) if side >= 128 else side
        assert preprocess.resize == (resize, resize)
        oracle = transforms.Compose(
            [transforms.Resize(resize, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(side)]
        )
        np.testing.assert_array_equal(preprocess.prepare(image), np.asarray(oracle(image)))


def test_reduced_decoding_is_all_but_equal() -> None:
    y, x = np.mgrid[:2000, :3000] / 100
    waves = np.stack([np.sin(x), np.sin(y), np.sin(x + y)], -1)
    data = encode(Image.fromarray((waves * 127 + 128).astype(np.uint8)), "JPEG", quality=95)
    preprocess = Preprocess.for_size((224, 224), IMAGENET_MEAN, IMAGENET_STD)
    full = preprocess.prepare(open_rgb(data)).astype(float)
    assert open_rgb(data, at_least=(512, 512)).size == (750, 500) or open_rgb(data, at_least=(512, 512)).width < 3000
    reduced = preprocess(data).astype(float)
    assert np.abs(full - reduced).mean() < 0.5


def test_preprocess_survives_json() -> None:
    import json

    preprocess = Preprocess.for_size((160, 224), IMAGENET_MEAN, IMAGENET_STD)
    assert Preprocess.from_json(json.loads(json.dumps(preprocess.to_json()))) == preprocess


def test_random_crops_follow_the_published_bounds() -> None:
    """Area within scale, aspect within 3/4 and 4/3, uniform area, inside the image."""
    areas = []
    for position in range(2000):
        draws = uniforms(22, Purpose.CROP, seed=0, position=position)
        left, top, right, bottom = random_resized_crop(640, 480, draws, scale=(0.2, 1.0))
        assert 0 <= left < right <= 640
        assert 0 <= top < bottom <= 480
        width, height = right - left, bottom - top
        assert 0.74 < width / height < 1.35
        areas.append(width * height / (640 * 480))
    assert min(areas) > 0.19
    # Crops that do not fit are drawn again, which takes from the largest areas: the mean lies below 0.6.
    assert 0.5 < np.mean(areas) < 0.6


def test_random_crop_of_a_very_long_image() -> None:
    draws = uniforms(22, Purpose.CROP, seed=0)
    left, top, right, bottom = random_resized_crop(2000, 10, draws, scale=(0.9, 1.0))
    assert (top, bottom) == (0, 10)
    assert right - left == round(10 * 4 / 3)


def test_a_crop_of_a_large_jpeg_is_decoded_small() -> None:
    """Only while it keeps the size that is asked for; upright as ever; the same picture, nearly."""
    y, x = np.mgrid[:800, :1200]
    picture = np.stack([x / 1200, y / 800, (np.sin(x / 30) + np.sin(y / 40)) / 4 + 0.5], -1)
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray((picture * 255).astype(np.uint8)).save(buffer, "JPEG", quality=95, exif=exif)
    asked: list[tuple[int, int]] = []

    def choose(box: tuple[int, int, int, int]):
        def chosen(width: int, height: int) -> tuple[int, int, int, int]:
            asked.append((width, height))
            return box

        return chosen

    for box, at_least, sizes in (
        ((40, 100, 640, 900), (200, 150), (200, 300)),  # a quarter of 600 x 800 keeps 150 x 200
        ((40, 100, 640, 900), (201, 150), (400, 600)),
        ((0, 0, 300, 300), (200, 200), (800, 1200)),
    ):
        image, small = open_crop(buffer.getvalue(), choose(box), at_least=at_least)
        assert asked[-1] == (800, 1200)
        assert image.size == sizes
        whole = open_rgb(buffer.getvalue()).crop(box).resize((64, 64), Image.Resampling.BICUBIC)
        cut = image.crop(small).resize((64, 64), Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(whole, int) - np.asarray(cut, int)).mean() < 1.5


def test_rows_of_random_numbers_do_not_depend_on_who_draws_them() -> None:
    """Any cut of a row of places gives the same numbers, for any count, and each place its own."""
    for count in (1, 22, 37):
        whole = uniform_rows(50, count, Purpose.CROP, seed=5, epoch=3, position=1000)
        parts = [
            uniform_rows(rows, count, Purpose.CROP, seed=5, epoch=3, position=start)
            for start, rows in ((1000, 1), (1001, 30), (1031, 19))
        ]
        assert np.array_equal(whole, np.concatenate(parts))
        assert len(np.unique(whole)) == whole.size
        others = uniform_rows(50, count, Purpose.CROP, seed=5, epoch=4, position=1000)
        assert not np.isin(others, whole).any()
    many = uniform_rows(2000, 3, Purpose.MASK, seed=1)
    assert abs(many.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(many[:-1, 0], many[1:, 0])[0, 1]) < 0.08


def test_random_streams() -> None:
    """Pinned: a change of these numbers would change every resumed run."""
    assert uniforms(2, Purpose.CROP, seed=1, epoch=2, position=3).tolist() == pytest.approx(PINNED)
    assert sorted(permutation(100, Purpose.SAMPLE_ORDER, seed=0)) == list(range(100))
    streams = {
        tuple(uniforms(1, purpose, seed=s, salt=t, epoch=e, position=p))
        for purpose in Purpose
        for s in range(2)
        for t in range(2)
        for e in range(2)
        for p in range(2)
    }
    assert len(streams) == len(Purpose) * 16
