"""The proof that the written file equals the PyTorch encoder: measured on real images, at several batch sizes."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maekit.errors import ImageError, InputError, MaekitError
from maekit.images import Pixels, Preprocess
from maekit.shards.read import open_shards
from maekit.shards.spec import find_shards

BATCH_SIZES = (1, 3, 16)
FP32_LIMIT = 1e-4

Embeddings = NDArray[np.float32]


@dataclass(frozen=True)
class Parity:
    """How far two sets of embeddings of the same images are apart.

    Attributes:
        images: how many images were compared.
        batch_sizes: at which batch sizes.
        max_relative_difference: the largest difference, relative to the largest value.
        min_cosine: over all images and batch sizes.
        mean_cosine: likewise.
        provider: where the file ran.
    """

    images: int
    batch_sizes: tuple[int, ...]
    max_relative_difference: float
    min_cosine: float
    mean_cosine: float
    provider: str

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return asdict(self)


def sample_images(specs: Iterable[str], preprocess: Preprocess, count: int = max(BATCH_SIZES)) -> Pixels:
    """Return readable images spread over the shards, prepared for the model: uint8 `[count, H, W, 3]`.

    A set with fewer images gives each of them several times.

    Raises:
        InputError: no shards there, or no readable image in them.
    """
    shards = open_shards(find_shards(specs), skip_damaged=True)
    reader = shards.reader()
    images: list[Pixels] = []
    problem = ""
    # Three times as many places as images: some may hold none.
    for number in np.linspace(0, shards.samples - 1, 3 * count).astype(int)[_spread(3 * count)]:
        shard, ordinal = shards.locate(int(number))
        try:
            images.append(preprocess(reader.read_image(shards.index(shard), ordinal)))
        except ImageError as error:
            problem = str(error)
        if len(images) == count:
            break
    reader.close()
    if not images:
        raise InputError(f"no readable image in {', '.join(specs)} to compare on {problem}".rstrip())
    return np.stack([images[i % len(images)] for i in range(count)])


def _spread(count: int) -> NDArray[np.int64]:
    """Return the order 0, 3, 6, …, 1, 4, 7, …: the first third is spread over the whole."""
    return np.concatenate([np.arange(start, count, 3) for start in range(3)])


def compare(path: Path, images: Pixels, reference: Callable[[Pixels], Embeddings]) -> Parity:
    """Run the ONNX file on the CPU and compare it with a reference.

    Args:
        path: the ONNX file.
        images: uint8 `[n, H, W, 3]`.
        reference: images -> float32 `[n, D]`.

    Raises:
        MaekitError: ONNX Runtime cannot load the file, or it gives values that are not finite.
    """
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exception types have no common base
        raise MaekitError(f"ONNX Runtime cannot load what was exported: {str(error).splitlines()[0]}") from error
    expected = reference(images)
    differences, cosines = [], []
    for batch_size in BATCH_SIZES:
        parts = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
        got = np.concatenate([session.run(None, {"images": part})[0] for part in parts])
        if got.shape != expected.shape or not np.isfinite(got).all():
            raise MaekitError(f"the exported file gives {got.shape} with values that are not finite; no file written")
        differences.append(np.abs(got - expected).max() / np.abs(expected).max())
        norms = np.linalg.norm(got, axis=1) * np.linalg.norm(expected, axis=1)
        cosines.append((got * expected).sum(axis=1) / np.maximum(norms, 1e-12))
    return Parity(
        images=len(images),
        batch_sizes=BATCH_SIZES,
        max_relative_difference=float(np.max(differences)),
        min_cosine=float(np.min(cosines)),
        mean_cosine=float(np.mean(cosines)),
        provider=session.get_providers()[0],
    )
