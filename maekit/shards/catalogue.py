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

MAGIC = b"MAEKCAT2"
_NUMBERS = ("size", "mtime_ns", "samples", "several", "changed")
_COLUMNS: dict[str, np.dtype[Any]] = {**dict.fromkeys(_NUMBERS, np.dtype("<i8")), "digest": np.dtype("u1")}
_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class CatalogueRow:
    """Summary of one shard's index.

    Attributes:
        size: bytes of the shard.
        mtime_ns: its modification time, in nanoseconds.
        samples: number of samples.
        several: number of samples of which it is open which of several images is meant.
        changed: number of samples whose image is another one than by the choice `first`.
        digest: digest of the index, hexadecimal.
        unused: number of images that are not the image of their sample, by extension.
    """

    size: int
    mtime_ns: int
    samples: int
    several: int
    changed: int
    digest: str
    unused: dict[str, int]

    @classmethod
    def of(cls, index: ShardIndex) -> "CatalogueRow":
        """Return the row of an index."""
        images = index.count_images()
        numbers = (index.size, index.mtime_ns, index.samples, images.several, images.changed)
        return cls(*numbers, index.digest, images.unused)


def recall(paths: Sequence[Path]) -> list[CatalogueRow | None]:
    """Return the row of each shard; None if it has none or has changed since."""
    raw = np.empty(0, np.uint8)
    with contextlib.suppress(OSError):
        raw = np.fromfile(_file(paths), np.uint8)
    parsed = columns_file.from_bytes(MAGIC, _COLUMNS, raw)
    if parsed is None or set(parsed[1]) != set(_COLUMNS):
        return [None] * len(paths)
    header, columns = parsed
    digests, unused = columns["digest"].tobytes().hex(), header.get("unused", {})
    rows: list[CatalogueRow | None] = []
    numbers = zip(*(columns[name].tolist() for name in _NUMBERS), strict=True)
    for number, (path, values) in enumerate(zip(paths, numbers, strict=False)):
        at = number * 2 * _DIGEST_BYTES
        size, mtime_ns, samples, several, changed = values
        row = CatalogueRow(
            size, mtime_ns, samples, several, changed, digests[at : at + 2 * _DIGEST_BYTES], unused.get(str(number), {})
        )
        try:
            status = os.stat(path)
            rows.append(row if (status.st_size, status.st_mtime_ns) == (row.size, row.mtime_ns) else None)
        except OSError:
            rows.append(None)
    return rows + [None] * (len(paths) - len(rows))


def remember(paths: Sequence[Path], rows: Sequence[CatalogueRow]) -> None:
    """Keep the rows for the next start; if the cache cannot be written, that start only takes longer."""
    columns = {name: np.array([getattr(row, name) for row in rows], "<i8") for name in _NUMBERS}
    columns["digest"] = np.frombuffer(bytes.fromhex("".join(row.digest for row in rows)), "u1")
    header = {"unused": {number: row.unused for number, row in enumerate(rows) if row.unused}}
    with contextlib.suppress(MaekitError):
        files.write_atomically(_file(paths), columns_file.to_bytes(MAGIC, header, columns))


def _file(paths: Sequence[Path]) -> Path:
    name = hashlib.sha256(b"\0".join(map(os.fsencode, paths))).hexdigest()
    return files.cache_directory() / "sets" / f"{name}.catalogue"
