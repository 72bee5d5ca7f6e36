"""Embedding against its own limit: decoding alone, the session alone, and the whole pipeline, in one run.

    python bench/embed.py encoder.onnx SHARDS [--repeat 3] [--json FILE]

Decoding and session share the cores of a CPU, so the limit there is 1 / (1/decode + 1/session). Medians over repeats.
"""

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from maekit.embedding.pipeline import embed_padded
from maekit.embedding.run import EmbedConfig, embed
from maekit.embedding.session import EncoderSession
from maekit.machine import cores as available_cores
from maekit.shards.read import open_shards
from maekit.shards.spec import find_shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("shards")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    cores = available_cores()
    session = EncoderSession(options.model, device="cpu")
    shards = open_shards(find_shards(options.shards))
    rates: dict[str, list[float]] = {"decode": [], "session": [], "end_to_end": []}
    for _ in range(options.repeat):
        images, seconds = _decode_all(session, shards, cores)
        rates["decode"].append(len(images) / seconds)
        before = time.perf_counter()
        for start in range(0, len(images), options.batch_size):
            embed_padded(session, images[start : start + options.batch_size], options.batch_size)
        rates["session"].append(len(images) / (time.perf_counter() - before))
        with tempfile.TemporaryDirectory() as out:
            config = EmbedConfig(str(options.model), (options.shards,), out, "cpu", batch_size=options.batch_size)
            before = time.perf_counter()
            embed(config)
            rates["end_to_end"].append(len(images) / (time.perf_counter() - before))
    decode, alone, whole = (statistics.median(rates[name]) for name in ("decode", "session", "end_to_end"))
    limit = 1 / (1 / decode + 1 / alone)
    for name, value in (("decode alone", decode), ("session alone", alone), ("limit", limit), ("end to end", whole)):
        print(f"{name:<14} {value:9.1f} img/s")
    print(f"end to end / limit: {whole / limit:.3f}   ({shards.samples} images, {cores} cores)")
    if options.json:
        figures = {"cores": cores, "images": shards.samples, "limit": limit, "share": whole / limit, "rates": rates}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def _decode_all(session: EncoderSession, shards, cores: int):
    reader = shards.reader()  # positional reads need no lock
    places = [shards.locate(number) for number in range(shards.samples)]
    prepare = session.description.preprocess
    before = time.perf_counter()
    with ThreadPoolExecutor(cores) as pool:
        images = list(
            pool.map(lambda place: prepare(reader.read_image(shards.index(place[0]), place[1])), places, chunksize=8)
        )
    seconds = time.perf_counter() - before
    reader.close()
    return images, seconds


if __name__ == "__main__":
    main()
