"""What to use when: each variant of the design space pre-trained for the same wall time, and its representations.

    python bench/design_space.py SHARDS --minutes 6 --out FOLDER [--lanes 2] [--only NAME ...] [--json FILE]

SHARDS is a folder of train-*.tar and test-*.tar, small square images with classes (CIFAR-10). A ViT of width 96 and
depth 4 with patches of 4 x 4 learns from all training images. First each variant is calibrated by a short run, then
trained for as many steps as it can take in the given minutes of the loop, its learning-rate schedule as long as that.
Calibration and training alike go on in `--lanes` processes at a time, each with one core for model and loader. What
lies in FOLDER is not done again, so the script may be stopped and started again. Losses of different targets or masks
do not compare.

Embeddings are the mean of the patch tokens after the final norm. kNN: share of test images whose 20 nearest training
images (cosine, temperature 0.07) vote for their class; whitened: after a PCA whitening of all directions, fitted
without labels on the training embeddings. Linear: accuracy of scikit-learn's LogisticRegression (C = 1.0, lbfgs, at
most 300 iterations) on standardised embeddings. Beside stand the encoder as initialised, and raw pixels, these
whitened to 64 dimensions.

The tokens of "tokens" are the nearest of 512 centroids (k-means) of patches, each normalised by its own mean and
standard deviation; the script makes the ONNX file.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maekit.config import PretrainConfig
from maekit.config.settings import set_value
from maekit.images import Preprocess
from maekit.mae.autoencoder import build_autoencoder
from maekit.pretrained.load import load_encoder
from maekit.pretraining.pretrain import pretrain
from maekit.runs import RunDirectory
from maekit.shards.read import open_shards
from maekit.shards.spec import find_shards
from maekit.system import files
from maekit.system.progress import Silent
from maekit.vectors.knn import knn_accuracy
from maekit.vectors.whitening import fit_whitening

IMAGE, PATCH, CENTROIDS = 32, 4, 512
BASE: dict[str, Any] = {
    "batch_size": 256,
    "seed": 0,
    "model.name": "vit_tiny_patch16_224",
    "model.image_size": IMAGE,
    "model.patch_size": PATCH,
    "model.width": 96,
    "model.depth": 4,
    "model.heads": 3,
    "model.decoder_width": 64,
    "model.decoder_depth": 4,
    "model.decoder_heads": 4,
    "optimizer.lr": 1.5e-3,
    "data.cache": "ram",
    "data.workers": 1,
    "run.device": "cpu",
    "run.threads": 1,
    "run.pictures_every": 0,
    "run.tensorboard": False,
    "run.keep_checkpoints": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "cross, all": {"model.decoder": "cross"},
    "cross, 1/2": {"model.decoder": "cross", "model.predict_ratio": 0.5},
    "cross, 1/4": {"model.decoder": "cross", "model.predict_ratio": 0.25},
    "self, 1/4": {"model.predict_ratio": 0.25},
    "2 masks": {"model.masks_per_image": 2},
    "4 masks": {"model.masks_per_image": 4},
    # As many masks in a step as the default has images, at the same learning rate.
    "2 masks, batch 128": {"model.masks_per_image": 2, "batch_size": 128, "optimizer.lr": 3e-3},
    "4 masks, batch 64": {"model.masks_per_image": 4, "batch_size": 64, "optimizer.lr": 6e-3},
    "4 masks, cross 1/4": {"model.masks_per_image": 4, "model.decoder": "cross", "model.predict_ratio": 0.25},
    "block 0.5": {"model.masking": "block", "model.mask_ratio": 0.5},
    "block": {"model.masking": "block"},
    "grid": {"model.masking": "grid"},
    "pixel": {"model.target": "pixel"},
    "pca": {"model.target": "pca", "model.pca_components": 24},
    "tokens": {"model.target": "tokens", "model.vocabulary": CENTROIDS},
    "no class token": {"model.class_token": False},
    "learned positions": {"model.positions": "learned"},
    "mask tokens in encoder": {"model.mask_tokens": "encoder"},
    "fixed crop": {"data.augmentation": "fixed_crop"},
    "no augmentation": {"data.augmentation": "none"},
    "color jitter": {"data.color_jitter": 0.4},
    "8 blocks decoder": {"model.decoder_depth": 8},
    "1 block decoder": {"model.decoder_depth": 1},
}
UNTRAINED, PIXELS = "untrained", "raw pixels"
PIXEL_DIMS = 64

Rows = Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lanes", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--calibrate-steps", type=int, default=40)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--train-images", type=int, default=10000, help="that the evaluation takes")
    parser.add_argument("--test-images", type=int, default=10000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        result = TASKS[options.task](options, options.variant)
        files.write_atomically(result_file(options, options.task, options.variant), json.dumps(result).encode())
        return
    setup = {key: getattr(options, key) for key in ("minutes", "lanes", "calibrate_steps", "precision")}
    setup |= {key: getattr(options, key) for key in ("train_images", "test_images")} | {"base": BASE}
    options.out.mkdir(parents=True, exist_ok=True)
    setup_file = options.out / "setup.json"
    if not setup_file.exists():
        files.write_atomically(setup_file, json.dumps(setup).encode())
    if (there := json.loads(setup_file.read_text())) != setup:
        parser.error(f"{options.out} was begun with {there}; this is {setup}")
    if "tokens" in options.only and not tokenizer_file(options).exists():
        write_tokenizer(options)
    run_all(options, "calibrate", options.only)
    calibrated = [name for name in options.only if result_file(options, "calibrate", name).exists()]
    run_all(options, "train", calibrated)
    run_all(options, "baseline", [UNTRAINED, PIXELS])
    places = [(task, name) for task in ("train", "baseline") for name in (*options.only, UNTRAINED, PIXELS)]
    done = [path for place in places if (path := result_file(options, *place)).exists()]
    rows = sorted((json.loads(path.read_text()) for path in done), key=lambda row: -row["knn_whitened"])
    show(rows)
    if options.json:
        options.json.write_text(json.dumps({"what": "design space", **setup, "rows": rows}, indent=1) + "\n")


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'':24}{'img/s':>8}{'epochs':>8}{'seconds':>9}{'loss':>8}{'kNN':>8}{'whitened':>10}{'linear':>8}")
    for row in rows:
        figures = [
            (row.get("images_per_second"), 8, ".0f"),
            (row.get("epochs"), 8, ".2f"),
            (row.get("seconds"), 9, ".0f"),
        ]
        figures += [(row.get("loss"), 8, ".4f")]
        shares = [(row["knn"], 8), (row["knn_whitened"], 10), (row.get("linear"), 8)]
        figures += [(None if share is None else 100 * share, width, ".2f") for share, width in shares]
        texts = [f"{'' if value is None else format(value, form):>{width}}" for value, width, form in figures]
        print(f"{row['name']:24}{''.join(texts)}")


def run_all(options: argparse.Namespace, task: str, names: list[str]) -> None:
    """Do a task for each name whose result is not there yet, each in a process of its own, `concurrency` at a time."""
    cores, lane = sorted(os.sched_getaffinity(0)), count()
    running: set[subprocess.Popen[bytes]] = set()

    def pin() -> None:
        os.sched_setaffinity(0, {cores[next(lane) % len(cores)]})  # this thread, and the processes that it starts

    def run(name: str) -> None:
        result = result_file(options, task, name)
        if result.exists():
            return
        command = [sys.executable, __file__, *sys.argv[1:], "--task", task, "--variant", name]
        log = result.with_suffix(".log")
        with open(log, "wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
            running.add(process)
            failed = process.wait()
            running.discard(process)
        print(f"{task} {name}: {f'failed, see {log}' if failed else result.read_text()}", flush=True)

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ThreadPoolExecutor(options.concurrency, initializer=pin) as pool:
        try:
            list(pool.map(run, names))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in tuple(running):
                process.kill()
            raise


def result_file(options: argparse.Namespace, task: str, name: str) -> Path:
    return options.out / f"{task}-{slug(name)}.json"


def tokenizer_file(options: argparse.Namespace) -> Path:
    return options.out / "tokenizer.onnx"


def slug(name: str) -> str:
    return re.sub(r"\W+", "-", name)


def config_of(options: argparse.Namespace, name: str, run: Path, steps: int) -> PretrainConfig:
    config = PretrainConfig((f"{options.shards}/train-*.tar",), str(run), steps=steps)
    settings = {**BASE, "run.precision": options.precision, "run.checkpoint_every": steps, **VARIANTS.get(name, {})}
    if name == "tokens":
        settings["model.tokenizer"] = str(tokenizer_file(options))
    for key, value in settings.items():
        set_value(config, key, value)
    return config


def calibrate(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Return the steady rate of a variant, from a short run."""
    run = options.out / f"calibrate-{slug(name)}"
    shutil.rmtree(run, ignore_errors=True)  # of a killed process
    config = config_of(options, name, run, options.calibrate_steps)
    config.run.log_every = 5
    pretrain(config, Silent())
    rates = [row["images_per_second"] for row in RunDirectory(run).metrics()]
    shutil.rmtree(run)
    rate = statistics.median(rates[min(2, len(rates) - 1) :])  # the first rows pay for the start
    return {"name": name, "images_per_second": rate, "seconds_per_step": config.batch_size / rate}


def train(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Train a variant for the given time and evaluate it."""
    calibrated = json.loads(result_file(options, "calibrate", name).read_text())["images_per_second"]
    run = options.out / f"run-{slug(name)}"
    batch_size = config_of(options, name, run, 1).batch_size
    steps = max(1, round(options.minutes * 60 * calibrated / batch_size))
    shutil.rmtree(run, ignore_errors=True)  # never resumed: its time would be another
    before = time.perf_counter()
    result = pretrain(config_of(options, name, run, steps), Silent())
    seconds = time.perf_counter() - before
    loaded = load_encoder(str(run))
    return {
        "name": name,
        "settings": VARIANTS[name],
        "calibrated_images_per_second": calibrated,
        "images_per_second": result.images_per_second,
        "steps": steps,
        "epochs": RunDirectory(run).metrics()[-1]["epoch"],
        "seconds": result.samples / result.images_per_second,
        "seconds_with_start": seconds,
        "data_wait": result.data_wait,
        "loss": result.loss,
        **evaluate_encoder(options, loaded.encoder, loaded.preprocess),
    }


def baseline(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Evaluate what needs no training."""
    config = config_of(options, "default", options.out, 1)
    size, mean, std = config.model.size, config.data.mean, config.data.std
    if name == UNTRAINED:
        encoder = build_autoencoder(config.model, seed=config.seed).encoder
        return {"name": name, **evaluate_encoder(options, encoder, Preprocess.for_size(size, mean, std))}
    prepare = Preprocess.for_size(size, mean, std)
    sets = {split: labelled(options, split, prepare) for split in ("train", "test")}
    rows = {split: images.reshape(len(images), -1).astype(np.float32) / 255 for split, (images, _) in sets.items()}
    dims = min(PIXEL_DIMS, len(rows["train"]) - 1)
    return {"name": name, **neighbours(rows, {split: labels for split, (_, labels) in sets.items()}, dims)}


TASKS = {"calibrate": calibrate, "train": train, "baseline": baseline}


def evaluate_encoder(options: argparse.Namespace, encoder: Any, prepare: Preprocess) -> dict[str, float]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    rows, labels = {}, {}
    for split in ("train", "test"):
        images, labels[split] = labelled(options, split, prepare)
        rows[split] = embed(encoder.eval(), images, prepare)
    scaler = StandardScaler().fit(rows["train"])
    classifier = LogisticRegression(C=1.0, max_iter=300).fit(scaler.transform(rows["train"]), labels["train"])
    linear = float(classifier.score(scaler.transform(rows["test"]), labels["test"]))
    return {**neighbours(rows, labels, None), "linear": linear}


def neighbours(rows: dict[str, Rows], labels: dict[str, Rows], dims: int | None) -> dict[str, float]:
    """Return kNN accuracy, without whitening and with."""
    made = fit_whitening([rows["train"]], dims, hashlib.sha256())
    whitened = {split: values @ made.matrix.T + made.bias for split, values in rows.items()}
    return {
        key: knn_accuracy(of["train"], labels["train"], of["test"], labels["test"], k=20)
        for key, of in (("knn", rows), ("knn_whitened", whitened))
    }


def labelled(options: argparse.Namespace, split: str, prepare: Preprocess) -> tuple[Rows, Rows]:
    """Return the first images of a split as the model takes them, uint8 `[n, H, W, 3]`, and their classes."""
    shards = open_shards(find_shards(f"{options.shards}/{split}-*.tar"))
    reader = shards.reader()
    images, labels = [], []
    for number in range(min(shards.samples, getattr(options, f"{split}_images"))):
        shard, ordinal = shards.locate(number)
        index = shards.index(shard)
        images.append(prepare(reader.read_image(index, ordinal)))
        (member,) = [m for m in index.members(ordinal) if m.extension == "cls"]
        labels.append(int(reader.read(index, member)))
    return np.stack(images), np.array(labels, np.int64)


@torch.inference_mode()
def embed(encoder: Any, images: Rows, prepare: Preprocess) -> Rows:
    """Return the mean of the patch tokens of images."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (prepare.mean, prepare.std))
    parts = []
    for start in range(0, len(images), 250):
        x = torch.from_numpy(images[start : start + 250]).permute(0, 3, 1, 2) / 255
        tokens = encoder.forward_features((x - mean) / std)
        parts.append(tokens[:, encoder.num_prefix_tokens :].mean(1).numpy())
    return np.concatenate(parts)


def write_tokenizer(options: argparse.Namespace) -> None:
    """Fit centroids on the patches of 5,000 training images and write the graph that finds the nearest one."""
    from onnx import TensorProto, helper, numpy_helper
    from sklearn.cluster import MiniBatchKMeans

    side, values = IMAGE // PATCH, PATCH * PATCH * 3
    prepare = Preprocess.for_size((IMAGE, IMAGE), (0.5,) * 3, (0.5,) * 3)
    images, _ = labelled(argparse.Namespace(shards=options.shards, train_images=5000), "train", prepare)
    grid = images.astype(np.float32).reshape(-1, side, PATCH, side, PATCH, 3)
    patches = grid.transpose(0, 1, 3, 2, 4, 5).reshape(-1, values)
    centred = patches - patches.mean(axis=1, keepdims=True)
    patches = centred / np.sqrt(np.square(centred).mean(axis=1, keepdims=True) + 1)  # of 255; patches may be flat
    kmeans = MiniBatchKMeans(CENTROIDS, batch_size=4096, n_init=1, random_state=0).fit(patches)
    centroids = kmeans.cluster_centers_.astype(np.float32)
    # |x - c|^2 is least where x c - |c|^2 / 2 is largest.
    constants = {
        "grid": np.array([-1, side, PATCH, side, PATCH, 3], np.int64),
        "patches": np.array([-1, side, side, values], np.int64),
        "one": np.array(1, np.float32),
        "centroids": centroids.T.copy(),
        "bias": -np.square(centroids).sum(axis=1) / 2,
    }
    node = helper.make_node
    nodes = [
        node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        node("Reshape", ["float", "grid"], ["split"]),
        node("Transpose", ["split"], ["turned"], perm=[0, 1, 3, 2, 4, 5]),
        node("Reshape", ["turned", "patches"], ["x"]),
        node("ReduceMean", ["x"], ["mean"], axes=[-1], keepdims=1),
        node("Sub", ["x", "mean"], ["centred"]),
        node("Mul", ["centred", "centred"], ["squares"]),
        node("ReduceMean", ["squares"], ["variance"], axes=[-1], keepdims=1),
        node("Add", ["variance", "one"], ["above_zero"]),
        node("Sqrt", ["above_zero"], ["std"]),
        node("Div", ["centred", "std"], ["normalised"]),
        node("MatMul", ["normalised", "centroids"], ["products"]),
        node("Add", ["products", "bias"], ["scores"]),
        node("ArgMax", ["scores"], ["tokens"], axis=-1, keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "tokenizer",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", IMAGE, IMAGE, 3])],
        [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", side, side])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    files.write_atomically(tokenizer_file(options), model.SerializeToString())


if __name__ == "__main__":
    main()
