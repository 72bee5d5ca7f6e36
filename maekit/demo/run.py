"""The whole pipeline in minutes on a CPU: draw -> pack -> check -> pretrain -> export -> embed -> compare -> report."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from maekit.checking import check_shards
from maekit.config import DataConfig, ModelConfig, OptimizerConfig, PretrainConfig, RunConfig
from maekit.config.pack import PackConfig
from maekit.demo.pictures import CLASSES, write_pictures
from maekit.images import decode
from maekit.runs import RunDirectory
from maekit.shards.pack import pack
from maekit.shards.read import ShardSet, open_shards
from maekit.shards.spec import find_shards
from maekit.system import files
from maekit.system.errors import InputError, MaekitError
from maekit.system.progress import Progress, Silent
from maekit.vectors.knn import knn_accuracy

TRAIN_PICTURES, TEST_PICTURES = 2000, 500
STEPS = 800
_REPORT_SAMPLES = 400
_MARK = ".maekit-demo"

Rows = NDArray[np.float32]


@dataclass(frozen=True)
class DemoResult:
    """Result of the demo; `--json` prints it.

    Attributes:
        out: the output folder.
        knn_pixels: k-NN accuracy on the test pictures with raw pixels.
        knn_untrained: the same with the encoder as initialised.
        knn_trained: the same with the trained encoder.
        knn_whitened: the same with the trained encoder and whitened embeddings.
        chance: accuracy of guessing.
        loss_first: mean loss of the first logged steps.
        loss_last: mean loss of the last logged steps.
        parity: largest difference of the exported file from PyTorch, relative to the largest value.
        report: path of the run's report page.
        seconds: total duration.
    """

    out: str
    knn_pixels: float
    knn_untrained: float
    knn_trained: float
    knn_whitened: float
    chance: float
    loss_first: float
    loss_last: float
    parity: float
    report: str
    seconds: float


def demo_config(out: Path) -> PretrainConfig:
    """Return the demo's training config: a tiny ViT on pictures of 64 x 64 pixels."""
    return PretrainConfig(
        shards=(str(out / "shards" / "train"),),
        out=str(out / "run"),
        steps=STEPS,
        batch_size=64,
        model=ModelConfig(
            name="vit_tiny_patch16_224",
            image_size=64,
            patch_size=8,
            width=96,
            depth=3,
            heads=3,
            decoder_width=64,
            decoder_depth=1,
            decoder_heads=4,
            # In such a short run, plain pixels give better embeddings than normalised ones.
            target="pixel",
        ),
        data=DataConfig(crop_scale=(0.8, 1.0)),
        optimizer=OptimizerConfig(lr=1.2e-2),
        run=RunConfig(device="cpu", precision="fp32", log_every=20),
    )


def run_demo(out: Path, progress: Progress | None = None) -> DemoResult:
    """Run the demo in `out`, replacing the files of an earlier demo.

    Raises:
        InputError: `out` holds files that no demo made, or is not writable.
    """
    from maekit.config.embed import EmbedConfig
    from maekit.config.export import ExportConfig
    from maekit.config.pages import ReportConfig
    from maekit.embedding.embed import embed
    from maekit.exporters.export import export
    from maekit.pages.report import report
    from maekit.pretraining.pretrain import pretrain

    progress = progress or Silent()
    started = time.monotonic()
    _make_room(out)
    shards = {}
    for split, count, seed in (("train", TRAIN_PICTURES, 1), ("test", TEST_PICTURES, 2)):
        progress.note(f"drawing {count} pictures of {len(CLASSES)} classes: {out}/pictures/{split}")
        write_pictures(out / "pictures" / split, count, seed=seed)
        packed = pack(PackConfig(str(out / "pictures" / split), str(out / "shards" / split), samples_per_shard=500))
        progress.note(f"packed into {len(packed.shards)} shards: {out}/shards/{split}")
        found = find_shards(str(out / "shards" / split))
        checked = check_shards(found)
        if checked.damaged or checked.samples != count:
            raise MaekitError(f"{out}/shards/{split}: {checked.summary()} where {count} sound samples should be")
        progress.note(f"checked: {checked.samples} samples, 0 damaged")
        shards[split] = open_shards(found)

    config = demo_config(out)
    config.run.checkpoint_every = STEPS
    # One step at a vanishing learning rate makes a run whose encoder is as initialised.
    untrained = demo_config(out)
    untrained.out, untrained.steps, untrained.run.pictures_every = str(out / "run-untrained"), 1, 0
    untrained.optimizer.lr = 1e-30
    pretrain(untrained)
    trained = pretrain(config, progress)

    accuracy = {"raw pixels": _accuracy(shards, _pixels)}
    parity = 0.0
    whitening = (str(out / "shards" / "train"),)
    for name, run, ending, whiten in (
        ("untrained encoder", untrained.out, "-untrained", ()),
        ("trained encoder", trained.out, "", ()),
        ("trained, whitened", trained.out, "-whitened", whitening),
    ):
        exported = export(ExportConfig(run, str(out / f"encoder{ending}.onnx"), pool="cls", whiten=whiten))
        assert exported.parity is not None
        parity = exported.parity.max_relative_difference
        folder = out / f"embeddings{ending}"
        for split in shards:
            embed(EmbedConfig(exported.path, (str(out / "shards" / split),), str(folder / split), device="cpu"))
        accuracy[name] = _accuracy(shards, _embeddings(folder))
        progress.note(f"exported {exported.path} (parity {parity:.1e}) and embedded {folder}")
    run_directory = RunDirectory(Path(config.out))
    _write_evaluation(run_directory, shards, accuracy)
    page = report(ReportConfig(config.out, str(out / "report.html"), samples=_REPORT_SAMPLES), progress)
    rows = run_directory.metrics()
    return DemoResult(
        out=str(out),
        knn_pixels=accuracy["raw pixels"],
        knn_untrained=accuracy["untrained encoder"],
        knn_trained=accuracy["trained encoder"],
        knn_whitened=accuracy["trained, whitened"],
        chance=1 / len(CLASSES),
        loss_first=rows[0]["loss"],
        loss_last=rows[-1]["loss"],
        parity=parity,
        report=page.path,
        seconds=round(time.monotonic() - started, 1),
    )


def _make_room(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; `out` names a folder")
    if out.is_dir() and any(out.iterdir()):
        if not (out / _MARK).is_file():
            raise InputError(f"{out} holds files that no demo made; choose another `out`")
        shutil.rmtree(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / _MARK).touch()
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}; choose another `out`") from error


def _accuracy(shards: dict[str, ShardSet], rows_of: Callable[[str, ShardSet], Rows]) -> float:
    train, test = (rows_of(split, shards[split]) for split in ("train", "test"))
    return knn_accuracy(train, _labels(shards["train"]), test, _labels(shards["test"]))


def _write_evaluation(run: RunDirectory, shards: dict[str, ShardSet], accuracy: dict[str, float]) -> None:
    """Store the comparison in the format of `maekit evaluate`, for the report."""
    sides = {
        split: {"shards": len(s.shards), "samples": s.samples, "images": s.samples, "classes": len(CLASSES)}
        for split, s in shards.items()
    }
    rows = [{"name": name, "accuracy": share} for name, share in {"guessing": 1 / len(CLASSES), **accuracy}.items()]
    table = {"task": "knn", "model": str(run.path), "step": STEPS, **sides, "rows": rows}
    files.write_atomically(run.path / "evaluations" / "knn.json", json.dumps(table, indent=1).encode())


def _labels(shards: ShardSet) -> NDArray[np.int64]:
    return np.array([int(label) for label in shards.labels(range(shards.samples))])


def _pixels(split: str, shards: ShardSet) -> Rows:
    images = shards.images(range(shards.samples), decode)
    return np.stack([np.asarray(image).astype(np.float32).ravel() / 127.5 - 1 for image in images])


def _embeddings(folder: Path) -> Callable[[str, ShardSet], Rows]:
    def rows_of(split: str, shards: ShardSet) -> Rows:
        tables = [pq.read_table(folder / split / f"{shard.path.stem}.parquet") for shard in shards.shards]
        parts = [table["embedding"].combine_chunks().flatten().to_numpy() for table in tables]
        return np.concatenate([part.reshape(table.num_rows, -1) for part, table in zip(parts, tables, strict=True)])

    return rows_of
