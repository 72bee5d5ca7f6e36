"""What whitening, its length and the pooling do for nearest neighbours: kNN and retrieval on labelled shards.

    python bench/whitening.py RUN TRAIN_SHARDS TEST_SHARDS [--fit 5000] [--dims 32,64,128] [--json FILE]

Embeddings come from exported files. The whitening is fitted without labels on images of the training shards, evenly
spread. kNN: share of test images whose 20 nearest training images (cosine, temperature 0.07) vote for their class.
Retrieval, of test images that look for their class among the other test images: the share of right ones among the first
10 (P@10), and the mean average precision over all of them (mAP), which is about the far end of the list as well. The
last rows are files as `maekit export --whiten` writes them, in each precision. Raw pixels stand beside.
"""

import argparse
import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import maekit
from maekit.config.export import ExportConfig
from maekit.exporters.export import export
from maekit.images import decode
from maekit.shards.read import open_shards
from maekit.shards.spec import find_shards
from maekit.vectors.knn import knn_accuracy
from maekit.vectors.whitening import fit_whitening

Rows = Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--fit", type=int, default=5000)
    parser.add_argument("--dims", default="32,64,128")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sets = {split: labelled(getattr(options, split)) for split in ("train", "test")}
    labels = {split: values for split, (_, values) in sets.items()}
    table: list[dict[str, Any]] = []

    def add(what: str, dim: int, rows: dict[str, Rows], explained: float | None = None) -> None:
        knn = knn_accuracy(rows["train"], labels["train"], rows["test"], labels["test"])
        first, average = retrieval(rows["test"], labels["test"])
        row = {"what": what, "dim": dim, "explained": explained, "knn": knn, "precision_at_10": first, "map": average}
        table.append(row)
        variance = f"{explained:.4f}" if explained is not None else "      "
        print(
            f"{what:34} d {dim:5}  variance {variance}  kNN {100 * knn:5.1f} %  P@10 {100 * first:5.1f} %  "
            f"mAP {100 * average:5.1f} %",
            flush=True,
        )

    def whitened(what: str, rows: dict[str, Rows], dims: list[int | None], fit: int) -> None:
        if fit == options.fit:
            add(what, rows["train"].shape[1], rows)
        picked = np.linspace(0, len(rows["train"]) - 1, fit).astype(int)
        for dim in dims:
            made = fit_whitening([rows["train"][picked]], dim, hashlib.sha256())
            turned = {split: values @ made.matrix.T + made.bias for split, values in rows.items()}
            add(f"{what}, whitened on {fit}", made.dim, turned, made.explained_variance)

    dims: list[int | None] = [*map(int, options.dims.split(",")), None]
    pixels = {split: np.stack([decode(d).ravel() / 255 for d in data]) for split, (data, _) in sets.items()}
    whitened("raw pixels", {k: v.astype(np.float32) for k, v in pixels.items()}, [64], options.fit)
    with tempfile.TemporaryDirectory() as folder:
        made_file = export(ExportConfig(options.run, f"{folder}/raw.onnx", pool="cls+avg+std+avg2x2", normalize=False))
        everything, width = embedded(made_file.path, sets), made_file.dim // 7
        places = {"avg": (1, 2), "cls": (0, 1), "avg+cls": (0, 2), "avg+std": (1, 3), "avg2x2": (3, 7)}
        for pool, (first, last) in places.items():
            rows = {split: values[:, first * width : last * width] for split, values in everything.items()}
            whitened(pool, rows, [dim for dim in dims if dim is None or dim < rows["train"].shape[1]], options.fit)
            if pool == "avg":
                for fit in (500, 1000, 2000):
                    whitened(pool, rows, [None], fit)
        for precision, whiten in (("fp32", (options.train,)), ("int8", ()), ("int8", (options.train,))):
            path = f"{folder}/{precision}.onnx"
            made_file = export(
                ExportConfig(
                    options.run, path, precision=precision, whiten=whiten, whiten_images=options.fit, force=True
                )
            )
            add(
                f"export --precision {precision}{' --whiten' if whiten else ''}",
                made_file.dim,
                embedded(made_file.path, sets),
            )
            assert made_file.parity is not None
            table[-1] |= {"mean_cosine": made_file.parity.mean_cosine, "warning": made_file.warning}
            print(
                f"    mean cosine to PyTorch {made_file.parity.mean_cosine:.5f}; {made_file.warning or 'passes'}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps({"what": "whitening", "fit": options.fit, "rows": table}, indent=1) + "\n")


def labelled(spec: str) -> tuple[list[bytes], Rows]:
    """Return the images of shards as they are, and their classes."""
    shards = open_shards(find_shards(spec))
    reader = shards.reader()
    data, labels = [], []
    for number in range(shards.samples):
        shard, ordinal = shards.locate(number)
        index = shards.index(shard)
        data.append(reader.read_image(index, ordinal))
        (member,) = [m for m in index.members(ordinal) if m.extension == "cls"]
        labels.append(int(reader.read(index, member)))
    return data, np.array(labels, np.int64)


def embedded(file: str, sets: dict[str, tuple[list[bytes], Rows]]) -> dict[str, Rows]:
    embedder = maekit.Embedder(file, device="cpu")
    return {split: embedder(list(data)) for split, (data, _) in sets.items()}


def blocks(count: int, size: int = 1000) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def retrieval(rows: Rows, labels: Rows) -> tuple[float, float]:
    """Return precision at 10 and mean average precision of each row's class among the other rows, by cosine."""
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    first = average = 0.0
    for block in blocks(len(rows)):
        cosine = unit[block] @ unit.T
        cosine[np.arange(len(cosine)), np.arange(block.start, block.stop)] = -np.inf
        order = np.argsort(-cosine, axis=1)[:, :-1]
        right = labels[order] == labels[block][:, None]
        precision = np.cumsum(right, axis=1) / np.arange(1, right.shape[1] + 1)
        first += float(precision[:, 9].sum())
        average += float(((precision * right).sum(axis=1) / np.maximum(right.sum(axis=1), 1)).sum())
    return first / len(rows), average / len(rows)


if __name__ == "__main__":
    main()
