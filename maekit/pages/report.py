"""`maekit report`: one HTML page about a run, with curves, reconstructions, nearest neighbours, map and evaluations."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from maekit.config import PretrainConfig, total_steps
from maekit.config.fields import shown
from maekit.config.pages import ReportConfig
from maekit.config.settings import fields_of
from maekit.images import open_rgb
from maekit.mae.device import choose_device
from maekit.pages import embedding_map, html
from maekit.pages.chart import Line, line_chart
from maekit.pages.html import Html
from maekit.pages.samples import Samples, embed_samples
from maekit.pages.score_tables import evaluation_parts
from maekit.pretrained.load import load_encoder
from maekit.runs import Checkpoint, RunDirectory, is_run
from maekit.shards.read import open_shards
from maekit.shards.spec import find_shards
from maekit.system import files
from maekit.system.errors import ImageError, InputError, MaekitError
from maekit.system.progress import Progress, Silent, duration
from maekit.vectors.rank import collapse

_QUERIES, _NEIGHBOURS = 8, 8
_PICTURES = 6
_PICTURE_WIDTH = 480  # pixels
_CLASSES = 12
_NO_EVALUATION = "Nothing was measured yet: maekit evaluate puts its tables into the run."
# Larger values come from a damaged file, and arithmetic with them overflows.
_LARGEST = 1e100
# Distinguishable from each other and on both backgrounds; _OTHER is for all classes that are not named.
_COLOURS = (
    "#e64b3c", "#3c82e6", "#3caf5a", "#f0a01e", "#965ad2", "#1eb9c3",
    "#eb6eaf", "#966e3c", "#aac832", "#646ef0", "#ffd746", "#007d6e",
)  # fmt: skip
_OTHER = "#8c9198"


@dataclass(frozen=True)
class ReportResult:
    """Summary of the report; `--json` prints it.

    Attributes:
        path: the page.
        bytes: size of the page.
        step: step of the last logged loss; None if there is none.
        loss: the last logged loss; None if there is none.
        samples: number of samples embedded for neighbours and map.
        evaluations: number of evaluation tables.
        missing: what could not be shown, and why.
    """

    path: str
    bytes: int
    step: int | None
    loss: float | None
    samples: int
    evaluations: int
    missing: tuple[str, ...]


def report(config: ReportConfig, progress: Progress | None = None) -> ReportResult:
    """Write a page about a run. Where something cannot be shown, the page says so.

    Args:
        config: the run, the page, and the samples to embed.
        progress: receives progress updates.

    Raises:
        InputError: no run, no such device, or an impossible path for the page.
        MaekitError: the page cannot be written.
    """
    asked, progress, path = config, progress or Silent(), Path(config.run)
    asked.validate()
    if not is_run(path):
        what = "is no run" if path.exists() else "does not exist"
        raise InputError(f"{path} {what}; a run is the `out` of `maekit pretrain`")
    out = html.output_path(str(path / "report.html") if asked.out is None else asked.out, ".html")
    choose_device(asked.device)
    directory = RunDirectory(path)
    run, rows = directory.config(), directory.metrics()
    files.require_writable(out.parent)
    pictures, damaged = _reconstructions(path / "pictures")
    tables, unread = evaluation_parts(path / "evaluations")
    missing = [*damaged, *unread]
    checkpoint: Checkpoint | None = None
    samples: Samples | None = None
    try:
        checkpoint = directory.newest_valid(progress.note)
        samples = _samples(run, checkpoint, asked, progress)
        neighbours, map_ = _neighbours(samples), _map(samples)
    except MaekitError as error:
        missing.insert(0, f"neighbours and map: {error}")
        neighbours = map_ = [html.note(f"Not shown: {missing[0]}")]
    for said in missing:
        progress.note(f"left out: {said}")
    parts = [
        html.facts(_summary(directory, run, rows, checkpoint)),
        html.section("Curves", *_curves(rows, run.model.target)),
        html.section("Reconstructions over time", *pictures, *map(html.note, damaged)),
        html.section("Nearest neighbours", *neighbours),
        html.section("Map of the embeddings", *map_),
        html.section("Evaluation", *(tables or [html.note(_NO_EVALUATION)]), *map(html.note, unread)),
        html.section("Settings", *_settings(run)),
    ]
    data = html.document("Pre-training report", f"The run {path}", parts)
    files.write_atomically(out, data)
    losses = _series(rows, "loss")
    return ReportResult(
        path=str(out),
        bytes=len(data),
        step=int(losses[-1][0]) if losses else None,
        loss=losses[-1][1] if losses else None,
        samples=len(samples.pictures) if samples else 0,
        evaluations=len(tables),
        missing=tuple(missing),
    )


def _samples(config: PretrainConfig, checkpoint: Checkpoint | None, asked: ReportConfig, progress: Progress) -> Samples:
    """Embed samples with the newest valid checkpoint.

    Raises:
        MaekitError: there is no checkpoint, or the shards cannot be read.
    """
    if checkpoint is None:
        raise InputError("the run has no checkpoint yet")
    trained = load_encoder(str(checkpoint.path), on_note=progress.note)
    given = asked.shards or config.shards
    shards = open_shards(
        find_shards(given),
        image=config.data.image,
        skip_damaged=True,
        on_damage=lambda damage: progress.note(f"left out: {damage}"),
    )
    trained.encoder.to(choose_device(asked.device))
    return embed_samples(trained, shards, asked.samples, progress)


def _summary(
    directory: RunDirectory, config: PretrainConfig, rows: list[dict[str, Any]], checkpoint: Checkpoint | None
) -> list[tuple[str, str]]:
    done = int(rows[-1]["step"]) if rows else checkpoint.step if checkpoint else 0
    total = _total_steps(config, checkpoint)
    height, width = config.model.size
    found = [
        ("Model", config.model.name or "not chosen yet"),
        ("Input", f"{width} × {height} {'RGB' if config.model.channels == 3 else 'grey'}"),
        ("State", "finished" if directory.encoder_file.is_file() else "not finished"),
        ("Steps", f"{done:,} of {total:,}" if total else f"{done:,}"),
    ]
    for key, name, form, statistic in (
        ("samples", "Images seen", "{:,.0f}", _last),
        ("loss", "Last loss", "{:.4f}", _last),
        ("val_loss", "Last held-out loss", "{:.4f}", _last),
        ("val_rank", "Last effective rank, held out", "{:.1f}", _last),
        ("val_knn", "Last kNN, held out", "{:.1%}", _last),
        ("val_knn_whitened", "Last kNN, held out, whitened", "{:.1%}", _last),
        ("images_per_second", "Images/s, median", "{:,.1f}", median),
        ("data_wait", "Wait for data, median", "{:.1%}", median),
    ):
        if points := _series(rows, key):
            found.append((name, form.format(statistic([y for _, y in points]))))
    if seconds := _seconds(rows):
        found.append(("Time in training", duration(seconds)))
    for key, name in (("bad", "Unreadable images met"), ("skipped", "Steps left out")):
        if (points := _series(rows, key)) and points[-1][1]:
            found.append((name, f"{points[-1][1]:,.0f}"))
    return found


def _last(values: Sequence[float]) -> float:
    return values[-1]


def _total_steps(config: PretrainConfig, checkpoint: Checkpoint | None) -> int | None:
    """Return the total steps of the run; None if they depend on an unknown number of samples."""
    try:
        state = checkpoint.state() if checkpoint else {}
        return total_steps(config, int(state.get("samples_per_epoch", 0))) or None
    except (OSError, ValueError, TypeError, OverflowError):
        return config.steps


def _seconds(rows: list[dict[str, Any]]) -> float:
    """Return the time of the logged steps: the sum over rows of images divided by images per second."""
    seconds = before = 0.0
    for row in rows:
        samples, rate = _number(row.get("samples")), _number(row.get("images_per_second"))
        if samples is not None and rate:
            seconds += max(0.0, samples - before) / rate
            before = samples
    return seconds


def _curves(rows: list[dict[str, Any]], target: str) -> list[Html]:
    charts = []
    loss = "cross-entropy" if target == "tokens" else "mean squared error"
    for title, keys, unit, from_zero, share in (
        ("Loss", (("loss", "training"), ("val_loss", "held out")), loss, False, False),
        ("Effective rank of embeddings", (("val_rank", "held out"),), "directions", True, False),
        ("kNN", (("val_knn", "plain"), ("val_knn_whitened", "whitened")), "accuracy, held out", True, True),
        ("Learning rate", (("lr", "learning rate"),), "per step", True, False),
        ("Throughput", (("images_per_second", "throughput"),), "images per second", True, False),
        ("Wait for data", (("data_wait", "wait"),), "share of the time", True, True),
        ("Gradient", (("grad_norm", "norm"),), "L2 norm", False, False),
    ):
        lines = [Line(name, _series(rows, key)) for key, name in keys]
        if any(line.points for line in lines):
            charts.append(line_chart(title, lines, unit=unit, from_zero=from_zero, share=share))
    if not charts:
        return [html.note("Not shown: the run has no row of metrics yet.")]
    return [*map(html.note, _collapse(rows)), html.group("charts", charts)]


def _collapse(rows: list[dict[str, Any]]) -> list[str]:
    """Return one sentence if the last effective rank shows a collapse of the embeddings."""
    ranks, counts = _series(rows, "val_rank"), _series(rows, "val_embeddings")
    said = collapse(ranks[-1][1], int(counts[-1][1])) if ranks and counts else None
    return [f"{said[0].upper()}{said[1:]}."] if said else []


def _series(rows: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """Return (step, value) by ascending step; the last of several values at one step."""
    pairs = [(_number(row["step"]), _number(row.get(key))) for row in rows]
    values = {step: value for step, value in pairs if step is not None and value is not None}
    return sorted(values.items())


def _number(value: Any) -> float | None:
    """Return a value as a number that can be drawn, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -_LARGEST < value < _LARGEST:
        return None
    return float(value) if abs(value) > 1 / _LARGEST else 0.0


def _reconstructions(folder: Path) -> tuple[list[Html], list[str]]:
    """Return the pictures of some steps, and a message for each that cannot be read."""
    found = sorted(folder.glob("step-*.png"))
    count = min(_PICTURES, len(found))
    # Evenly spaced, with the first and the last.
    chosen = [found[(len(found) - 1) * i // max(1, count - 1)] for i in range(count)]
    shown, damaged = [], []
    for path in chosen:
        step = path.stem.removeprefix("step-").lstrip("0") or "0"
        try:
            image = open_rgb(path.read_bytes())
        except (OSError, ImageError) as error:
            damaged.append(f"{path.name} cannot be read: {error}")
            continue
        is_small = image.width <= _PICTURE_WIDTH
        image.thumbnail((_PICTURE_WIDTH, 10 * _PICTURE_WIDTH), Image.Resampling.LANCZOS)
        pixels = np.asarray(image)
        alt = f"masked, reconstructed and original images at step {step}"
        shown.append(html.figure(html.picture(pixels, alt, exact=is_small), f"step {step}"))
    if not shown:
        return [html.note("Not shown: the run has no picture.")], damaged
    about = "From left to right: masked, reconstructed, original. The same images under the same masks at every step."
    return [html.paragraph(about), html.group("row", shown)], damaged


def _neighbours(samples: Samples) -> list[Html]:
    count = len(samples.pictures)
    queries = [count * i // min(_QUERIES, count) for i in range(min(_QUERIES, count))]
    said = [f"The nearest of {count:,} samples by cosine, for {len(queries)} of them."]
    if samples.whitened:
        said.append(f"The embeddings are the mean of the patch tokens, whitened to {samples.whitened} directions.")
    else:
        said.append("The embeddings are the mean of the patch tokens; they differ too little to be whitened.")
    if shares := _agreement(samples):
        said.append(
            f"Of the {_NEIGHBOURS} nearest of every sample, {shares[0]:.1%} are of its class; "
            f"of all others {shares[1]:.1%}."
        )
    groups = []
    for query, near in zip(queries, samples.neighbours(queries, _NEIGHBOURS), strict=True):
        found = []
        for picture, cosine in near:
            image = html.picture(picture.thumbnail, f"{picture.caption}, cosine {cosine:.3f}")
            found.append((image, f"{cosine:.3f} · {picture.label}" if picture.label else f"{cosine:.3f}"))
        picture = samples.pictures[query]
        image = html.picture(picture.thumbnail, f"query: {picture.caption}")
        groups.append(html.neighbours(image, picture.caption, found))
    return [html.paragraph(" ".join(said)), html.group("queries", groups)]


def _agreement(samples: Samples) -> tuple[float, float] | None:
    """Return the share of same-class samples among the nearest neighbours, and among all other samples."""
    labels = [picture.label for picture in samples.pictures]
    counts = Counter(labels)
    # If classes have fewer samples on average than the number of neighbours, the share says little.
    if None in counts or len(counts) < 2 or len(labels) < _NEIGHBOURS * len(counts):
        return None
    near = samples.neighbours(range(len(labels)), _NEIGHBOURS)
    same = [label == picture.label for label, found in zip(labels, near, strict=True) for picture, _ in found]
    any_other = sum(c * (c - 1) for c in counts.values()) / (len(labels) * (len(labels) - 1))
    return sum(same) / len(same), any_other


def _map(samples: Samples) -> list[Html]:
    count = len(samples.pictures)
    if count < embedding_map.SMALLEST:
        return [html.note(f"Not shown: {count} samples are too few for a map.")]
    labels = [picture.label for picture in samples.pictures]
    counts = Counter(label for label in labels if label is not None)
    named = sorted((label for label, _ in counts.most_common(_CLASSES)), key=_natural)
    by_class = dict(zip(named, _COLOURS, strict=False))
    colours = [by_class.get(label or "", _OTHER) for label in labels] if counts else None
    positions = embedding_map.lay_out(samples.vectors)
    image, drawn = embedding_map.draw_map([picture.thumbnail for picture in samples.pictures], positions, colours)
    about = f"{drawn:,} samples at their places by t-SNE: near each other means alike, far apart means little."
    if drawn < count:
        about += f" {count - drawn:,} more found no room near their place."
    rest = len(counts) - len(named)
    others = ([f"{rest} more classes"] if rest else []) + (["no class"] if None in labels else [])
    if counts and others:
        by_class[" and ".join(others)] = _OTHER
    legend = [html.legend((colour, name) for name, colour in by_class.items())] if by_class else []
    alt = f"map of {drawn} thumbnails, alike ones beside each other"
    return [html.paragraph(about), *legend, html.scrolling(html.picture(image, alt, exact=False))]


def _natural(label: str) -> tuple[int, int, str]:
    """Return the sort key of a class: numbers by value, then names."""
    return (0, int(label), "") if label.isascii() and label.isdigit() else (1, 0, label)


def _settings(config: PretrainConfig) -> list[Html]:
    usual = {key: value for key, value, _ in fields_of(PretrainConfig())}
    every = [(key, value) for key, value, _ in fields_of(config) if value is not None]
    changed = [(key, value, usual[key]) for key, value in every if value != usual[key]]
    rows = [(key, _shown(value), _shown(default)) for key, value, default in changed]
    return [
        html.table(("setting", "value", "default"), rows, caption="What differs from the defaults"),
        html.details("All settings", html.table(("setting", "value"), [(key, _shown(value)) for key, value in every])),
    ]


def _shown(value: Any) -> str:
    return "–" if value is None else shown(value) or "none"
