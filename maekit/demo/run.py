"""The whole pipeline in minutes on a CPU: draw -> pack -> check -> pretrain -> export -> embed -> compare -> report."""

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
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
        run=RunConfig(device="cpu", precision="fp32", log_every=20, checkpoint_every=STEPS),
    )


def run_demo(out: Path, progress: Progress | None = None) -> DemoResult:
    """Run the demo in `out`, replacing the files of an earlier demo.

    Raises:
        InputError: `out` holds files that no demo made, or is not writable.
    """
    from maekit.config.pages import ReportConfig
    from maekit.pages.report import report
    from maekit.pretraining.pretrain import pretrain

    progress = progress or Silent()
    started = time.monotonic()
    _make_room(out)
    sets = {
        "train": _labelled_shards(out, "train", TRAIN_PICTURES, seed=1, progress=progress),
        "test": _labelled_shards(out, "test", TEST_PICTURES, seed=2, progress=progress),
    }
    config, untrained = demo_config(out), demo_config(out)
    # One step at a vanishing learning rate makes a run whose encoder is as initialised.
    untrained.out, untrained.steps, untrained.run.pictures_every = str(out / "run-untrained"), 1, 0
    untrained.optimizer.lr = 1e-30
    pretrain(untrained)
    pretrain(config, progress)

    labels = {name: np.array([int(label) for label in s.labels(range(s.samples))]) for name, s in sets.items()}
    pixels = _accuracy({name: _pixels(shards) for name, shards in sets.items()}, labels)
    accuracy = {"guessing": 1 / len(CLASSES), "raw pixels": pixels}
    parity = 0.0
    for name, run, ending in (
        ("untrained encoder", untrained.out, "-untrained"),
        ("trained encoder", config.out, ""),
        ("trained, whitened", config.out, "-whitened"),
    ):
        rows, parity = _embeddings(out, run, ending, progress)
        accuracy[name] = _accuracy(rows, labels)
    directory = RunDirectory(Path(config.out))
    _write_evaluation(directory, sets, accuracy)
    page = report(ReportConfig(config.out, str(out / "report.html"), samples=_REPORT_SAMPLES), progress)
    losses = [row["loss"] for row in directory.metrics()]
    return DemoResult(
        out=str(out),
        knn_pixels=accuracy["raw pixels"],
        knn_untrained=accuracy["untrained encoder"],
        knn_trained=accuracy["trained encoder"],
        knn_whitened=accuracy["trained, whitened"],
        chance=accuracy["guessing"],
        loss_first=losses[0],
        loss_last=losses[-1],
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
    files.require_writable(out)
    (out / _MARK).touch()


def _labelled_shards(out: Path, name: str, count: int, *, seed: int, progress: Progress) -> ShardSet:
    """Draw pictures, pack them into shards and check these."""
    pictures, shards = out / "pictures" / name, out / "shards" / name
    progress.note(f"drawing {count} pictures of {len(CLASSES)} classes: {pictures}")
    write_pictures(pictures, count, seed=seed)
    packed = pack(PackConfig(str(pictures), str(shards), samples_per_shard=500))
    progress.note(f"packed into {len(packed.shards)} shards: {shards}")
    found = find_shards(str(shards))
    checked = check_shards(found)
    if checked.damaged or checked.samples != count:
        raise MaekitError(f"{shards}: {checked.summary()} where {count} sound samples should be")
    progress.note(f"checked: {checked.samples} samples, 0 damaged")
    return open_shards(found)


def _pixels(shards: ShardSet) -> Rows:
    images = shards.images(range(shards.samples), decode)
    return np.stack([np.asarray(image).astype(np.float32).ravel() / 127.5 - 1 for image in images])


def _embeddings(out: Path, run: str, ending: str, progress: Progress) -> tuple[dict[str, Rows], float]:
    """Export the encoder of a run, embed both sets with it, and return the embeddings and the parity of the file."""
    from maekit.config.embed import EmbedConfig
    from maekit.config.export import ExportConfig
    from maekit.embedding.embed import embed
    from maekit.embedding.stored import EmbeddingFolder
    from maekit.exporters.export import export

    whiten = (str(out / "shards" / "train"),) if ending == "-whitened" else ()
    exported = export(ExportConfig(run, str(out / f"encoder{ending}.onnx"), pool="cls", whiten=whiten))
    assert exported.parity is not None
    parity = exported.parity.max_relative_difference
    folder = out / f"embeddings{ending}"
    rows = {}
    for name in ("train", "test"):
        embed(EmbedConfig(exported.path, (str(out / "shards" / name),), str(folder / name), device="cpu"))
        rows[name] = np.concatenate([shard.vectors for shard in EmbeddingFolder(folder / name).shards()])
    progress.note(f"exported {exported.path} (parity {parity:.1e}) and embedded {folder}")
    return rows, parity


def _accuracy(rows: Mapping[str, Rows], labels: Mapping[str, NDArray[np.int64]]) -> float:
    return knn_accuracy(rows["train"], labels["train"], rows["test"], labels["test"])


def _write_evaluation(run: RunDirectory, sets: Mapping[str, ShardSet], accuracy: Mapping[str, float]) -> None:
    """Store the comparison in the format of `maekit evaluate`, for the report."""
    sides = {
        name: {"shards": len(s.shards), "samples": s.samples, "images": s.samples, "classes": len(CLASSES)}
        for name, s in sets.items()
    }
    rows = [{"name": name, "accuracy": share} for name, share in accuracy.items()]
    table = {"task": "knn", "model": str(run.path), "step": STEPS, **sides, "rows": rows}
    files.write_atomically(run.path / "evaluations" / "knn.json", json.dumps(table, indent=1).encode())
