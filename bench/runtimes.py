"""ONNX Runtime and OpenVINO on the same exported files, side by side in one run, as `maekit embed` calls them on a CPU.

    python bench/runtimes.py ENCODER.ONNX ... [--rounds 5] [--batches 4] [--json FILE]

One call per core at a time, each in one thread, batches of 8. Rates are medians over rounds in which every runtime has
its turn; start-up is opening the file, checks included. bf16 is left out where the processor has none.
"""

import argparse
import itertools
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from maekit import openvino_runtime
from maekit.diagnosis import doctor
from maekit.embedding.session import EncoderSession
from maekit.system.machine import cores

BATCH = 8
WAYS = {
    "onnxruntime": {"runtime": "onnxruntime"},
    "openvino": {"runtime": "openvino"},
    "openvino bf16": {"runtime": "openvino", "precision": "bf16"},
}


def measure(path: Path, rounds: int, batches: int) -> dict[str, Any]:
    """Return the rates of one file in images per second, and seconds of start-up."""
    ways = {
        name: way for name, way in WAYS.items() if "precision" not in way or not openvino_runtime.problem(bf16=True)
    }
    sessions, start_up = {}, {}
    for name, way in ways.items():
        began = time.perf_counter()
        sessions[name] = EncoderSession(path, device="cpu", threads=1, calls=cores(), **way)
        start_up[name] = round(time.perf_counter() - began, 2)
    height, width = sessions["onnxruntime"].description.preprocess.size
    images = np.random.default_rng(0).integers(0, 256, (BATCH, height, width, 3), dtype=np.uint8)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    with ThreadPoolExecutor(cores()) as pool:
        for number, (name, session) in itertools.product(range(rounds + 1), sessions.items()):
            began = time.perf_counter()
            list(pool.map(session, [images] * batches * cores()))
            rate = batches * cores() * BATCH / (time.perf_counter() - began)
            if number:  # the first round allocates
                rates[name].append(rate)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    return {
        "images_per_second": {name: round(rate, 1) for name, rate in medians.items()},
        "ratio": {name: round(rate / medians["onnxruntime"], 3) for name, rate in medians.items()},
        "start_up_seconds": start_up,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path, metavar="ENCODER.ONNX")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=4, help="per core and round")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    machine = {finding.subject: finding.value for finding in doctor().findings}
    found: dict[str, Any] = {
        name: machine[name] for name in ("CPU", "vector units", "ONNX Runtime", "OpenVINO") if name in machine
    }
    for path in options.models:
        found[path.stem] = measure(path, options.rounds, options.batches)
        print(path.stem, json.dumps(found[path.stem]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
