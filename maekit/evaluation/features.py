"""Features for evaluation: one vector per labelled image, from any kind of MODEL.

    RUN, CHECKPOINT, timm:NAME, FILE, DIRECTORY    an encoder (maekit.pretrained.sources) in PyTorch, by pooling
    ENCODER.ONNX                                   the deployed file, in ONNX Runtime
    EMBEDDINGS                                     an output of `maekit embed`: nothing is computed
    raw pixels                                     the image, resized to 32 x 32

Threads read and preprocess images ahead. Unreadable images are left out and counted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from maekit.embedding.commit_record import CommitRecord
from maekit.embedding.inputs import TarPart
from maekit.embedding.stored import EmbeddingFolder, is_made_from
from maekit.evaluation.labelled import LabelledSet
from maekit.images import Pixels, Preprocess
from maekit.shards.cache import RemoteCache
from maekit.shards.spec import ShardFile
from maekit.system.errors import ImageError, InputError
from maekit.system.machine import cores
from maekit.system.parallel import batched
from maekit.system.progress import Progress

if TYPE_CHECKING:
    from maekit.pretrained.load import TrainedEncoder

_BATCH = 64
PIXELS = 32
# Batch sizes for exported models; on a CPU larger batches only fall out of the caches.
_CPU_BATCH, _GPU_BATCH = 8, 256

Rows = NDArray[np.float32]
Embed = Callable[[Pixels], dict[str, Rows]]


@dataclass(frozen=True)
class Features:
    """Vectors of a labelled set.

    Attributes:
        rows: float32 `[n, d]`, by name of pooling.
        kept: which samples of the set have a row, bool `[samples]`.
    """

    rows: dict[str, Rows]
    kept: NDArray[np.bool_]


def image_features(
    labelled: LabelledSet, preprocess: Preprocess, embed: Embed, what: str, progress: Progress
) -> Features:
    """Embed the images of a labelled set.

    Args:
        labelled: the set.
        preprocess: preprocessing of the images.
        embed: uint8 `[b, H, W, 3]` -> float32 `[b, d]`, by name of pooling.
        what: name of the work, for progress updates.
        progress: receives progress updates.

    Raises:
        InputError: none of the images can be read.
    """
    kept = np.zeros(len(labelled.numbers), bool)
    parts: list[dict[str, Rows]] = []
    problem = ""
    progress.start(what, len(kept))
    try:
        numbers = labelled.numbers.tolist()
        found = labelled.shards.images(numbers, preprocess, threads=cores())
        for batch in batched(enumerate(found), _BATCH):
            good = [(place, image) for place, image in batch if not isinstance(image, ImageError)]
            for place, image in batch:
                if isinstance(image, ImageError):
                    problem = f"{' '.join(labelled.shards.name(numbers[place]))}: {image}"
            if good:
                kept[[place for place, _ in good]] = True
                parts.append(embed(np.stack([image for _, image in good])))
            progress.advance(batch[-1][0] + 1)
    finally:
        progress.stop()
    if not parts:
        raise InputError(f"none of {len(kept)} labelled images can be read: {problem}")
    return Features({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, kept)


def pixel_features(labelled: LabelledSet, progress: Progress) -> Features:
    """Return the pixels of the images resized to 32 x 32, in [-1, 1]."""
    preprocess = Preprocess.for_size((PIXELS, PIXELS), (0.5,) * 3, (0.5,) * 3)

    def embed(images: Pixels) -> dict[str, Rows]:
        return {"pixels": images.reshape(len(images), -1).astype(np.float32) / 127.5 - 1}

    return image_features(labelled, preprocess, embed, "raw pixels", progress)


class TorchEncoder:
    """An encoder in PyTorch, fp32.

    Args:
        trained: the encoder.
        pools: poolings to compute; empty means all that the encoder has of one token or one mean.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        InputError: the encoder has no such pooling, or the device does not exist.
    """

    def __init__(self, trained: "TrainedEncoder", pools: tuple[str, ...], device: str) -> None:
        import torch

        from maekit.mae.device import choose_device
        from maekit.mae.kernels import choose_kernels
        from maekit.mae.normalize import Normalizer
        from maekit.mae.pooling import check_pooling, poolings_of

        encoder = trained.encoder
        for pool in pools:
            check_pooling(encoder, pool)
        self._torch = torch
        self._device = torch.device(choose_device(device))
        self._encoder, self._pools = encoder.eval().to(self._device), pools or poolings_of(encoder)
        self._normalizer = Normalizer(
            trained.preprocess.mean,
            trained.preprocess.std,
            self._device,
            channels=encoder.patch_embed.proj.weight.shape[1],
        )
        self._context = choose_kernels(encoder, self._device, "fp32")
        self.preprocess = trained.preprocess

    def __call__(self, images: Pixels) -> dict[str, Rows]:
        """Embed uint8 `[b, H, W, 3]`."""
        from maekit.mae.device import device_errors
        from maekit.mae.pooling import pooled

        with device_errors(), self._torch.no_grad(), self._context():
            pixels = self._torch.from_numpy(images).permute(0, 3, 1, 2).to(self._device)
            tokens = self._encoder.forward_features(self._normalizer(pixels))
            return {name: pooled(self._encoder, tokens, name).float().cpu().numpy() for name in self._pools}


class ExportedEncoder:
    """An exported file in ONNX Runtime.

    Args:
        path: the file.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        InputError: it is no exported file, or does not run here.
    """

    def __init__(self, path: Path, device: str) -> None:
        from maekit.embedding.session import EncoderSession
        from maekit.providers import CPU

        self._session = EncoderSession(path, device=device)
        about = self._session.description
        self._batch = _CPU_BATCH if self._session.provider == CPU else _GPU_BATCH
        self.preprocess, self.is_whitened = about.preprocess, about.whitened
        self.name = f"{about.pool}{', whitened,' if about.whitened else ''} as exported"

    def __call__(self, images: Pixels) -> dict[str, Rows]:
        """Embed uint8 `[b, H, W, 3]`."""
        from maekit.embedding.pipeline import embed_padded

        buffer = np.empty((self._batch, *images.shape[1:]), np.uint8)
        parts = []
        for start in range(0, len(images), self._batch):
            part = images[start : start + self._batch]
            buffer[: len(part)] = part
            parts.append(embed_padded(self._session, buffer, len(part)))
        return {self.name: np.concatenate(parts)}


def stored_features(labelled: LabelledSet, folder: EmbeddingFolder, name: str) -> Features:
    """Return the stored rows of a labelled set; shards are matched by content.

    Args:
        labelled: the set.
        folder: the stored embeddings.
        name: name of the setting that gave the set, for messages.

    Raises:
        InputError: a shard was not embedded, or none of its labelled images has a row.
        MaekitError: a file is missing or damaged.
    """
    kept = np.zeros(len(labelled.numbers), bool)
    parts: list[Rows] = []
    places = np.array([labelled.shards.locate(int(number)) for number in labelled.numbers], np.int64)
    for shard in np.unique(places[:, 0]).tolist():
        file = labelled.shards.shards[shard]
        record = _record_of(folder, file, labelled.shards.index(shard).digest, labelled.shards.remote)
        if record is None:
            raise InputError(
                f"{folder.path} has no embeddings of {file.url or file.path} (`{name}`); embed it into the same `out`, "
                "or name the shards that were embedded"
            )
        if not record.rows:
            continue
        embedded = folder.read(record)
        mine = np.flatnonzero(places[:, 0] == shard)
        at = np.searchsorted(embedded.ordinals, ordinals := places[mine, 1])
        there = embedded.ordinals[np.minimum(at, len(embedded.ordinals) - 1)] == ordinals
        kept[mine[there]] = True
        parts.append(embedded.vectors[at[there]])
    if not kept.any():
        raise InputError(f"{folder.path}: none of the labelled images of `{name}` has an embedding")
    return Features({"embeddings": np.concatenate(parts)}, kept)


def _record_of(
    folder: EmbeddingFolder, file: ShardFile, digest: str, remote: RemoteCache | None
) -> CommitRecord | None:
    """Return the record of a shard's embeddings, even if the shard has moved since."""
    part = TarPart(file)
    records = [record for record in folder.records if record.input_digest == digest]
    if not records:
        return None
    images = part.open(remote or RemoteCache())
    try:
        records.sort(key=lambda record: record.shard != part.name)
        return next((record for record in records if is_made_from(record, part, images)), None)
    finally:
        images.close()
