"""What the parts of all stages share: the machine, the images, and how a part tells what it found."""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BENCH = HERE.parent
DATA = ROOT / ".gpu" / "data"
sys.path.insert(0, str(BENCH))  # the measurements beside this folder are modules of each other

# Settings of a model so small that a CPU trains it in seconds.
TINY = {
    "model.name": "vit_tiny_patch16_224",
    "model.image_size": 32,
    "model.patch_size": 8,
    "model.width": 32,
    "model.depth": 1,
    "model.heads": 2,
    "model.decoder_width": 32,
    "model.decoder_depth": 1,
    "model.decoder_heads": 2,
}


class Failed(Exception):
    """Something is not as it must be; the figures found so far are kept."""

    def __init__(self, said: str, figures: Mapping[str, Any] | None = None) -> None:
        super().__init__(said)
        self.figures = figures or {}


class Skipped(Exception):
    """There is nothing to find out here, and why."""


@dataclass(frozen=True)
class Found:
    """What a part found.

    Attributes:
        headline: the figure or two that matter most, in a few words.
        figures: all of them, as JSON values.
    """

    headline: str
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class Bench:
    """Where a part runs.

    Attributes:
        stage: its name.
        work: a folder that the parts of a stage share.
        dry: whether this is a dry run, on a CPU with tiny sizes.
        quick: whether it must also be over in seconds.
    """

    stage: str
    work: Path
    dry: bool
    quick: bool

    @property
    def device(self) -> str:
        """`cuda`, or `cpu` in a dry run."""
        return "cpu" if self.dry else "cuda"

    @property
    def shards(self) -> Path:
        """Where the part `data` leaves the shards."""
        return self.work / "shards"

    def read(self, name: str) -> dict[str, Any]:
        """Return what another part of this stage left in a JSON file."""
        path = self.work / name
        if not path.exists():
            raise Skipped(f"the part before it left no {name}")
        return dict(json.loads(path.read_text()))

    def write(self, name: str, values: Mapping[str, Any]) -> None:
        """Leave values for other parts of this stage."""
        (self.work / name).write_text(json.dumps(values))


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def summary(self) -> dict[str, Any]:
        """The object that `--json` prints last."""
        return dict(json.loads(self.out.strip().splitlines()[-1]))


def maekit_command(*arguments: object) -> list[str]:
    """Return the command line that runs this tree's `maekit`."""
    return [sys.executable, "-m", "maekit", *map(str, arguments)]


def maekit(bench: Bench, *arguments: object, expect: int = 0) -> Ended:
    """Run a command to its end; what it says goes to the log as well.

    Raises:
        Failed: another exit code than expected, or a traceback.
    """
    command = maekit_command(*arguments)
    done = subprocess.run(command, cwd=bench.work, capture_output=True, text=True, check=False)
    ended = Ended(done.returncode, done.stdout, done.stderr)
    print("$ maekit", *arguments, f"-> {ended.code}\n{ended.out}{ended.err}", file=sys.stderr, flush=True)
    if ended.code != expect or "Traceback" in ended.err:
        last = (ended.err.strip() or ended.out.strip() or "nothing was said").splitlines()[-1]
        raise Failed(f"maekit {arguments[0]} exited with {ended.code}, not {expect}: {last}")
    return ended


def script(bench: Bench, name: str, *arguments: object) -> dict[str, Any]:
    """Run a measurement of bench/ and return the JSON that it writes.

    Raises:
        Failed: it failed.
    """
    path = bench.work / f"{Path(name).stem}.json"
    command = [sys.executable, str(BENCH / name), *map(str, arguments), "--json", str(path)]
    done = subprocess.run(command, cwd=bench.work, capture_output=True, text=True, check=False)
    print("$", *command, f"-> {done.returncode}\n{done.stdout}{done.stderr}", file=sys.stderr, flush=True)
    if done.returncode:
        raise Failed(f"{name} exited with {done.returncode}: {(done.stderr.strip() or 'silent').splitlines()[-1]}")
    return dict(json.loads(path.read_text()))


def as_options(settings: Mapping[str, object]) -> list[str]:
    """Return settings as options of `maekit pretrain`."""
    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    return [text for key, value in values.items() for text in ("--set", f"{key}={value}")]


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics."""
    from maekit.runs import RunDirectory

    return RunDirectory(run).metrics()


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """Write a shard of (key, {extension: bytes}) samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            for extension, data in members.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def drawn(count: int, size: int, *, seed: int = 0) -> Iterator[tuple[bytes, int]]:
    """Draw JPEGs with structure to find, each with the number of its class."""
    import numpy as np
    from PIL import Image

    from maekit.demo.pictures import CLASSES, draw

    random = np.random.default_rng(seed)
    for number in range(count):
        file = io.BytesIO()
        label = number % len(CLASSES)
        Image.fromarray(draw(CLASSES[label], random, size)).save(file, "JPEG", quality=90)
        yield file.getvalue(), label


def run_part(stage: str, parts: Mapping[str, Callable[[Bench], Found]]) -> None:
    """Run the part that the command line names, and print what it found as the last line; exit 1 if it failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=parts)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("MAEKIT_CACHE", str(options.work / "cache"))
    if options.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same on a machine that has a GPU
    bench = Bench(stage, options.work, options.dry_run, options.quick)
    try:
        found = parts[options.part](bench)
        row = {"result": "ok", "headline": found.headline, **found.figures}
    except Skipped as reason:
        row = {"result": "skipped", "headline": str(reason)}
    except Failed as failure:
        row = {"result": "failed", "headline": str(failure), **failure.figures}
    except Exception as error:  # a part's failure is a result, whatever it is
        traceback.print_exc()
        row = {"result": "failed", "headline": f"{type(error).__name__}: {error}".splitlines()[0]}
    print(json.dumps(row), flush=True)
    sys.exit(row["result"] == "failed")
