"""`maekit.Embedder`: the exported encoder as a Python object, with the same preprocessing to the bit."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from maekit.embedding.pipeline import embed_padded
from maekit.embedding.session import Embeddings, EncoderSession
from maekit.errors import InputError
from maekit.images import Pixels, upright_rgb

_BATCH = 16


class Embedder:
    """Embeds single images or many.

    Args:
        path: the ONNX file that `maekit export` wrote.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        InputError: no such file, or the provider asked for does not work.
    """

    def __init__(self, path: str | os.PathLike[str], *, device: str = "auto") -> None:
        self._session = EncoderSession(Path(path), device=device)
        self.dim = self._session.description.dim
        self.provider = self._session.provider

    def __call__(self, images: Any) -> Embeddings:
        """Embed one image or a sequence of them.

        Args:
            images: each a path, an image file's bytes, a Pillow image, or uint8 `[H, W, 3]` RGB.

        Returns:
            float32 `[n, dim]`; n is 1 for a single image.

        Raises:
            ImageError: the bytes of an image give no image.
            InputError: a value that is none of these, or a path that cannot be read.
        """
        single = isinstance(images, (str, bytes, bytearray, os.PathLike, Image.Image)) or (
            isinstance(images, np.ndarray) and images.ndim == 3
        )
        items: Sequence[Any] = [images] if single else _listed(images)
        parts = [
            embed_padded(self._session, [self._prepare(item) for item in items[i : i + _BATCH]], _BATCH)
            for i in range(0, len(items), _BATCH)
        ]
        return np.concatenate(parts) if parts else np.empty((0, self.dim), np.float32)

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
            return preprocess.prepare(upright_rgb(item))
        if isinstance(item, np.ndarray) and item.dtype == np.uint8 and item.ndim == 3 and item.shape[2] == 3:
            return preprocess.prepare(Image.fromarray(item))
        what = f"{item.dtype} {list(item.shape)}" if isinstance(item, np.ndarray) else type(item).__name__
        raise InputError(f"an image is a path, bytes, a Pillow image or uint8 [H, W, 3], not {what}")


def _listed(images: Any) -> list[Any]:
    if not isinstance(images, Iterable):
        raise InputError(f"an image is a path, bytes, a Pillow image or uint8 [H, W, 3], not {type(images).__name__}")
    return list(images)
