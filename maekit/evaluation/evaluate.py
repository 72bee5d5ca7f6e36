"""`maekit evaluate knn|linear|retrieval`: labelled shards -> features -> scores, for a model and its baselines."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from maekit.config.evaluate import EvaluateConfig
from maekit.evaluation.features import RAW_PIXELS, Features, Subject
from maekit.evaluation.labelled import LabelledSet, encode, open_sets
from maekit.evaluation.retrieval import retrieval_scores
from maekit.runs import RunDirectory
from maekit.system import files
from maekit.system.errors import InputError, MaekitError
from maekit.system.progress import Progress, Silent
from maekit.system.redaction import identity, redacted
from maekit.vectors.knn import knn_accuracies
from maekit.vectors.nearest import Labels, Rows
from maekit.vectors.rank import effective_rank
from maekit.vectors.whitening import PER_DIRECTION, fit_whitening

# Directions of raw pixels after the first 64 are noise; whitened pixels score better without them.
_PIXEL_DIM = 64
_BLOCK = 4096
_RANKED = 2000  # rows; the singular values of many more take longer than the neighbours of all

# Vectors and labels of each set: of the training set, then of the test set if there is one.
Sets = list[tuple[Rows, Labels]]


@dataclass(frozen=True)
class EvaluateResult:
    """Result of an evaluation; `--json` prints it.

    Attributes:
        task: `knn`, `linear` or `retrieval`.
        model: the model, as given.
        step: training step of a run or checkpoint; None for any other model.
        train: the training set: shards, damaged (left out), samples, images, classes, unlabelled, unreadable.
        test: the test set, with the same fields; None if each training image searches among the others.
        rows: one row per kind of embedding: `name`, `dim`, `rank` (the effective rank of at most 2,000 training rows,
            see `maekit.vectors.rank`; not of raw pixels), and its scores.
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
    if not config.test and config.task != "retrieval":
        raise InputError(f"evaluate {config.task} needs `test`, labelled shards")
    if not config.test and config.test_images is not None:
        raise InputError(f"`test_images` = {config.test_images}: is for `test`, which was not given")
    subject = Subject(config, progress)
    images = config.train_images, config.test_images
    sets, classes = open_sets(config.train, config.test, progress, images=images, image=config.image)
    _check_sets(config.task, sets, classes, progress)
    labels = [encode(labelled.texts, classes) for labelled in sets]
    rows: list[dict[str, Any]] = []
    unreadable: list[int] = []  # of each set, by the last features, which are those of the model
    for features in subject.features(sets):
        unreadable = [int((~part.kept).sum()) for part in features]
        if any(unreadable) and RAW_PIXELS not in features[0].rows:
            counts = " and ".join(f"{n} of {len(p.kept)}" for n, p in zip(unreadable, features, strict=True))
            progress.note(f"without an embedding, and left out: {counts} labelled images (`train` and `test`)")
        kept = [every[part.kept] for every, part in zip(labels, features, strict=True)]
        for name, vectors in _variants(config, features, progress):
            scores = _SCORES[config.task](config, list(zip(vectors, kept, strict=True)))
            rank = {} if name == RAW_PIXELS else {"rank": _rank(vectors[0])}
            rows.append({"name": name, "dim": vectors[0].shape[1], **rank, **scores})
    summaries = [labelled.summary(classes, count) for labelled, count in zip(sets, unreadable, strict=True)]
    result = EvaluateResult(
        task=config.task,
        model=config.model,
        step=subject.step,
        train=summaries[0],
        test=summaries[1] if config.test else None,
        rows=rows,
        options=config.options(),
    )
    return _kept(result, config, subject.run, progress) if subject.run else result


def _check_sets(task: str, sets: Sequence[LabelledSet], classes: Sequence[str], progress: Progress) -> None:
    """Refuse sets that cannot be evaluated, before any image is decoded; note what is left out of them.

    Raises:
        InputError: too few images to hold any out, or no query has another image of its class.
    """
    unknown = sorted(set(sets[-1].texts) - set(classes))
    if unknown:
        progress.note(
            f"`test` has {len(unknown)} classes that `train` has not, such as {unknown[0][:60]!r}: never right"
        )
    if any(labelled.unlabelled for labelled in sets):
        counts = " and ".join(str(labelled.unlabelled) for labelled in sets)
        names = "`train` and `test`" if len(sets) > 1 else "`train`"
        progress.note(f"without a label, and left out: {counts} samples ({names})")
    if task == "linear":
        from maekit.evaluation.linear import held_out_rows

        held_out_rows(len(sets[0].texts))
    if task == "retrieval":
        there = Counter(sets[0].texts)
        if not any(there[text] > (len(sets) == 1) for text in sets[-1].texts):
            raise InputError("no query has an image of its class to find")


def _kept(result: EvaluateResult, config: EvaluateConfig, run: RunDirectory, progress: Progress) -> EvaluateResult:
    """Write the result into the run; return it with its path."""
    # Other images or settings make another evaluation, which is stored in its own file.
    asked = json.dumps([[*map(identity, config.train)], [*map(identity, config.test)], result.options])
    digest = hashlib.sha256(asked.encode()).hexdigest()[:6]
    path = run.evaluation(f"{result.task}-{digest}", result.step or 0)
    kept = dataclasses.replace(result, path=str(path))
    try:
        path.parent.mkdir(exist_ok=True)
        files.write_atomically(path, json.dumps(redacted(asdict(kept)), indent=1).encode())
    except (OSError, MaekitError) as error:
        progress.note(f"not kept in the run: {error}")
        return result
    return kept


def _variants(
    config: EvaluateConfig, features: Sequence[Features], progress: Progress
) -> Iterator[tuple[str, list[Rows]]]:
    """Yield the name of each kind of embedding and its rows for each set: plain, then whitened."""
    # A linear classifier learns the scale of each direction itself.
    whitens = config.whiten and config.task != "linear" and not features[0].are_whitened
    for name in features[0].rows:
        rows = [part.rows[name] for part in features]
        yield name, rows
        for asked in (config.whiten_dims or (None,)) if whitens else ():
            whitened = (_whitened_pixels if name == RAW_PIXELS else _whitened)(rows, asked)
            dim = whitened[0].shape[1]
            if asked is not None and dim < asked:
                progress.note(f"{name}, whitened: the embeddings vary in {dim} directions; all of them are taken")
            if len(rows[0]) < PER_DIRECTION * dim:
                progress.note(
                    f"{name}, whitened: {len(rows[0])} training images are few for {dim} directions; below "
                    f"{PER_DIRECTION} for each, take fewer by `whiten_dims`"
                )
            yield f"{name}, whitened", whitened


def _whitened_pixels(rows: Sequence[Rows], dim: int | None) -> list[Rows]:
    """Return pixels whitened to their first principal components, by randomized PCA.

    All 3,072 directions would take half a minute and score worse.
    """
    from sklearn.decomposition import PCA

    dim = min(dim or _PIXEL_DIM, len(rows[0]) - 1, rows[0].shape[1])
    pca = PCA(dim, whiten=True, svd_solver="randomized", random_state=0).fit(rows[0])
    return [pca.transform(part).astype(np.float32) for part in rows]


def _whitened(rows: Sequence[Rows], dim: int | None) -> list[Rows]:
    """Return all rows whitened to at most `dim` directions, with the whitening fitted to the training set."""
    blocks = (rows[0][start : start + _BLOCK] for start in range(0, len(rows[0]), _BLOCK))  # float64 takes memory
    made = fit_whitening(blocks, None)
    return [part @ made.matrix[:dim].T + made.bias[:dim] for part in rows]


def _rank(rows: Rows) -> float:
    """Return the effective rank of a sample of the rows, evenly spaced."""
    count = min(len(rows), _RANKED)
    return round(effective_rank(rows[np.arange(count) * len(rows) // count]), 2)


def _knn(config: EvaluateConfig, sets: Sets) -> dict[str, Any]:
    others = [k for k in config.ks if k <= len(sets[0][0])]
    accuracy, *shares = knn_accuracies(*sets[0], *sets[1], ks=[config.k, *others], temperature=config.temperature)
    return {"accuracy": accuracy, **{f"k={k}": share for k, share in zip(others, shares, strict=True)}}


def _linear(config: EvaluateConfig, sets: Sets) -> dict[str, Any]:
    from maekit.evaluation.linear import linear_accuracy
    from maekit.mae.device import choose_device, device_errors

    with device_errors():
        score = linear_accuracy(*sets[0], *sets[1], seed=config.seed, device=choose_device(config.device))
    return {"accuracy": score.accuracy, "held_out": score.held_out[score.c], "c": score.c}


def _retrieval(config: EvaluateConfig, sets: Sets) -> dict[str, Any]:
    queries = sets[1] if len(sets) > 1 else (None, None)
    return retrieval_scores(*sets[0], *queries, recalls=config.recalls)


_SCORES: dict[str, Callable[[EvaluateConfig, Sets], dict[str, Any]]]
_SCORES = {"knn": _knn, "linear": _linear, "retrieval": _retrieval}
