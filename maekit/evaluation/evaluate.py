"""`maekit evaluate knn|linear|retrieval`: labelled shards -> features -> scores, for a model and its baselines."""

import copy
import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from maekit import runs
from maekit.config.evaluate import EvaluateConfig
from maekit.embedding.stored import EmbeddingFolder, is_embeddings
from maekit.evaluation.features import (
    Embed,
    ExportedEncoder,
    Features,
    TorchEncoder,
    image_features,
    pixel_features,
    stored_features,
)
from maekit.evaluation.labelled import LabelledSet, by_name, classes_of, encode, open_labelled
from maekit.evaluation.retrieval import retrieval_scores
from maekit.images import Preprocess
from maekit.system import files
from maekit.system.errors import InputError, MaekitError
from maekit.system.progress import Progress, Silent
from maekit.vectors.knn import knn_accuracies

if TYPE_CHECKING:
    from maekit.pretrained.load import TrainedEncoder

# Directions of raw pixels after the first 64 are noise; whitened pixels score better without them.
_PIXEL_DIM = 64
_ONNX = ".onnx"
_WHITENED = "whitened already"
# Images per direction that a whitening needs; with fewer it overfits to these images.
_PER_DIRECTION = 10
_BLOCK = 4096

Embedding = ExportedEncoder | TorchEncoder | None
Rows = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class EvaluateResult:
    """Result of an evaluation; `--json` prints it.

    Attributes:
        task: `knn`, `linear` or `retrieval`.
        model: the model, as given.
        step: training step of a run or checkpoint; None for any other model.
        train: the training set: shards, damaged (left out), samples, images, classes, unlabelled, unreadable.
        test: the test set, with the same fields; None if each training image searches among the others.
        rows: one row per kind of embedding: `name`, `dim`, and its scores.
        options: settings of the evaluation.
        path: file of this result in the run; None for any other model.
    """

    task: str
    model: str
    step: int | None
    train: dict[str, Any]
    test: dict[str, Any] | None
    rows: list[dict[str, Any]]
    options: dict[str, Any]
    path: str | None = None


def evaluate(config: EvaluateConfig, progress: Progress | None = None) -> EvaluateResult:
    """Evaluate embeddings on labelled shards.

    Args:
        config: the task, the model and the images.
        progress: receives progress updates.

    Raises:
        InputError: no such model, no labels, or impossible settings.
        MaekitError: a failure during the evaluation.
    """
    progress = progress or Silent()
    config.validate()
    task, train, test = config.task, config.train, config.test
    if not test and task != "retrieval":
        raise InputError(f"evaluate {task} needs `test`, labelled shards")
    if not test and config.test_images is not None:
        raise InputError(f"`test_images` = {config.test_images}: is for `test`, which was not given")
    subject = _Subject(config, progress)
    sets = [open_labelled(train, "train", progress, images=config.train_images)]
    if test:
        sets.append(open_labelled(test, "test", progress, images=config.test_images))
    sets = by_name(sets)
    classes = classes_of(sets[0].texts)
    if len(classes) < 2:
        raise InputError(f"`train` {' '.join(train)}: all images are of one class, {classes[0][:60]!r}")
    unknown = sorted(set(sets[-1].texts) - set(classes))
    if unknown:
        progress.note(
            f"`test` has {len(unknown)} classes that `train` has not, such as {unknown[0][:60]!r}: never right"
        )
    lacking = [labelled.unlabelled for labelled in sets]
    if any(lacking):
        said = " and ".join(map(str, lacking))
        progress.note(f"without a label, and left out: {said} samples ({'`train` and `test`' if test else '`train`'})")
    _check_counts(task, sets)
    judge = _Judge(config, classes, sets, progress)
    rows = [row for what, features in subject.features(sets) for row in judge(what, features)]
    summaries = [
        {**labelled.summary(classes), "unreadable": unreadable}
        for labelled, unreadable in zip(sets, subject.unreadable, strict=True)
    ]
    asked = config.options()
    result = EvaluateResult(task, config.model, subject.step, summaries[0], summaries[1] if test else None, rows, asked)
    if subject.run is None or subject.step is None:
        return result
    # Other images or settings make another evaluation, which is stored in its own file.
    digest = hashlib.sha256(json.dumps([list(train), list(test), asked]).encode()).hexdigest()[:6]
    path = subject.run.evaluation(f"{task}-{digest}", subject.step)
    try:
        path.parent.mkdir(exist_ok=True)
        files.write_atomically(path, json.dumps({**asdict(result), "path": str(path)}, indent=1).encode())
    except (OSError, MaekitError) as error:
        progress.note(f"not kept in the run: {error}")
        return result
    return EvaluateResult(**{**asdict(result), "path": str(path)})


def _check_counts(task: str, sets: Sequence[LabelledSet]) -> None:
    """Refuse sets that cannot be evaluated, before any image is decoded.

    Raises:
        InputError: too few images to hold any out, or no query has another image of its class.
    """
    if task == "linear":
        from maekit.evaluation.linear import held_out_rows

        held_out_rows(len(sets[0].texts))
    if task == "retrieval":
        there = Counter(sets[0].texts)
        if not any(there[text] > (len(sets) == 1) for text in sets[-1].texts):
            raise InputError("no query has an image of its class to find")


class _Subject:
    """The model to evaluate, and its baselines.

    Attributes:
        run: the run it belongs to, or None.
        step: training step of its weights, or None.
        unreadable: number of images of each set without an embedding; known once all features are computed.
    """

    def __init__(self, config: EvaluateConfig, progress: Progress) -> None:
        self._config, self._progress = config, progress
        model, options = config.model, config
        self.run: runs.RunDirectory | None = None
        self.step: int | None = None
        self.unreadable: list[int] = []
        path = Path(model)
        self._folder = EmbeddingFolder(path) if is_embeddings(path) else None
        self._is_exported = path.suffix == _ONNX
        if self._folder or self._is_exported:
            what = "embeddings" if self._folder else "an exported file"
            if options.pool:
                raise InputError(f"`pool` = {options.pool[0]}: {model} is {what}, pooled already")
            if options.architecture:
                raise InputError(
                    f"`architecture` = {options.architecture}: {model} is {what}, and needs no architecture"
                )
            if self._folder and options.device == "cuda":
                raise InputError(f"`device` = cuda: {model} is embeddings, which are judged where they are")
            if options.precisions != ("fp32",):
                raise InputError(
                    f"`precisions` = {options.precisions[0]} is for models with weights; {model} is judged as it is"
                )
            self._trained: TrainedEncoder | None = None
            self._encoder: Embedding = ExportedEncoder(path, options.device) if self._is_exported else None
            return
        from maekit.pretrained.load import load_encoder

        self._trained = load_encoder(model, model=options.architecture, on_note=progress.note)
        self._encoder = TorchEncoder(self._trained, options.pool, options.device)
        if self._trained.provenance.get("source") == "run":
            self.run, _ = runs.find_checkpoint(path)
            self.step = int(self._trained.provenance["step"])

    def features(self, sets: Sequence[LabelledSet]) -> Iterator[tuple[str, list[Features]]]:
        """Yield (what the features are, features of each set), baselines first."""
        progress, stored = self._progress, None
        if self._folder is not None:  # read first, so that missing embeddings fail before the baselines are computed
            names = ("train", "test")
            stored = [stored_features(s, self._folder, name) for s, name in zip(sets, names, strict=False)]
        if self._config.baselines:
            yield "raw pixels", [pixel_features(labelled, progress) for labelled in sets]
        if stored is not None:
            self._count(stored)
            yield "", stored
            return
        encoder = self._encoder
        assert encoder is not None
        if self._trained is None:
            is_whitened = isinstance(encoder, ExportedEncoder) and encoder.is_whitened
            what = _WHITENED if is_whitened else ""
            yield what, self._embedded(sets, encoder.preprocess, encoder, Path(self._config.model).name)
            return
        if self._config.baselines:
            yield "untrained", self._of_untrained(self._trained, sets)
        for precision in self._config.precisions:
            if precision == "fp32":
                yield "", self._embedded(sets, encoder.preprocess, encoder, "embed")
            else:
                yield from self._of_precision(self._trained, precision, sets)

    def _of_untrained(self, trained: "TrainedEncoder", sets: Sequence[LabelledSet]) -> list[Features]:
        """Return the features of the same encoder with freshly initialised weights."""
        import dataclasses

        from maekit.mae.autoencoder import initialize_encoder

        fresh = dataclasses.replace(trained, encoder=copy.deepcopy(trained.encoder))
        initialize_encoder(fresh.encoder, seed=self._config.seed)
        encoder = TorchEncoder(fresh, self._config.pool, self._config.device)
        return self._embedded(sets, encoder.preprocess, encoder, "untrained")

    def _of_precision(
        self, trained: "TrainedEncoder", precision: Literal["fp16", "int8"], sets: Sequence[LabelledSet]
    ) -> Iterator[tuple[str, list[Features]]]:
        """Export in a precision and embed with the exported file."""
        from maekit.config.export import ExportConfig
        from maekit.exporters.export import export
        from maekit.mae.pooling import poolings_of

        specs = tuple(str(file.url or file.path) for file in sets[0].shards.shards)
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
                encoder = ExportedEncoder(path, self._config.device)
                features = self._embedded(sets, encoder.preprocess, encoder, precision)
                yield precision, [Features({pool: rows}, f.kept) for f in features for rows in f.rows.values()]

    def _embedded(self, sets: Sequence[LabelledSet], preprocess: Preprocess, embed: Embed, what: str) -> list[Features]:
        features = [image_features(labelled, preprocess, embed, what, self._progress) for labelled in sets]
        self._count(features)
        return features

    def _count(self, features: Sequence[Features]) -> None:
        self.unreadable = [int((~part.kept).sum()) for part in features]
        if any(self.unreadable):
            said = " and ".join(f"{count} of {len(p.kept)}" for count, p in zip(self.unreadable, features, strict=True))
            self._progress.note(f"without an embedding, and left out: {said} labelled images (`train` and `test`)")


class _Judge:
    """Scores features on a task.

    Args:
        config: the task and its settings.
        classes: classes of the training set.
        sets: the training set, and the test set if there is one.
        progress: receives warnings about unreliable scores.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        classes: Sequence[str],
        sets: Sequence[LabelledSet],
        progress: Progress,
    ) -> None:
        self._config, self._progress = config, progress
        self._labels = [encode(labelled.texts, classes) for labelled in sets]

    def __call__(self, what: str, features: Sequence[Features]) -> Iterator[dict[str, Any]]:
        """Yield one result row per pooling, plain and whitened."""
        labels = [labels[part.kept] for labels, part in zip(self._labels, features, strict=True)]
        for pool in features[0].rows:
            rows = [part.rows[pool] for part in features]
            # Pixels have no poolings.
            name = "raw pixels" if pool == "pixels" else f"{what} {pool}" if what == "untrained" else pool
            name += f", {what}" if what in ("fp16", "int8") else ""
            yield {"name": name, "dim": rows[0].shape[1], **self._score(rows, labels)}
            # A linear classifier learns the scale of each direction itself.
            if self._config.whiten and self._config.task != "linear" and what != _WHITENED:
                default = min(_PIXEL_DIM, len(rows[0]) - 1) if pool == "pixels" else None
                for dim in self._config.whiten_dims or (default,):
                    whitened = _whitened_pixels(rows, dim) if pool == "pixels" else _whitened(rows, dim)
                    if len(rows[0]) < _PER_DIRECTION * whitened[0].shape[1]:
                        self._progress.note(
                            f"{name}, whitened: {len(rows[0])} training images are few for {whitened[0].shape[1]} "
                            f"directions; below {_PER_DIRECTION} for each, take fewer by `whiten_dims`"
                        )
                    yield {
                        "name": f"{name}, whitened",
                        "dim": whitened[0].shape[1],
                        **self._score(whitened, labels),
                    }

    def _score(self, rows: Sequence[Rows], labels: Sequence[Labels]) -> dict[str, Any]:
        options = self._config
        if self._config.task == "knn":
            others = [k for k in options.ks if k <= len(rows[0])]
            ks = [options.k, *others]
            shares = knn_accuracies(rows[0], labels[0], rows[1], labels[1], ks=ks, temperature=options.temperature)
            return {"accuracy": shares[0], **{f"k={k}": share for k, share in zip(others, shares[1:], strict=True)}}
        if self._config.task == "linear":
            return self._linear(rows, labels)
        queries = (rows[1], labels[1]) if len(rows) > 1 else (None, None)
        found = retrieval_scores(rows[0], labels[0], *queries, recalls=options.recalls)
        recall = {f"recall@{k}": share for k, share in found.recall.items()}
        scores = {"map": found.mean_average_precision, "r_precision": found.r_precision, **recall}
        return {**scores, "queries": found.queries}

    def _linear(self, rows: Sequence[Rows], labels: Sequence[Labels]) -> dict[str, Any]:
        import torch

        from maekit.evaluation.linear import linear_accuracy
        from maekit.mae.device import choose_device, device_errors

        with device_errors():
            score = linear_accuracy(
                rows[0],
                labels[0],
                rows[1],
                labels[1],
                seed=self._config.seed,
                device=torch.device(choose_device(self._config.device)),
            )
        return {"accuracy": score.accuracy, "held_out": score.held_out[score.c], "c": score.c}


def _whitened_pixels(rows: Sequence[Rows], dim: int | None) -> list[Rows]:
    """Return pixels whitened to their first principal components, by randomized PCA.

    All 3,072 directions would take half a minute and score worse.
    """
    from sklearn.decomposition import PCA

    dim = min(dim or _PIXEL_DIM, len(rows[0]) - 1, rows[0].shape[1])
    pca = PCA(dim, whiten=True, svd_solver="randomized", random_state=0).fit(rows[0])
    return [pca.transform(part).astype(np.float32) for part in rows]


def _whitened(rows: Sequence[Rows], dim: int | None) -> list[Rows]:
    """Return all rows whitened, with the whitening fitted to the first set, the training set."""
    from maekit.vectors.whitening import fit_whitening

    blocks = (rows[0][start : start + _BLOCK] for start in range(0, len(rows[0]), _BLOCK))  # float64 takes memory
    made = fit_whitening(blocks, dim, hashlib.sha256())
    return [part @ made.matrix.T + made.bias for part in rows]
