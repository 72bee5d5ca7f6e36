"""`maekit embed` on a CPU against its peers: whole commands on the same images and the same weights, in one run.

    python bench/embed_peers.py [SHARDS] [--models tiny small base] [--images 501 200 96] [--rounds 3]
                                [--encoders FOLDER] [--lightly-python PATH] [--int8 ARGUMENTS] [--json FILE]

maekit          `maekit embed ENCODER.onnx SHARDS --out DIR --device cpu --json`, with its defaults, from tar shards
lightly-train   `lightly-train embed` in an environment of its own, fp32 and bf16-mixed
timm            timm's transform and model, torch's DataLoader, fp32 and bf16 by autocast (`peers/timm_loop.py`)
transformers    its image processor and ViTModel, torch's DataLoader, fp32 and bf16 (`peers/transformers_loop.py`)
onnxruntime     the file that maekit reads too, decoded by Pillow in the same thread (`peers/onnxruntime_loop.py`)
  threads       the same with threads that decode ahead

Each is a process started anew; its time is from its start to its end, with all rows written. The others get the
images as files in a folder. They take turns; times are medians over the rounds. `net` is what a contestant prints of
itself, without its start. `busy` is its share of the time of all cores: low where it waits, and where something else
is running on the machine (the threads of ONNX Runtime and of torch spin for a while before they sleep).

Before the rounds each runs once, not timed, on 16 images that all of them prepare alike: `cosine` is the lowest there
to maekit's rows, and shows that the weights are the same. `images` is the lowest on the images that are measured:
lightly-train squashes them to a square without antialiasing, and transformers cuts some of them one pixel further left.

Encoders are made by `maekit pretrain` and `maekit export`, or taken from --encoders: `NAME.onnx` and
`run-NAME/encoder.safetensors` for NAME in tiny, small, base. The environment for lightly-train: `pip install
lightly-train timm`.
"""

import argparse
import collections
import contextlib
import importlib.metadata
import io
import itertools
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pyarrow.parquet as pq
from PIL import Image

from maekit.shards.spec import find_shards
from maekit.system.machine import cores

HERE = Path(__file__).resolve().parent
IMAGES = {"tiny": 501, "small": 200, "base": 96}  # about as long for each
ALIKE = 16  # images of the check
ENOUGH = 0.999
LONGEST = 1800.0  # seconds that one command may take
# The best of 8, 16, 32, 64 and 128 images, and of 1 and 2 workers, on two cores; several are equally good.
TORCH_BATCH, ORT_BATCH, WORKERS = 32, 16, 2
FILES = ("jpg", "jpeg", "png", "webp")


class Failed(Exception):
    """A command ended with an error."""


@dataclass(frozen=True)
class Images:
    """The same images in both forms.

    Attributes:
        count: how many.
        shards: a folder of tar shards.
        folder: a folder of image files, named so that they sort in the order of the shards.
        squares: the folder for a contestant that resizes without cutting, where all are to prepare them alike.
    """

    count: int
    shards: Path
    folder: Path
    squares: Path


@dataclass
class Contestant:
    """One command.

    Attributes:
        name: in the table.
        precision: fp32, bf16 or int8.
        command: from images and output to the command line.
        rows: from the output to embeddings of unit length, in the order of the images.
        seconds: of each round, whole.
        net: images per second of each round, as it prints them itself.
        busy: of each round.
        cosine: the lowest to maekit's rows, on images prepared alike.
        images: likewise on those measured.
    """

    name: str
    precision: str
    command: Callable[[Images, Path], list[object]]
    rows: Callable[[Path], np.ndarray]
    seconds: list[float] = field(default_factory=list)
    net: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    cosine: float | None = None
    images: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", nargs="?", default=str(HERE.parent.parent / "shared/data/imagenet-sample"))
    parser.add_argument("--models", nargs="+", choices=IMAGES, default=list(IMAGES))
    parser.add_argument("--images", nargs="+", type=int, help="for each model; they come again if there are fewer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--encoders", type=absolute, help="a folder of encoders; they are made otherwise")
    parser.add_argument("--lightly-python", type=absolute, help="the interpreter of an environment with lightly-train")
    parser.add_argument(
        "--int8",
        metavar="ARGUMENTS",
        help="what stands in the model's place for int8, as '{onnx} --some-option' or '{folder}/{model}-int8.onnx'",
    )
    parser.add_argument("--only", nargs="+", help="contestants by the first words of their names, besides maekit")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the command and the files go as well
    counts = options.images or [IMAGES[name] for name in options.models]
    if len(counts) != len(options.models):
        parser.error("--images takes one number for each model")
    if not options.lightly_python:
        print("lightly-train is left out: --lightly-python names the interpreter of its environment")
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        os.environ.update(
            HF_HUB_OFFLINE="1", LIGHTLY_TRAIN_EVENTS_DISABLED="1", LIGHTLY_TRAIN_CACHE_DIR=str(scratch / "cache")
        )
        samples = read_samples(str(options.shards))
        for model, count in zip(options.models, counts, strict=True):
            folder = scratch / model
            folder.mkdir()
            images = write_images(samples, count, folder / "images")
            contestants = prepare(options, model, images, folder)
            results[model] = measure(model, contestants, images, write_alike(samples, folder / "alike"), options.rounds)
            shutil.rmtree(folder)
            if options.json:
                figures = {"cores": cores(), "rounds": options.rounds, "versions": versions(options.lightly_python)}
                options.json.write_text(json.dumps({**figures, "models": results}, indent=1) + "\n")


def absolute(path: str) -> Path:
    return Path(path).absolute()  # links stay: an environment's interpreter is one


def measure(
    model: str, contestants: list[Contestant], images: Images, alike: Images, rounds: int
) -> dict[str, dict[str, object]]:
    """Check all contestants, then let them take turns; print the table as soon as it is there."""
    box = images.shards.parent / "out"
    reference: dict[str, np.ndarray] = {}
    for each in list(contestants):
        with dropping(each, contestants):
            out = fresh(box)
            run(each.command(alike, out), box)
            rows = each.rows(out)
            each.cosine = lowest_cosine(rows, reference.setdefault("alike", rows))
            if each.cosine < ENOUGH and each.precision != "int8":
                print(f"  {each.name}, {each.precision}: other embeddings than maekit's, cosine {each.cosine:.5f}")
    for _ in range(rounds):
        for each in list(contestants):
            with dropping(each, contestants):
                out = fresh(box)
                seconds, busy, said = run(each.command(images, out), box)
                each.seconds.append(seconds)
                each.busy.append(busy)
                with contextlib.suppress(ValueError, IndexError, TypeError, KeyError):
                    each.net.append(json.loads(said.splitlines()[-1])["images_per_second"])
                if each.images is None:
                    rows = each.rows(out)
                    if len(rows) != images.count:
                        raise Failed(f"{len(rows)} rows of {images.count} images")
                    each.images = lowest_cosine(rows, reference.setdefault("images", rows))
    if not contestants or contestants[0].name != "maekit":
        sys.exit("maekit itself failed: nothing to compare with")
    return show(model, contestants, images.count)


def show(model: str, contestants: list[Contestant], count: int) -> dict[str, dict[str, object]]:
    own = statistics.median(contestants[0].seconds)
    rounds = len(contestants[0].seconds)
    print(f"\nvit_{model}_patch16_224, {count} images, {cores()} cores, medians of {rounds} rounds")
    print(f"  {'':<26} seconds   img/s     net  busy      maekit is    cosine   images")
    figures: dict[str, dict[str, object]] = {}
    for each in contestants:
        seconds = statistics.median(each.seconds)
        net = f"{statistics.median(each.net):7.1f}" if each.net else f"{'-':>7}"
        print(
            f"  {each.name + ', ' + each.precision:<26} {seconds:8.2f} {count / seconds:7.1f} {net}"
            f" {statistics.median(each.busy):5.0%}   {seconds / own:6.2f} x as fast"
            f"   {each.cosine:7.5f}  {each.images:7.5f}"
        )
        figures[f"{each.name}, {each.precision}"] = {
            "images": count,
            "median_seconds": seconds,
            "images_per_second": count / seconds,
            "maekit_is_times_as_fast": seconds / own,
            "cosine_prepared_alike": each.cosine,
            "cosine_on_the_images": each.images,
            "seconds": each.seconds,
            "net_images_per_second": each.net,
            "busy": each.busy,
        }
    return figures


# The contestants


def prepare(options: argparse.Namespace, model: str, images: Images, folder: Path) -> list[Contestant]:
    """Return the contestants for a model, maekit in fp32 first; what they need besides images is made here."""
    encoders = options.encoders or folder
    encoder, weights = encoders / f"{model}.onnx", encoders / f"run-{model}" / "encoder.safetensors"
    timm_name = f"vit_{model}_patch16_224"
    if not options.encoders:
        make_encoder(timm_name, images.shards, weights.parent, encoder)
    spec = preprocess_of(encoder)
    converted = ["--model", timm_name, "--weights", weights, "--preprocess", spec]

    contestants = [maekit("fp32", [encoder])]
    loops = [("fp32", encoder)]
    if options.int8:
        arguments = [part.format(onnx=encoder, folder=encoders, model=model) for part in options.int8.split()]
        contestants.append(maekit("int8", arguments))
        if arguments[0] != str(encoder):
            loops.append(("int8", Path(arguments[0])))
    if options.lightly_python and wanted(options, "lightly-train"):
        checkpoint = folder / "lightly.ckpt"
        with reporting("lightly-train"):
            run([options.lightly_python, HERE / "peers/lightly_checkpoint.py", checkpoint, *converted], folder)
            command = options.lightly_python.with_name("lightly-train")
            contestants += [lightly(command, checkpoint, precision) for precision in ("fp32", "bf16")]
    usual = ["--threads", cores(), "--workers", WORKERS, "--batch-size", TORCH_BATCH]
    if wanted(options, "timm"):
        for precision in ("fp32", "bf16"):
            arguments = [*converted, "--precision", precision, *usual]
            contestants.append(loop("timm", precision, "timm_loop", [], arguments))
    if wanted(options, "transformers"):
        pretrained = folder / "transformers"
        with reporting("transformers"):
            convert = ["--convert", weights, "--preprocess", spec]
            run([sys.executable, HERE / "peers/transformers_loop.py", pretrained, *convert], folder)
            for precision in ("fp32", "bf16"):
                arguments = ["--precision", precision, *usual]
                contestants.append(loop("transformers", precision, "transformers_loop", [pretrained], arguments))
    if wanted(options, "onnxruntime"):
        for precision, file in loops:
            batch = ["--batch-size", ORT_BATCH]
            contestants.append(loop("onnxruntime", precision, "onnxruntime_loop", [file], batch))
            threads = [*batch, "--decoders", cores()]
            contestants.append(loop("onnxruntime threads", precision, "onnxruntime_loop", [file], threads))
    return contestants


def wanted(options: argparse.Namespace, name: str) -> bool:
    return not options.only or any(name.startswith(word) for word in options.only)


def maekit(precision: str, model: list[object]) -> Contestant:
    def command(images: Images, out: Path) -> list[object]:
        return [*MAEKIT, "embed", *model, images.shards, "--out", out, "--device", "cpu", "--json"]

    return Contestant("maekit", precision, command, parquet_rows)


def lightly(program: Path, checkpoint: Path, precision: str) -> Contestant:
    theirs = {"fp32": "32-true", "bf16": "bf16-mixed"}[precision]

    def command(images: Images, out: Path) -> list[object]:
        return [
            program,
            "embed",
            f"out={out}",
            f"data={images.squares}",
            f"checkpoint={checkpoint}",
            "format=torch",
            "accelerator=cpu",
            f"precision={theirs}",
            f"batch_size={TORCH_BATCH}",
            f"num_workers={WORKERS}",
        ]

    return Contestant("lightly-train", precision, command, lightly_rows)


def loop(name: str, precision: str, script: str, first: list[object], last: list[object]) -> Contestant:
    def command(images: Images, out: Path) -> list[object]:
        return [sys.executable, HERE / "peers" / f"{script}.py", *first, images.folder, out.with_suffix(".npy"), *last]

    return Contestant(name, precision, command, lambda out: np.load(out.with_suffix(".npy")))


MAEKIT = (sys.executable, "-m", "maekit")


def parquet_rows(out: Path) -> np.ndarray:
    table = pq.read_table(out, columns=["key", "embedding"]).sort_by("key")
    return np.stack(table["embedding"].to_numpy())


def lightly_rows(out: Path) -> np.ndarray:
    import torch

    saved = torch.load(out)
    order = sorted(range(len(saved["filenames"])), key=saved["filenames"].__getitem__)
    return torch.nn.functional.normalize(saved["embeddings"].float(), dim=-1).numpy()[order]


def lowest_cosine(rows: np.ndarray, reference: np.ndarray) -> float:
    return float((rows * reference).sum(1).min())


def make_encoder(timm_name: str, shards: Path, run_folder: Path, encoder: Path) -> None:
    training = ["--model", timm_name, "--steps", 2, "--batch-size", 16, "--no-tensorboard", "--device", "cpu"]
    run([*MAEKIT, "pretrain", shards, "--out", run_folder, *training], encoder.parent)
    run([*MAEKIT, "export", run_folder, "--out", encoder], encoder.parent)


def preprocess_of(encoder: Path) -> str:
    (described,) = [entry.value for entry in onnx.load(encoder).metadata_props if entry.key == "maekit"]
    return json.dumps(json.loads(described)["preprocess"])


# Running them


def run(command: list[object], cwd: Path) -> tuple[float, float, str]:
    """Run a command in a new process: -> seconds, the share of all cores' time that it used, its standard output."""
    before_cpu, before = cpu_of_children(), time.perf_counter()
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        start_new_session=True,
    )
    try:
        said, complained = process.communicate(timeout=LONGEST)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise Failed(f"no end after {LONGEST:.0f} seconds") from error
        raise
    seconds = time.perf_counter() - before
    if process.returncode:
        raise Failed(f"exit {process.returncode}\n" + "\n".join((complained or said).splitlines()[-12:]))
    return seconds, (cpu_of_children() - before_cpu) / (seconds * cores()), said


def fresh(box: Path) -> Path:
    """Return a path in a folder that holds nothing."""
    shutil.rmtree(box, ignore_errors=True)
    box.mkdir()
    return box / "rows"


def cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@contextlib.contextmanager
def reporting(name: str):
    """Print what failed, and go on."""
    try:
        yield
    except (Failed, OSError, ValueError, KeyError, RuntimeError) as error:
        print(f"  {name} is left out: {error}")


@contextlib.contextmanager
def dropping(contestant: Contestant, contestants: list[Contestant]):
    """Print what failed, and go on without it."""
    done = False
    with reporting(f"{contestant.name}, {contestant.precision}"):
        yield
        done = True
    if not done:
        contestants.remove(contestant)


def versions(lightly_python: Path | None) -> dict[str, str]:
    names = ("maekit", "onnxruntime-gpu", "onnxruntime", "torch", "torchvision", "timm", "transformers", "pillow")
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if lightly_python:
        code = (
            "from importlib.metadata import version;"
            "print(*(version(name) for name in ('lightly-train', 'torch', 'timm', 'pytorch-lightning')))"
        )
        theirs = subprocess.run([lightly_python, "-c", code], capture_output=True, text=True).stdout.split()
        found |= dict(zip(("lightly-train", "its torch", "its timm", "its lightning"), theirs, strict=False))
    return found


# The images


Sample = dict[str, bytes]  # members by extension


def read_samples(spec: str) -> list[Sample]:
    """Read the samples that have an image from local shards."""
    samples: list[Sample] = []
    for shard in find_shards(spec):
        here: dict[str, Sample] = collections.defaultdict(dict)
        with tarfile.open(shard.path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                here[key][extension.lower()] = tar.extractfile(member).read()
        samples += [sample for sample in here.values() if any(extension in FILES for extension in sample)]
    return samples


def write_images(samples: list[Sample], count: int, folder: Path) -> Images:
    """Write `count` images as shards of 64 and as files; where there are fewer samples, they come again."""
    shards, files = folder / "shards", folder / "files"
    shards.mkdir(parents=True)
    files.mkdir()
    chosen = enumerate(itertools.islice(itertools.cycle(samples), count))
    for number, batch in enumerate(iter(lambda: list(itertools.islice(chosen, 64)), [])):
        with tarfile.open(shards / f"{number:03d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, sample in batch:
                for extension, data in sample.items():
                    info = tarfile.TarInfo(f"{key:06d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                    if extension in FILES:
                        (files / info.name).write_bytes(data)
    return Images(count, shards, files, files)


def write_alike(samples: list[Sample], folder: Path) -> Images:
    """Write images that need no more resizing: 256 x 256, and what is cut from them, 224 x 224."""
    prepared, squares = [], folder / "squares"
    squares.mkdir(parents=True)
    for number, sample in enumerate(samples[:ALIKE]):
        data = next(data for extension, data in sample.items() if extension in FILES)
        image = Image.open(io.BytesIO(data)).convert("RGB").resize((256, 256), Image.Resampling.BICUBIC)
        image.crop((16, 16, 240, 240)).save(squares / f"{number:06d}.png")
        file = io.BytesIO()
        image.save(file, "png")
        prepared.append({"png": file.getvalue()})
    images = write_images(prepared, len(prepared), folder)
    return Images(images.count, images.shards, images.folder, squares)


if __name__ == "__main__":
    main()
