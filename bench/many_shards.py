"""A set of 10⁵ shards with 10³ samples each, simulated: start-up, memory, and the rate of the order.

    python bench/many_shards.py [--shards 100000] [--samples 1000] [--json FILE]

The shards are hard links to ten small tars, and so are their cached indexes: names, sizes and times are real, bytes
are shared. Three starts, each in a process of its own: with the indexes cached; with the catalogue too, as every start
after the first; and after a hundredth of the shards was touched. Then the order, from the middle of an epoch.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

BASES = 10
START = """
import json, resource, sys, time
before = time.perf_counter()
from maekit.shards.order import Order
from maekit.shards.read import open_shards
from maekit.shards.spec import find_shards
found = find_shards(sys.argv[1])
listed = time.perf_counter()
shards = open_shards(found)
opened = time.perf_counter()
order = Order(shards.counts, seed=0, digest=shards.digest)
middle = shards.samples // 2
first = order.slice(middle, middle + 256)
started = time.perf_counter()
megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for step in range(1000):
    order.slice(middle + 256 * step, middle + 256 * (step + 1))
sliced = time.perf_counter()
for shard, ordinal in zip(first.shards.tolist(), first.ordinals.tolist()):
    shards.index(shard).image(ordinal)
print(json.dumps({
    "samples": shards.samples, "list_seconds": listed - before, "open_seconds": opened - listed,
    "order_seconds": started - opened, "start_seconds": started - before, "megabytes": megabytes,
    "order_samples_per_second": 256_000 / (sliced - started),
    "index_microseconds": (time.perf_counter() - sliced) / 256 * 1e6,
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["MAEKIT_CACHE"] = str(root / "cache")
        _make(root, options.shards, options.samples)
        figures = {"indexes cached": _start(root)}
        figures["catalogue"] = _start(root)
        for number in range(options.shards // 100):
            path = _shard(root, number)  # a copy of its own, with a time of its own
            data = path.read_bytes()
            path.unlink()
            path.write_bytes(data)
        figures["one in 100 new"] = _start(root)
    for name, row in figures.items():
        start = f"start {row['start_seconds']:.1f} s (list {row['list_seconds']:.1f}, open {row['open_seconds']:.1f})"
        order = f"order {row['order_samples_per_second']:,.0f} samples/s"
        index = f"open an index {row['index_microseconds']:.0f} µs"
        print(f"{name:<16} {row['samples']:,} samples: {start}, {row['megabytes']:.0f} MB, {order}, {index}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def _shard(root: Path, number: int) -> Path:
    return root / "shards" / f"{number // 1000:03d}" / f"{number:06d}.tar"


def _make(root: Path, shards: int, samples: int) -> None:
    from maekit.shards.index import _cache_path, build_index

    before = time.perf_counter()
    bases = []
    for base in range(BASES):
        path = root / f"base-{base}.tar"
        with tarfile.open(path, "w") as tar:
            for number in range(samples):
                for extension, size in (("jpg", base), ("cls", 1)):
                    info = tarfile.TarInfo(f"{number:08d}.{extension}")
                    info.size = size
                    tar.addfile(info, io.BytesIO(bytes(size)))
        index = root / f"base-{base}.index"
        index.write_bytes(build_index(path).to_bytes())
        bases.append((path, index))
    for number in range(shards):
        path, cached = _shard(root, number), _cache_path(_shard(root, number))
        for folder in (path.parent, cached.parent):
            folder.mkdir(parents=True, exist_ok=True)
        os.link(bases[number % BASES][0], path)
        os.link(bases[number % BASES][1], cached)
    print(f"made {shards:,} shards in {time.perf_counter() - before:.0f} s", flush=True)


def _start(root: Path) -> dict[str, float]:
    command = [sys.executable, "-c", START, str(root / "shards")]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    main()
