"""`maekit.Embedder`: the exported encoder as a Python object, with bit-identical preprocessing."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maekit.embedding.pipeline import embed_padded
from maekit.embedding.session import Embeddings, EncoderSession, Precision, Runtime
from maekit.images import Pixels, rgb_of
from maekit.system.errors import ImageError, InputError, UnusableImage
from maekit.system.machine import cores
from maekit.system.parallel import batched

_BATCH = 16


@dataclass(frozen=True)
class Embedded:
    """What `on_error="skip"` returns.

    Attributes:
        embeddings: float32 `[m, dim]`, of the images that have one, in order.
        index: position of each row's image among those given, int64 `[m]`.
        errors: why each of the other images has none, in order; each error has `index`, `path` and `reason`.
    """

    embeddings: Embeddings
    index: NDArray[np.int64]
    errors: list[ImageError]


@dataclass(frozen=True)
class _Image:
    """An image on its way: its position among those given, its path, and its pixels or why there are none."""

    index: int
    path: str | None
    pixels: Pixels | ImageError


class Embedder:
    """Embeds single images or many. May be called from several threads at once, and used in other processes.

    Pickled or copied deeply, it is its path and its options, and opens the file again on the other side. After a fork
    it opens the file anew at its first call. Both refuse a file that has changed.

    Args:
        path: the ONNX file that `maekit export` wrote.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        provider_options: options of the CUDA provider that override the defaults.
        runtime: `auto`, `onnxruntime` or `openvino`, as for `maekit embed`.
        precision: `fp32`, as the file says; or `bf16`, in OpenVINO.

    Raises:
        InputError: no such file, or the provider or runtime asked for does not work.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        device: str = "auto",
        provider_options: Mapping[str, str] | None = None,
        runtime: Runtime = "auto",
        precision: Precision = "fp32",
    ) -> None:
        self._session = EncoderSession(
            Path(path), device=device, provider_options=provider_options, runtime=runtime, precision=precision
        )

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return self._session.description.dim

    @property
    def provider(self) -> str:
        """Execution provider of ONNX Runtime that runs the model, or `OpenVINO`."""
        return self._session.provider

    @property
    def sha256(self) -> str:
        """SHA-256 of the file that was loaded, hexadecimal; outputs of `maekit embed` hold the same."""
        return self._session.description.sha256

    @overload
    def __call__(self, images: Any, *, on_error: Literal["raise"] = "raise") -> Embeddings: ...

    @overload
    def __call__(self, images: Any, *, on_error: Literal["skip"]) -> Embedded: ...

    def __call__(self, images: Any, *, on_error: Literal["raise", "skip"] = "raise") -> Embeddings | Embedded:
        """Embed one image or an iterable of images; threads decode them ahead.

        Args:
            images: each a path, an image file's bytes, a Pillow image, or uint8 `[H, W, 3]` RGB.
            on_error: `raise` the error of the first image that has no embedding, or `skip` such images.

        Returns:
            float32 `[n, dim]`; n is 1 for a single image. With `skip`, an `Embedded`.

        Raises:
            ImageError: an image cannot be decoded or read, is no image, or its embedding is not finite; its `index`,
                `path` and `reason` say which image it is, and why. Paths that cannot be read, and what is no image, are
                an InputError as well.
            InputError: `images` is neither an image nor an iterable.
        """
        if on_error not in ("raise", "skip"):
            raise InputError(f"on_error {on_error!r}: must be raise or skip")
        single = isinstance(images, (str, bytes, bytearray, os.PathLike, Image.Image)) or (
            isinstance(images, np.ndarray) and images.ndim in (2, 3) and images.dtype.kind in "uifb"
        )
        if not single and not isinstance(images, Iterable):
            raise InputError(_no_image(type(images).__name__))
        prepared = iter([self._prepare(0, images)]) if single else self._prepared(images)
        found = Embedded(np.empty((0, self.dim), np.float32), np.empty(0, np.int64), [])
        parts = [(found.embeddings, found.index)]
        for batch in batched(_without_errors(prepared, found.errors, on_error), _BATCH):
            rows = self._embed([image.pixels for image in batch])
            is_finite = np.atleast_1d(np.isfinite(rows).all(axis=1))
            for image in (image for image, fine in zip(batch, is_finite, strict=True) if not fine):
                error = ImageError("not_finite", "the model gives values that are not finite", image.index, image.path)
                _refuse(error, found.errors, on_error)
            index = np.array([image.index for image in batch], np.int64)
            parts.append((rows[is_finite], index[is_finite]))
        embeddings, index = (np.concatenate(column) for column in zip(*parts, strict=True))
        if on_error == "raise":
            return embeddings
        return Embedded(embeddings, index, sorted(found.errors, key=lambda error: error.index or 0))

    def _embed(self, images: Sequence[Any]) -> Embeddings:
        pixels = np.empty((_BATCH, *images[0].shape), np.uint8)
        np.stack(images, out=pixels[: len(images)])
        return embed_padded(self._session, pixels, len(images))

    def _prepared(self, images: Iterable[Any]) -> Iterator[_Image]:
        """Yield preprocessed images in order, decoding two batches ahead (Pillow releases the GIL)."""
        with ThreadPoolExecutor(cores(), "decode") as pool:
            flying: deque[tuple[Any, Future[_Image]]] = deque()
            try:
                for index, image in enumerate(images):
                    if isinstance(image, Image.Image):  # given twice, it must not be read by two threads at once
                        wait([future for other, future in flying if other is image])
                    flying.append((image, pool.submit(self._prepare, index, image)))
                    if len(flying) > 2 * _BATCH:
                        yield flying.popleft()[1].result()
                while flying:
                    yield flying.popleft()[1].result()
            finally:
                for _, future in flying:
                    future.cancel()

    def _prepare(self, index: int, item: Any) -> _Image:
        path = (getattr(item, "filename", None) or None) if isinstance(item, Image.Image) else item
        path = os.fsdecode(path) if isinstance(path, (str, os.PathLike)) else None
        try:
            return _Image(index, path, self._pixels(item))
        except ImageError as error:
            return _Image(index, path, type(error)(error.reason, error.detail, index, path))

    def _pixels(self, item: Any) -> Pixels:
        """Return the preprocessed pixels of one image.

        Raises:
            ImageError: there are none.
        """
        preprocess = self._session.description.preprocess
        if isinstance(item, (bytes, bytearray)):
            return preprocess(bytes(item))
        if isinstance(item, (str, os.PathLike)):
            try:
                data = Path(item).read_bytes()
            except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
                raise UnusableImage(
                    "unreadable", f"cannot be read: {getattr(error, 'strerror', None) or error}"
                ) from error
            return preprocess(data)
        if isinstance(item, Image.Image):
            return preprocess.prepare(rgb_of(item))
        if isinstance(item, np.ndarray) and item.dtype == np.uint8 and item.ndim == 3 and item.shape[2] == 3:
            if not item.size:
                raise ImageError("empty", f"{item.shape[1]} x {item.shape[0]} pixels")
            return preprocess.prepare(Image.fromarray(item))
        what = f"{item.dtype} {list(item.shape)}" if isinstance(item, np.ndarray) else type(item).__name__
        raise UnusableImage("not_an_image", _no_image(what))


def _without_errors(images: Iterable[_Image], errors: list[ImageError], on_error: str) -> Iterator[_Image]:
    """Yield the images that have pixels."""
    for image in images:
        if isinstance(image.pixels, ImageError):
            _refuse(image.pixels, errors, on_error)
        else:
            yield image


def _refuse(error: ImageError, errors: list[ImageError], on_error: str) -> None:
    if on_error == "raise":
        raise error
    errors.append(error)


def _no_image(what: str) -> str:
    return f"an image is a path, bytes, a Pillow image or uint8 [H, W, 3], not {what}"
