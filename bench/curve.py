"""How good embeddings become while a run goes on: every checkpoint it kept, judged, and drawn.

    python bench/curve.py RUN --train SHARDS --test SHARDS [--train-images N] [--no-linear] [--svg FILE] [--json FILE]

RUN was made with --keep-every; its loss is drawn as well, into FILE-loss.svg. Of each checkpoint: kNN (k = 20, cosine,
temperature 0.07), the same after whitening (all directions, fitted on the training embeddings without labels), and a
linear classifier (L-BFGS, C chosen on a tenth of the training images), for each pooling; beside them the encoder as
initialised, and raw pixels, these whitened to 64 directions, and linear on those. Features are computed once for all
three. What --json holds already of this run is not computed again.
"""

import argparse
import dataclasses
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from maekit import runs
from maekit.cli.show import make_progress
from maekit.config.export import ExportConfig
from maekit.evaluation.features import ExportedEncoder, Features, PixelEncoder, TorchEncoder, image_features
from maekit.evaluation.labelled import LabelledSet, classes_of, encode, open_labelled
from maekit.evaluation.linear import linear_accuracy
from maekit.exporters.export import export
from maekit.mae.autoencoder import initialize_encoder
from maekit.pages.chart import Line, line_chart
from maekit.pretrained.load import load_encoder
from maekit.vectors.knn import knn_accuracy
from maekit.vectors.whitening import fit_whitening

PIXEL_DIM = 64
POOLS = ("avg", "cls", "avg+std", "avg2x2")
COLOURS = ("#1f6feb", "#d4720b", "#1a7f37")
STYLE = (
    "<style>svg { background: #fff; font: 11px system-ui, sans-serif; } text { fill: #333; } "
    ".axis { stroke: #999; fill: none; } .line { fill: none; stroke-width: 1.6; } "
    + " ".join(f".line-{n} {{ stroke: {c}; }} .dot-{n} {{ fill: {c}; }}" for n, c in enumerate(COLOURS))
    + "</style>"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--train", nargs="+", required=True)
    parser.add_argument("--test", nargs="+", required=True)
    parser.add_argument("--train-images", type=int)
    parser.add_argument("--test-images", type=int)
    parser.add_argument("--only-last", action="store_true", help="judge the last checkpoint alone, and the baselines")
    parser.add_argument("--no-linear", action="store_true", help="neighbours alone; linear takes minutes")
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    progress = make_progress()
    sets = [
        open_labelled(options.train, "--train", progress, images=options.train_images),
        open_labelled(options.test, "--test", progress, images=options.test_images),
    ]
    run = runs.RunDirectory(options.run)
    epochs = {row["step"]: row["epoch"] for row in run.metrics() if "epoch" in row}
    steps = sorted(checkpoint.step for checkpoint in run.list_checkpoints())
    steps = steps[-1:] if options.only_last else steps
    table: dict[str, Any] = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    settings = hashlib.sha256(run.config_file.read_bytes()).hexdigest()
    if table.setdefault("settings_sha256", settings) != settings:
        parser.error(f"{options.json} holds figures of a run with other settings; choose another file")
    table |= {"what": "accuracy over a run", "train_images": len(sets[0].texts), "test_images": len(sets[1].texts)}
    rows: list[dict[str, Any]] = table.setdefault("rows", [])
    done = {(row["name"], row["step"]) for row in rows}

    def judge(name: str, step: int | None, features: list[Features], dim: int | None = None) -> None:
        for pool in features[0].rows:
            row = {"name": f"{name} {pool}".strip(), "step": step, "epoch": epochs.get(step or 0)}
            row |= scores(sets, features, pool, dim, linear=not options.no_linear)
            print(row, flush=True)
            rows.append(row)
        if options.json:
            options.json.write_text(json.dumps(table, indent=1) + "\n")

    if ("raw pixels", None) not in done:
        pixels = [image_features(labelled, PixelEncoder(), "raw pixels", progress) for labelled in sets]
        judge("", None, pixels, PIXEL_DIM)
    trained = load_encoder(str(run.checkpoint(steps[-1]).path))
    if not all((f"untrained {pool}", 0) in done for pool in POOLS):
        fresh = dataclasses.replace(trained)
        initialize_encoder(fresh.encoder, seed=0)
        judge("untrained", 0, embedded(fresh, sets, progress))
    for step in steps:
        if not all((pool, step) in done for pool in POOLS):
            judge("", step, exported(run.checkpoint(step).path, sets, options.train, progress))
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n")
    if options.svg:
        options.svg.write_text(drawn(rows))
        losses = [
            Line(name, series(run.metrics(), key)) for key, name in (("loss", "training"), ("val_loss", "held out"))
        ]
        options.svg.with_stem(f"{options.svg.stem}-loss").write_text(figure("Loss", losses, share=False))


def embedded(trained: Any, sets: list[LabelledSet], progress: Any) -> list[Features]:
    encoder = TorchEncoder(trained, POOLS, "auto")
    return [image_features(labelled, encoder, "embed", progress) for labelled in sets]


def exported(checkpoint: Path, sets: list[LabelledSet], parity: list[str], progress: Any) -> list[Features]:
    """Return all poolings by one exported file, which is twice as fast here as PyTorch."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "all.onnx"
        export(ExportConfig(checkpoint, path, pool="avg+std+cls+avg2x2", normalize=False, parity=tuple(parity)))
        encoder = ExportedEncoder(path, "auto")
        made = [image_features(labelled, encoder, "embed", progress) for labelled in sets]
    parts = []
    for part in made:
        (rows,) = part.rows.values()
        width = rows.shape[1] // 7  # mean, deviation, class token, four quarters
        columns = {"avg": (0, 1), "cls": (2, 3), "avg+std": (0, 2), "avg2x2": (3, 7)}
        by_pool = {pool: rows[:, first * width : last * width] for pool, (first, last) in columns.items()}
        parts.append(Features(by_pool, part.kept))
    return parts


def scores(
    sets: list[LabelledSet], features: list[Features], pool: str, dim: int | None, *, linear: bool
) -> dict[str, float]:
    classes = classes_of(sets[0].texts)
    labels = [encode(labelled.texts, classes)[part.kept] for labelled, part in zip(sets, features, strict=True)]
    train, test = (part.rows[pool] for part in features)
    made = fit_whitening(np.array_split(train, -(-len(train) // 4096)), dim, hashlib.sha256())
    whitened = [part @ made.matrix.T + made.bias for part in (train, test)]
    fitted, judged = whitened if dim else (train, test)  # of raw pixels all directions would take long
    found = {
        "knn": knn_accuracy(train, labels[0], test, labels[1]),
        "knn_whitened": knn_accuracy(whitened[0], labels[0], whitened[1], labels[1]),
    }
    if linear:
        found["linear"] = linear_accuracy(fitted, labels[0], judged, labels[1]).accuracy
    return found


def drawn(rows: list[dict[str, Any]]) -> str:
    """Return the kNN curves: of the means of the quarters and of the mean, whitened, and of the mean as it is."""
    lines = []
    for pool, key, title in (
        ("avg2x2", "knn_whitened", "avg2x2, whitened"),
        ("avg", "knn_whitened", "avg, whitened"),
        ("avg", "knn", "avg"),
    ):
        curve = sorted((row["step"], row[key]) for row in rows if row["name"] in (f"untrained {pool}", pool))
        lines.append(Line(title, curve))
    return figure("Accuracy over the run", lines, share=True)


def series(rows: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def figure(title: str, lines: list[Line], *, share: bool) -> str:
    """Return a chart as an SVG of its own."""
    made = line_chart(title, lines, unit=title.split()[0].lower(), share=share)
    svg = made[made.index("<svg") : made.index("</svg>") + 6]
    legend = "".join(
        f'<text x="{110 + 120 * number}" y="14" style="fill: {colour}">{line.name}</text>'
        for number, (line, colour) in enumerate(zip(lines, COLOURS[: len(lines)], strict=True))
    )
    svg = svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg" width="640"', 1).replace(">", f">{STYLE}", 1)
    return svg.replace("</svg>", f"{legend}</svg>\n")


if __name__ == "__main__":
    main()
