"""`maekit.Embedder`: the exported encoder as a Python object, with bit-identical preprocessing."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from maekit.embedding.pipeline import embed_padded
from maekit.embedding.session import Embeddings, EncoderSession
from maekit.images import Pixels, rgb_of
from maekit.system.errors import InputError
from maekit.system.machine import cores
from maekit.system.parallel import batched

_BATCH = 16


class Embedder:
    """Embeds single images or many. May be called from several threads at once.

    Args:
        path: the ONNX file that `maekit export` wrote.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        provider_options: options of the CUDA provider that override the defaults.

    Attributes:
        dim: length of an embedding.
        provider: execution provider that runs the model.

    Raises:
        InputError: no such file, or the provider asked for does not work.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, device: str = "auto", provider_options: Mapping[str, str] | None = None
    ) -> None:
        self._session = EncoderSession(Path(path), device=device, provider_options=provider_options)
        self.dim = self._session.description.dim
        self.provider = self._session.provider

    def __call__(self, images: Any) -> Embeddings:
        """Embed one image or an iterable of images; threads decode them ahead.

        Args:
            images: each a path, an image file's bytes, a Pillow image, or uint8 `[H, W, 3]` RGB.

        Returns:
            float32 `[n, dim]`; n is 1 for a single image.

        Raises:
            ImageError: an image cannot be decoded.
            InputError: a value of another type, or a path that cannot be read.
        """
        single = isinstance(images, (str, bytes, bytearray, os.PathLike, Image.Image)) or (
            isinstance(images, np.ndarray) and images.ndim == 3
        )
        if single:
            return self._embed([self._prepare(images)])
        if not isinstance(images, Iterable):
            raise _no_image(type(images).__name__)
        parts = [self._embed(batch) for batch in batched(self._prepared(images), _BATCH)]
        return np.concatenate(parts) if parts else np.empty((0, self.dim), np.float32)

    def _embed(self, images: Sequence[Pixels]) -> Embeddings:
        pixels = np.empty((_BATCH, *images[0].shape), np.uint8)
        np.stack(images, out=pixels[: len(images)])
        return embed_padded(self._session, pixels, len(images))

    def _prepared(self, images: Iterable[Any]) -> Iterator[Pixels]:
        """Yield preprocessed images in order, decoding two batches ahead (Pillow releases the GIL)."""
        with ThreadPoolExecutor(cores(), "decode") as pool:
            flying: deque[Future[Pixels]] = deque()
            try:
                for image in images:
                    flying.append(pool.submit(self._prepare, image))
                    if len(flying) > 2 * _BATCH:
                        yield flying.popleft().result()
                while flying:
                    yield flying.popleft().result()
            finally:
                for future in flying:
                    future.cancel()

    def _prepare(self, item: Any) -> Pixels:
        preprocess = self._session.description.preprocess
        if isinstance(item, (bytes, bytearray)):
            return preprocess(bytes(item))
        if isinstance(item, (str, os.PathLike)):
            try:
                return preprocess(Path(item).read_bytes())
            except OSError as error:
                raise InputError(f"cannot read {item}: {error.strerror or error}") from error
        if isinstance(item, Image.Image):
            return preprocess.prepare(rgb_of(item))
        if isinstance(item, np.ndarray) and item.dtype == np.uint8 and item.ndim == 3 and item.shape[2] == 3:
            return preprocess.prepare(Image.fromarray(item))
        raise _no_image(f"{item.dtype} {list(item.shape)}" if isinstance(item, np.ndarray) else type(item).__name__)


def _no_image(what: str) -> InputError:
    return InputError(f"an image is a path, bytes, a Pillow image or uint8 [H, W, 3], not {what}")
