"""Features for evaluation: one vector per labelled image, from any kind of MODEL.

    RUN, CHECKPOINT, timm:NAME, FILE, DIRECTORY    an encoder (maekit.pretrained.sources) in PyTorch, by pooling
    ENCODER.ONNX                                   the deployed file, in ONNX Runtime
    EMBEDDINGS                                     an output of `maekit embed`: nothing is computed
    raw pixels                                     the image, resized to 32 x 32

Threads read and preprocess images ahead. Unreadable images are left out and counted.
"""

import contextlib
import copy
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from maekit import runs
from maekit.config.evaluate import ALL_LAYERS, EvaluateConfig
from maekit.config.poolings import at_layer
from maekit.embedding.commit_record import CommitRecord
from maekit.embedding.inputs import TarPart
from maekit.embedding.stored import EmbeddingFolder, is_embeddings, is_made_from
from maekit.evaluation.labelled import LabelledSet
from maekit.images import Pixels, Preprocess
from maekit.shards.cache import RemoteCache
from maekit.shards.spec import ShardFile
from maekit.system.errors import ImageError, InputError, MaekitError
from maekit.system.machine import cores
from maekit.system.parallel import batched
from maekit.system.progress import Progress
from maekit.vectors.nearest import Rows

if TYPE_CHECKING:
    from maekit.pretrained.load import TrainedEncoder

_BATCH = 64
RAW_PIXELS, PIXELS = "raw pixels", 32
# Batch sizes for exported models; on a CPU larger batches only fall out of the caches.
_CPU_BATCH, _GPU_BATCH = 8, 256


@dataclass(frozen=True)
class Features:
    """Vectors of a labelled set.

    Attributes:
        rows: float32 `[n, d]`, by name.
        kept: which samples of the set have a row, bool `[samples]`.
        are_whitened: whether the encoder has whitened the rows.
    """

    rows: dict[str, Rows]
    kept: NDArray[np.bool_]
    are_whitened: bool = False


def image_features(labelled: LabelledSet, encoder: "Encoder", what: str, progress: Progress) -> Features:
    """Embed the images of a labelled set.

    Args:
        labelled: the set.
        encoder: embeds the images.
        what: name of the work, for progress updates.
        progress: receives progress updates.

    Raises:
        InputError: none of the images can be read.
        MaekitError: an embedding is not finite.
    """
    kept = np.zeros(len(labelled.numbers), bool)
    numbers = labelled.numbers.tolist()
    parts: list[dict[str, Rows]] = []
    problem = ""
    progress.start(what, len(kept))
    try:
        found = labelled.shards.images(numbers, encoder.preprocess, threads=cores())
        for batch in batched(enumerate(found), _BATCH):
            images = []
            for at, image in batch:
                if isinstance(image, ImageError):
                    problem = f"{' '.join(labelled.shards.name(numbers[at]))}: {image}"
                else:
                    images.append(image)
                    kept[at] = True
            if images:
                parts.append(encoder(np.stack(images)))
                for name, embeddings in parts[-1].items():
                    if not np.isfinite(embeddings).all():
                        raise MaekitError(f"{name}: the model gives values that are not finite")
            progress.advance(batch[-1][0] + 1)
    finally:
        progress.stop()
    if not parts:
        raise InputError(f"none of {len(kept)} labelled images can be read: {problem}")
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Features(rows, kept, encoder.is_whitened)


class PixelEncoder:
    """The pixels of the images resized to 32 x 32, in [-1, 1]."""

    is_whitened = False

    def __init__(self) -> None:
        self.preprocess = Preprocess.for_size((PIXELS, PIXELS), (0.5,) * 3, (0.5,) * 3)

    def __call__(self, images: Pixels) -> dict[str, Rows]:
        """Flatten uint8 `[b, H, W, 3]`."""
        return {RAW_PIXELS: images.reshape(len(images), -1).astype(np.float32) / 127.5 - 1}


class TorchEncoder:
    """An encoder in PyTorch, fp32.

    Args:
        trained: the encoder.
        pools: poolings to compute; empty means all that the encoder has of one token or one mean.
        device: `auto`, `cpu` or `cuda`.
        layers: blocks whose outputs are pooled, with and without the final norm, or `all`; empty means the last.
        prefix: precedes the pooling in the name of the rows.

    Raises:
        InputError: the encoder has no such pooling, or the device does not exist.
    """

    is_whitened = False

    def __init__(
        self,
        trained: "TrainedEncoder",
        pools: tuple[str, ...],
        device: str,
        *,
        layers: tuple[str, ...] = (),
        prefix: str = "",
    ) -> None:
        import torch

        from maekit.mae.device import choose_device
        from maekit.mae.kernels import choose_kernels
        from maekit.mae.normalize import Normalizer
        from maekit.mae.pooling import check_pooling, poolings_of

        self._pools = _at_layers(pools or poolings_of(trained.encoder), layers, len(trained.encoder.blocks))
        for pool in self._pools:
            check_pooling(trained.encoder, pool)
        self._torch, self._device = torch, torch.device(choose_device(device))
        self._encoder, self._prefix = trained.encoder.eval().to(self._device), prefix
        self.preprocess = trained.preprocess
        channels = trained.encoder.patch_embed.proj.weight.shape[1]
        self._normalizer = Normalizer(self.preprocess.mean, self.preprocess.std, self._device, channels=channels)
        self._context = choose_kernels(trained.encoder, self._device, "fp32")

    def __call__(self, images: Pixels) -> dict[str, Rows]:
        """Embed uint8 `[b, H, W, 3]`."""
        from maekit.mae.device import device_errors
        from maekit.mae.pooling import pooled, tokens_by_layer

        with device_errors(), self._torch.no_grad(), self._context():
            pixels = self._torch.from_numpy(images).permute(0, 3, 1, 2).to(self._device)
            tokens = tokens_by_layer(self._encoder, self._normalizer(pixels), self._pools)
            rows = {pool: pooled(self._encoder, tokens, pool) for pool in self._pools}
            return {f"{self._prefix}{pool}": vectors.float().cpu().numpy() for pool, vectors in rows.items()}


def _at_layers(pools: Sequence[str], layers: Sequence[str], depth: int) -> list[str]:
    """Return the poolings at each of the layers, with and without the final norm."""
    if not layers:
        return list(pools)
    numbers = range(1, depth + 1) if ALL_LAYERS in layers else sorted(set(map(int, layers)))
    found = [at_layer(pool, n, is_normed=normed) for n in numbers for normed in (True, False) for pool in pools]
    return list(dict.fromkeys(found))  # parts that name a layer stay as they are


class ExportedEncoder:
    """An exported file in ONNX Runtime.

    Args:
        path: the file.
        device: `auto`, `cpu` or `cuda`.
        name: name of the rows; None describes how the file pools.

    Raises:
        InputError: it is no exported file, or does not run here.
    """

    def __init__(self, path: Path, device: str, name: str | None = None) -> None:
        from maekit.embedding.session import EncoderSession
        from maekit.providers import runs_on_cpu

        self._session = EncoderSession(path, device=device)
        about = self._session.description
        self._batch = _CPU_BATCH if runs_on_cpu(self._session.provider) else _GPU_BATCH
        self.preprocess, self.is_whitened = about.preprocess, about.whitened
        self.name = name or f"{about.pool}{', whitened,' if about.whitened else ''} as exported"

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


# Each has the preprocessing of its images, and says whether its vectors are whitened.
Encoder = PixelEncoder | TorchEncoder | ExportedEncoder


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
    shards, ordinals = np.array([labelled.shards.locate(int(number)) for number in labelled.numbers], np.int64).T
    for shard in np.unique(shards).tolist():
        file = labelled.shards.shards[shard]
        record = _record_of(folder, file, labelled.shards.index(shard).digest, labelled.shards.remote)
        if record is None:
            raise InputError(
                f"{folder.path} has no embeddings of {file.where} (`{name}`); embed it into the same `out`, "
                "or name the shards that were embedded"
            )
        if not record.rows:
            continue
        embedded = folder.read(record)
        mine = np.flatnonzero(shards == shard)
        rows = np.searchsorted(embedded.ordinals, ordinals[mine])
        there = embedded.ordinals[np.minimum(rows, len(embedded.ordinals) - 1)] == ordinals[mine]
        kept[mine[there]] = True
        parts.append(embedded.vectors[rows[there]])
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
    records.sort(key=lambda record: record.shard != part.name)
    with contextlib.closing(part.open(remote or RemoteCache())) as images:
        return next((record for record in records if is_made_from(record, part, images)), None)


class Subject:
    """The model to evaluate, and its baselines: stored embeddings, an exported file, or an encoder with weights.

    Attributes:
        run: the run it belongs to, or None.
        step: training step of its weights, or None.

    Raises:
        InputError: no such model, or a setting that is not for it.
    """

    def __init__(self, config: EvaluateConfig, progress: Progress) -> None:
        self._config, self._progress = config, progress
        self.run: runs.RunDirectory | None = None
        self.step: int | None = None
        self._folder: EmbeddingFolder | None = None
        self._trained: TrainedEncoder | None = None
        # The model as it is, with a name for progress updates; none for embeddings.
        self._encoders: list[tuple[str, Encoder]] = []
        path = Path(config.model)
        if is_embeddings(path):
            _refuse_options(config, "embeddings")
            if config.device == "cuda":
                raise InputError(f"`device` = cuda: {path} is embeddings, which are judged where they are")
            self._folder = EmbeddingFolder(path)
        elif path.suffix == ".onnx":
            _refuse_options(config, "an exported file")
            self._encoders = [(path.name, ExportedEncoder(path, config.device))]
        else:
            from maekit.pretrained.load import load_encoder

            self._trained = load_encoder(config.model, model=config.architecture, on_note=progress.note)
            encoder = TorchEncoder(self._trained, config.pool, config.device, layers=config.layers)
            self._encoders = [("embed", encoder)]
            if self._trained.provenance.get("source") == "run":
                self.run, _ = runs.find_checkpoint(path)
                self.step = int(self._trained.provenance["step"])

    def features(self, sets: Sequence[LabelledSet]) -> Iterator[list[Features]]:
        """Yield the features of each set, baselines first."""
        stored = []
        if self._folder:  # read first, so that missing embeddings fail before the baselines are computed
            stored = [stored_features(s, self._folder, n) for s, n in zip(sets, ("train", "test"), strict=False)]
        for what, encoder in self._all_encoders(sets[0]):
            yield [image_features(labelled, encoder, what, self._progress) for labelled in sets]
        if stored:
            yield stored

    def _all_encoders(self, train: LabelledSet) -> Iterator[tuple[str, Encoder]]:
        """Yield the encoders to evaluate, baselines first, each with a name for progress updates."""
        if self._config.baselines:
            yield RAW_PIXELS, PixelEncoder()
        if self._config.baselines and self._trained:
            yield "untrained", self._untrained(self._trained)
        for precision in self._config.precisions:
            if precision == "fp32" or self._trained is None:
                yield from self._encoders
            else:
                yield from self._exported(self._trained, precision, train)

    def _untrained(self, trained: "TrainedEncoder") -> TorchEncoder:
        """Return the same encoder with freshly initialised weights."""
        from maekit.mae.autoencoder import initialize_encoder

        fresh = dataclasses.replace(trained, encoder=copy.deepcopy(trained.encoder))
        initialize_encoder(fresh.encoder, seed=self._config.seed)
        return TorchEncoder(fresh, self._config.pool, self._config.device, prefix="untrained ")

    def _exported(
        self, trained: "TrainedEncoder", precision: Literal["fp16", "int8"], train: LabelledSet
    ) -> Iterator[tuple[str, ExportedEncoder]]:
        """Yield the encoder exported in a precision, with each pooling; the training images calibrate it."""
        from maekit.config.export import ExportConfig
        from maekit.exporters.export import export
        from maekit.mae.pooling import poolings_of

        specs = tuple(str(file.url or file.path) for file in train.shards.shards)
        with tempfile.TemporaryDirectory(prefix="maekit-") as folder:
            for pool in self._config.pool or poolings_of(trained.encoder):
                path = Path(folder) / f"{pool}-{precision}.onnx"
                # `force`: evaluate the file even if it fails the check of the export; its quality is the question here.
                config = ExportConfig(
                    self._config.model,
                    str(path),
                    pool=pool,
                    precision=precision,
                    normalize=False,
                    parity=specs,
                    model=self._config.architecture,
                    force=True,
                )
                if warning := export(config, self._progress).warning:
                    self._progress.note(f"{pool}, {precision}: {warning}")
                yield precision, ExportedEncoder(path, self._config.device, f"{pool}, {precision}")


def _refuse_options(config: EvaluateConfig, what: str) -> None:
    """Refuse settings that only a model with weights has."""
    model = config.model
    if config.pool:
        raise InputError(f"`pool` = {config.pool[0]}: {model} is {what}, pooled already")
    if config.architecture:
        raise InputError(f"`architecture` = {config.architecture}: {model} is {what}, and needs no architecture")
    if config.layers:
        raise InputError(f"`layers` = {config.layers[0]}: {model} is {what}, which has one")
    if config.precisions != ("fp32",):
        raise InputError(
            f"`precisions` = {config.precisions[0]} is for models with weights; {model} is judged as it is"
        )
