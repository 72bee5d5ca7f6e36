"""The rows of an output of `maekit embed`."""

from pathlib import Path

import pyarrow.parquet as pq


def rows(out: Path) -> dict[str, list]:
    tables = [pq.read_table(path) for path in sorted(out.rglob("*.parquet"))]
    return {name: [v for t in tables for v in t[name].to_pylist()] for name in ("key", "shard", "index", "embedding")}
