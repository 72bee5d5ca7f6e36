"""Embedding against its own limit: decoding alone, the session alone, and the whole, in one run, on a CPU.

    python bench/embed.py encoder.onnx SHARDS [--repeat 3] [--limit N] [--json FILE]

Decoding and session share the cores of a CPU, so the limit there is 1 / (1/decode + 1/session). Medians over repeats.
The whole is measured from the first shard to the last commit, and as a command with its start. Also: what importing
`maekit.embedding` costs, the time from start to the first batch, and the memory of the command and its decoders.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from embed_memory import proportional_mb

from maekit.embedding.decode_pool import Chunk, DecodePool, Ring
from maekit.embedding.inputs import Images, Scope, find_inputs
from maekit.embedding.pipeline import embed_padded
from maekit.embedding.session import EncoderSession
from maekit.shards.cache import RemoteCache
from maekit.system.machine import cores as available_cores

FIRST_BATCH = """
import sys, time
import maekit.embedding.session as session
run = session.EncoderSession._run
def first(self, images):
    print(time.time())
    sys.stdout.flush()
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
session.EncoderSession._run = first
from maekit.config.embed import EmbedConfig
from maekit.embedding.embed import embed
embed(EmbedConfig(sys.argv[1], (sys.argv[2],), sys.argv[3], device="cpu"))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("shards")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    cores = available_cores()
    rates: dict[str, list[float]] = {"decode": [], "session": [], "end_to_end": [], "command": []}
    peaks = []
    with DecodePool(cores) as pool:  # forked before the session has threads
        session = EncoderSession(options.model, device="cpu", threads=1)
        parts = [part.open(RemoteCache()) for part in find_inputs([options.shards])]
        for _ in range(options.repeat):
            whole = _embed(options)
            batch_size = whole["batch_size"]
            count = whole["rows"] + whole["errors"]
            rates["end_to_end"].append(whole["images_per_second"])
            rates["command"].append(count / whole["seconds"])
            peaks.append(whole["peak_mb"])
            decoded, seconds = _decode(pool, session, parts, count, batch_size)
            rates["decode"].append(count / seconds)
            starts = range(0, count, batch_size)
            before = time.perf_counter()
            with ThreadPoolExecutor(cores) as concurrency:  # as embed runs it: one batch on each core
                batches = [decoded[start : start + batch_size] for start in starts]
                list(concurrency.map(lambda batch: embed_padded(session, batch, len(batch)), batches))
            rates["session"].append(count / (time.perf_counter() - before))
    decode, alone, whole_rate, command = (statistics.median(rates[name]) for name in rates)
    limit = 1 / (1 / decode + 1 / alone)
    shown = (("decode alone", decode), ("session alone", alone), ("limit", limit), ("end to end", whole_rate))
    for name, value in (*shown, ("whole command", command)):
        print(f"{name:<14} {value:9.1f} img/s")
    share = statistics.median(
        rate / (1 / (1 / d + 1 / s))
        for rate, d, s in zip(rates["end_to_end"], rates["decode"], rates["session"], strict=True)
    )
    print(f"end to end / limit: {share:.3f}   ({count} images, batches of {batch_size}, {cores} cores)")
    first, imported = _first_batch(options), _import()
    print(
        f"start to first batch: {first:.2f} s; import maekit.embedding.embed: {imported[0]:.2f} s, {imported[1]:.0f} MB"
    )
    print(f"peak memory of the command and its decoders: {max(peaks):.0f} MB")
    if options.json:
        figures = {
            **{"cores": cores, "images": count, "batch_size": batch_size, "limit": limit, "share": share},
            **{"first_batch_seconds": first, "import_seconds": imported[0], "import_mb": imported[1]},
            **{"peak_mb": max(peaks), "rates": rates},
        }
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def _embed(options: argparse.Namespace) -> dict:
    """Run `maekit embed` as a command; return its summary, with seconds and memory."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "maekit", "embed", str(options.model), options.shards, "--out", out]
        command += ["--device", "cpu", "--json"]
        command += ["--limit", str(options.limit)] if options.limit else []
        command += ["--batch-size", str(options.batch_size)] if options.batch_size else []
        before = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            peak = 0.0
            while process.poll() is None:
                peak = max(peak, proportional_mb(process.pid))
                time.sleep(0.2)
            seconds = time.perf_counter() - before
            assert process.stdout is not None
            summary = json.loads(process.stdout.read().splitlines()[-1])
    return {**summary, "seconds": seconds, "peak_mb": peak}


def _decode(pool: DecodePool, session: EncoderSession, parts: list[Images], count: int, batch_size: int):
    """Decode all images with the decoders of embedding: -> uint8 `[count, H, W, 3]`, seconds."""
    preprocess = session.description.preprocess
    ring = Ring(1, count, preprocess.size)
    pool.use(ring, preprocess, yielding=False)
    size = min(32, max(4, batch_size // 8))
    before = time.perf_counter()
    done, flying = 0, []
    for part in parts:
        ordinals = list(Scope(None, count - done).ordinals(part))
        for start in range(0, len(ordinals), size):
            chunk = [part.location(ordinal) for ordinal in ordinals[start : start + size]]
            locations = [location for location in chunk if location is not None]
            flying.append(pool.submit(Chunk(0, done + start, part, locations)))
        done += len(ordinals)
    for future in flying:
        future.result()
    seconds = time.perf_counter() - before
    ring.close()
    return np.array(ring.batches[0]), seconds


def _first_batch(options: argparse.Namespace) -> float:
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-c", FIRST_BATCH, str(options.model), options.shards, out]
        before = time.time()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(done.stdout) - before


def _import() -> tuple[float, float]:
    # The largest size since exec; that of getrusage is the parent's where it was larger.
    script = "import maekit.embedding.embed; print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    before = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return time.perf_counter() - before, int(done.stdout) / 1024


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
