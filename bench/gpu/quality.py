"""Stage `quality`: how good an encoder becomes in the time, on CIFAR-10, one function for each part.

data         CIFAR-10, both sets
rate         a few steps, for the rate and the compiler's cache
train        as many epochs as the time allows
neighbours   kNN of the test images, plain and whitened
linear       a linear classifier
"""

import tarfile
import time
from typing import Any

from common import DATA, ROOT, TINY, Bench, Failed, Found, as_options, drawn, maekit, metrics, run_part, write_shard

RECIPE = ROOT / "recipes" / "cifar10.toml"
TRAIN_SECONDS = 80.0  # of the loop; start and compilation come on top
# Wider than the recipe, for a card that its width of 384 would keep waiting for the loader; the rate is per 256 images.
WIDE = {
    "model.width": 768,
    "model.heads": 12,
    "model.depth": 6,
    "model.decoder_width": 256,
    "model.decoder_heads": 8,
    "batch_size": 512,
    "optimizer.lr": 1e-3,
}


def data(bench: Bench) -> Found:
    """Labelled shards: train-*.tar and test-*.tar."""
    packed = DATA / "quality.tar.xz"
    if packed.exists() and not bench.dry:
        with tarfile.open(packed) as tar:
            tar.extractall(bench.shards, filter="data")
        source = "CIFAR-10"
    else:
        counts = {"train": 60, "test": 30} if bench.dry else {"train": 4000, "test": 1000}
        for seed, (name, count) in enumerate(counts.items()):
            labelled = enumerate(drawn(count, 32, seed=seed))
            samples = ((f"{n:05d}", {"jpg": image, "cls": str(label).encode()}) for n, (image, label) in labelled)
            write_shard(bench.shards / f"{name}-00.tar", samples)
        source = "drawn"
    return Found(source, {"source": source})


def settings(bench: Bench) -> list[object]:
    """Return the options of both trainings."""
    sizes = {**TINY, "model.patch_size": 4, "batch_size": 16, "optimizer.lr": 1e-3} if bench.dry else WIDE
    out = {"run.pictures_every": 0, "run.checkpoint_minutes": 60.0, "run.tensorboard": False}
    options = as_options({**sizes, **out})
    return [bench.shards / "train-*.tar", "--config", RECIPE, "--device", bench.device, *options]


def rate(bench: Bench) -> Found:
    """Measure images per second, for the number of epochs."""
    steps = 4 if bench.dry else 300
    run = bench.work / "short"
    before = time.perf_counter()
    maekit(bench, "pretrain", *settings(bench), "--out", run, "--steps", steps, "--log-every", max(1, steps // 10))
    rows = metrics(run)
    fastest = max(row["images_per_second"] for row in rows)
    figures = {"images_per_second": fastest, "data_wait": rows[-1]["data_wait"]}
    figures["command_seconds"] = time.perf_counter() - before
    bench.write("rate.json", figures)
    said = f"{fastest:,.0f} img/s, data-wait {rows[-1]['data_wait']:.0%}"
    return Found(f"{said}; {steps} steps in {figures['command_seconds']:.0f} s with start and compilation", figures)


def train(bench: Bench) -> Found:
    """Train for as many epochs as fit into the time at the measured rate."""
    images = maekit(bench, "check", bench.shards / "train-*.tar", "--json").summary["samples"]
    measured = bench.read("rate.json")["images_per_second"]
    seconds = 2.0 if bench.dry else TRAIN_SECONDS
    epochs = max(1.0, round(measured * seconds / images, 1))
    run = bench.work / "run"
    # Where the rate was too good to be true, the part's limit stops the run; its newest checkpoint is judged.
    summary = maekit(bench, "pretrain", *settings(bench), "--out", run, "--epochs", epochs, "--json").summary
    figures: dict[str, Any] = {"epochs": epochs, "images": images, **summary}
    said = f"{epochs:g} epochs of {images:,} images, {summary['images_per_second']:,.0f} img/s"
    return Found(f"{said}, data-wait {summary['data_wait']:.0%}, loss {summary['loss']:.4f}", figures)


def neighbours(bench: Bench) -> Found:
    """Judge by neighbours, two poolings, plain and whitened."""
    pools = ("--pool", "avg") if bench.dry else ("--pool", "avg", "--pool", "avg2x2")
    return judged(bench, "knn", *pools)


def linear(bench: Bench) -> Found:
    """Judge by a linear classifier."""
    return judged(bench, "linear", "--pool", "avg")


def judged(bench: Bench, task: str, *options: object) -> Found:
    """Run `maekit evaluate`; the model alone, as baselines do not change with the card."""
    run = bench.work / "run"
    if not run.exists():
        raise Failed("nothing was trained")
    sets = ("--train", bench.shards / "train-*.tar", "--test", bench.shards / "test-*.tar")
    summary = maekit(bench, "evaluate", task, run, *sets, "--no-baselines", *options, "--json").summary
    said = ", ".join(f"{row['name']} {row['accuracy']:.1%}" for row in summary["rows"])
    return Found(f"{task}: {said}", summary)


PARTS = {"data": data, "rate": rate, "train": train, "neighbours": neighbours, "linear": linear}

if __name__ == "__main__":
    run_part("quality", PARTS)
