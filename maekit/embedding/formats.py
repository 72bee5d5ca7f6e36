"""The files of embeddings. They are written one group of rows at a time, so memory does not grow with the shard.

parquet   OUT/a/000.parquet                       key, shard, index, embedding, and the sidecars
npy       OUT/img_emb/img_emb_00017.npy           float32 or float16 [rows, dim], little-endian, C order
          OUT/metadata/metadata_00017.parquet     key, shard, index, and the sidecars, in the same row order

The npy layout is what clip-retrieval writes and autofaiss and embedding-reader read.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from maekit.system import files

DTYPES = {"float32": pa.float32(), "float16": pa.float16()}
FORMATS = ("parquet", "npy")
# Rows per group: fixed, so that files do not depend on the batch size.
_GROUP = 4096
_GROUP_BYTES = 64 << 20  # of sidecars
# Sidecars with these extensions are stored as text, all others as bytes.
_TEXT = frozenset(("json", "jsonl", "txt", "text", "cls", "caption", "url", "id", "html", "xml", "csv", "tsv", "yaml"))


@dataclass
class Rows:
    """Consecutive rows of one shard.

    Attributes:
        keys: keys of the samples.
        ordinals: positions of the samples in the shard.
        embeddings: blocks of float32 `[n, dim]`, one after the other.
        kept: the sidecars' bytes, by extension; None where a sample has none.
    """

    keys: list[str] = field(default_factory=list)
    ordinals: list[int] = field(default_factory=list)
    embeddings: list[NDArray[np.float32]] = field(default_factory=list)
    kept: dict[str, list[bytes | None]] = field(default_factory=dict)

    def append(
        self, keys: list[str], ordinals: list[int], embeddings: NDArray[Any], kept: dict[str, list[bytes | None]]
    ) -> None:
        """Append rows."""
        self.keys += keys
        self.ordinals += ordinals
        self.embeddings.append(embeddings)
        for extension, values in kept.items():
            self.kept.setdefault(extension, []).extend(values)

    def __len__(self) -> int:
        return len(self.keys)

    def group(self) -> int | None:
        """Return how many rows the next group takes, from the rows alone; None while there are too few."""
        taken = 0
        for row, members in enumerate(zip(*self.kept.values(), strict=True), 1):
            taken += sum(len(member) for member in members if member is not None)
            if row == _GROUP or taken >= _GROUP_BYTES:
                return row
        return _GROUP if len(self) >= _GROUP else None

    def split(self, count: int) -> tuple["Rows", "Rows"]:
        """Return the first `count` rows, and the rest."""
        whole = np.concatenate(self.embeddings)
        kept = [(extension, values[:count], values[count:]) for extension, values in self.kept.items()]
        first = Rows(self.keys[:count], self.ordinals[:count], [whole[:count]], {e: a for e, a, _ in kept})
        return first, Rows(self.keys[count:], self.ordinals[count:], [whole[count:]], {e: b for e, _, b in kept})


@dataclass(frozen=True)
class Layout:
    """Names and contents of a shard's files.

    Attributes:
        format: `parquet` or `npy`.
        dtype: dtype of the stored embeddings, `float32` or `float16`.
        dim: length of an embedding.
        keep: extensions of the sidecars to store.
        footer: description of the model in the parquet metadata, as JSON values.
    """

    format: str
    dtype: str
    dim: int
    keep: tuple[str, ...]
    footer: dict[str, Any]

    def paths(self, name: str, number: int | None) -> list[str]:
        """Return the files of a shard, relative to the output directory.

        Args:
            name: name of the shard, without `.tar`.
            number: number of the shard; only the npy layout uses it.
        """
        if self.format == "parquet":
            return [f"{name}.parquet"]
        return [f"img_emb/img_emb_{number:05d}.npy", f"metadata/metadata_{number:05d}.parquet"]

    def schema(self, *, with_embeddings: bool) -> pa.Schema:
        """Return the schema of a parquet file."""
        columns = [
            pa.field("key", pa.string(), nullable=False),
            pa.field("shard", pa.string(), nullable=False),
            pa.field("index", pa.int32(), nullable=False),
        ]
        if with_embeddings:
            columns.append(pa.field("embedding", pa.list_(DTYPES[self.dtype], self.dim), nullable=False))
        columns += [pa.field(extension, pa.string() if extension in _TEXT else pa.binary()) for extension in self.keep]
        return pa.schema(columns, metadata={"maekit": json.dumps(self.footer)})


class _File(Protocol):
    def write(self, rows: Rows) -> None:
        """Write one group."""

    def end(self) -> None:
        """Write the end of the file."""

    def drop(self) -> None:
        """Make sure that nothing more is written."""


class ShardFiles:
    """Writer of the files of one shard. They stay in the scratch directory until they are published.

    Args:
        layout: names and contents of the files.
        root: the output directory.
        paths: final paths of the files, relative to `root`.
        shard: the shard's name.
        scratch: directory for unfinished files.
    """

    def __init__(self, layout: Layout, root: Path, paths: Sequence[str], shard: str, scratch: Path) -> None:
        self._layout, self._root, self._paths, self._shard, self._scratch = layout, root, paths, shard, scratch
        self._stack = contextlib.ExitStack()
        self._files: list[_File] = []
        self._waiting = Rows()
        self.rows = 0

    def append(self, rows: Rows) -> None:
        """Add rows, and write every group that is full.

        Raises:
            MaekitError: a file cannot be written; names the path.
        """
        self.rows += len(rows)
        if len(rows):
            self._waiting.append(rows.keys, rows.ordinals, np.concatenate(rows.embeddings), rows.kept)
        while (count := self._waiting.group()) is not None:
            group, self._waiting = self._waiting.split(count)
            self._write(group)

    def complete(self) -> None:
        """Write the remaining rows; the files stay in the scratch directory.

        Raises:
            MaekitError: a file cannot be written; names the path.
        """
        if len(self._waiting):
            self._write(self._waiting)
            self._waiting = Rows()
        for path, file in zip(self._paths, self._files, strict=False):
            with self._told(path):
                file.end()

    def publish(self) -> None:
        """Make the files durable and move them to their final paths; a shard without rows has no files.

        Raises:
            MaekitError: a file cannot be written; names the path.
        """
        self._stack.close()

    def abandon(self) -> None:
        """Delete the unfinished files."""
        for file in self._files:
            file.drop()
        self._stack.__exit__(_Abandoned, _Abandoned(), None)

    def _write(self, group: Rows) -> None:
        if not self._files:
            for path in self._paths:
                with self._told(path):  # opening a file already writes its first bytes
                    self._files.append(self._open(path))
        for path, file in zip(self._paths, self._files, strict=True):
            with self._told(path):
                file.write(group)

    @contextlib.contextmanager
    def _told(self, path: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise files.write_failure(self._root / path, error) from error

    def _open(self, path: str) -> _File:
        stream = self._stack.enter_context(files.atomic_file(self._root / path, scratch=self._scratch))
        if path.endswith(".npy"):
            return _Npy(stream, self._layout)
        return _Parquet(stream, self._layout, self._shard, with_embeddings=self._layout.format == "parquet")


class _Abandoned(Exception):
    pass


class _Parquet:
    def __init__(self, stream: IO[bytes], layout: Layout, shard: str, *, with_embeddings: bool) -> None:
        self._layout, self._shard, self._with_embeddings = layout, shard, with_embeddings
        self._schema = layout.schema(with_embeddings=with_embeddings)
        compression = dict.fromkeys(("key", "shard", "index", *layout.keep), "zstd")
        if with_embeddings:
            compression["embedding.list.element"] = "none"  # embedding floats do not compress
        self._writer = pq.ParquetWriter(
            stream,
            self._schema,
            compression=compression,
            use_dictionary=["shard"],
            column_encoding={"index": "DELTA_BINARY_PACKED"},
        )

    def write(self, rows: Rows) -> None:
        columns = [
            pa.array(rows.keys, pa.string()),
            pa.array([self._shard] * len(rows), pa.string()),
            pa.array(rows.ordinals, pa.int32()),
        ]
        if self._with_embeddings:
            values = np.concatenate(rows.embeddings).astype(self._layout.dtype, copy=False)
            flat = pa.array(np.ascontiguousarray(values).ravel(), DTYPES[self._layout.dtype])
            columns.append(pa.FixedSizeListArray.from_arrays(flat, self._layout.dim))
        columns += [_kept(extension, rows.kept[extension]) for extension in self._layout.keep]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))

    def end(self) -> None:
        self._writer.close()

    def drop(self) -> None:
        self._writer.is_open = False  # else it writes its footer when garbage-collected


def _kept(extension: str, values: list[bytes | None]) -> pa.Array:
    if extension not in _TEXT:
        return pa.array(values, pa.binary())
    # Bytes that are not UTF-8 become \xNN: a caption in another encoding must not cost its sample the embedding.
    texts = [None if value is None else value.decode("utf-8", "backslashreplace") for value in values]
    return pa.array(texts, pa.string())


class _Npy:
    def __init__(self, stream: IO[bytes], layout: Layout) -> None:
        self._stream, self._dim, self._rows = stream, layout.dim, 0
        self._dtype = np.dtype(layout.dtype).newbyteorder("<")
        self._header()

    def write(self, rows: Rows) -> None:
        values = np.concatenate(rows.embeddings).astype(self._dtype, copy=False)
        self._stream.write(np.ascontiguousarray(values).tobytes())
        self._rows += len(values)

    def end(self) -> None:
        self._stream.seek(0)
        self._header()

    def drop(self) -> None:
        pass

    def _header(self) -> None:
        """Write the header; numpy pads it, so a later rewrite with more rows takes the same number of bytes."""
        descr = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self._rows, self._dim)}
        np.lib.format.write_array_header_1_0(self._stream, header)
