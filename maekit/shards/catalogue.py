"""Summary of a whole set of shards in one cache file, so that no single index needs to be opened.

With it, a set of 10⁵ shards opens in seconds. The file is named by the list of paths, so its rows need no names. A row
is valid only while its shard has the recorded size and modification time.
"""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maekit.shards import columns as columns_file
from maekit.shards.index import ShardIndex
from maekit.system import files
from maekit.system.errors import MaekitError

MAGIC = b"MAEKCAT1"
_NUMBERS = ("size", "mtime_ns", "samples")
_COLUMNS: dict[str, np.dtype[Any]] = {**dict.fromkeys(_NUMBERS, np.dtype("<i8")), "digest": np.dtype("u1")}
_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class CatalogueRow:
    """Summary of one shard's index: bytes, modification time in nanoseconds, samples, and digest (hexadecimal)."""

    size: int
    mtime_ns: int
    samples: int
    digest: str

    @classmethod
    def of(cls, index: ShardIndex) -> "CatalogueRow":
        """Return the row of an index."""
        return cls(index.size, index.mtime_ns, index.samples, index.digest)


def recall(paths: Sequence[Path]) -> list[CatalogueRow | None]:
    """Return the row of each shard; None if it has none or has changed since."""
    raw = np.empty(0, np.uint8)
    with contextlib.suppress(OSError):
        raw = np.fromfile(_file(paths), np.uint8)
    parsed = columns_file.from_bytes(MAGIC, _COLUMNS, raw)
    if parsed is None or set(parsed[1]) != set(_COLUMNS):
        return [None] * len(paths)
    columns = parsed[1]
    digests = columns["digest"].tobytes().hex()
    rows: list[CatalogueRow | None] = []
    numbers = zip(*(columns[name].tolist() for name in _NUMBERS), strict=True)
    for number, (path, (size, mtime_ns, samples)) in enumerate(zip(paths, numbers, strict=False)):
        at = number * 2 * _DIGEST_BYTES
        row = CatalogueRow(size, mtime_ns, samples, digests[at : at + 2 * _DIGEST_BYTES])
        try:
            status = os.stat(path)
            rows.append(row if (status.st_size, status.st_mtime_ns) == (size, mtime_ns) else None)
        except OSError:
            rows.append(None)
    return rows + [None] * (len(paths) - len(rows))


def remember(paths: Sequence[Path], rows: Sequence[CatalogueRow]) -> None:
    """Keep the rows for the next start; if the cache cannot be written, that start only takes longer."""
    columns = {name: np.array([getattr(row, name) for row in rows], "<i8") for name in _NUMBERS}
    columns["digest"] = np.frombuffer(bytes.fromhex("".join(row.digest for row in rows)), "u1")
    with contextlib.suppress(MaekitError):
        files.write_atomically(_file(paths), columns_file.to_bytes(MAGIC, {}, columns))


def _file(paths: Sequence[Path]) -> Path:
    name = hashlib.sha256(b"\0".join(map(os.fsencode, paths))).hexdigest()
    return files.cache_directory() / "sets" / f"{name}.catalogue"
