"""The files of embeddings. They are written one group of rows at a time, so memory does not grow with the shard.

parquet   OUT/a/000.parquet                       key, shard, index, embedding, and the sidecars
npy       OUT/img_emb/img_emb_00017.npy           float32 or float16 [rows, dim], little-endian, C order
          OUT/metadata/metadata_00017.parquet     key, shard, index, and the sidecars, in the same row order

The npy layout is what clip-retrieval writes and autofaiss and embedding-reader read.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from maekit.system import files

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

    def append(self, rows: "Rows") -> None:
        """Append rows."""
        self.keys += rows.keys
        self.ordinals += rows.ordinals
        self.embeddings += rows.embeddings
        for extension, values in rows.kept.items():
            self.kept.setdefault(extension, []).extend(values)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, rows: slice) -> "Rows":
        kept = {extension: values[rows] for extension, values in self.kept.items()}
        return Rows(self.keys[rows], self.ordinals[rows], [self.matrix()[rows]], kept)

    def matrix(self) -> NDArray[np.float32]:
        """Return all embeddings: `[n, dim]`."""
        return np.concatenate(self.embeddings)

    def group(self) -> int | None:
        """Return how many rows the next group takes, from the rows alone; None while there are too few."""
        taken = 0
        for row, members in enumerate(zip(*self.kept.values(), strict=True), 1):
            taken += sum(len(member) for member in members if member is not None)
            if row == _GROUP or taken >= _GROUP_BYTES:
                return row
        return _GROUP if len(self) >= _GROUP else None


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

    def schema(self) -> pa.Schema:
        """Return the schema of the parquet file."""
        required = {"key": pa.string(), "shard": pa.string(), "index": pa.int32()}
        if self.format == "parquet":
            required["embedding"] = pa.list_(pa.from_numpy_dtype(self.dtype), self.dim)
        kept = {extension: pa.string() if extension in _TEXT else pa.binary() for extension in self.keep}
        columns = [pa.field(name, kind, nullable=name in kept) for name, kind in {**required, **kept}.items()]
        return pa.schema(columns, metadata={"maekit": json.dumps(self.footer)})


class ShardFiles:
    """Writer of the files of one shard. They stay in the scratch directory until they are published.

    Args:
        layout: names and contents of the files.
        root: the output directory.
        paths: final paths of the files, relative to `root`.
        shard: the shard's name.
        scratch: directory for unfinished files.

    Attributes:
        rows: number of rows so far.
        errors: the keys without a row, as they are written to the list of errors.
    """

    def __init__(self, layout: Layout, root: Path, *, paths: list[str], shard: str, scratch: Path) -> None:
        self.paths, self.rows = paths, 0
        self.errors: list[dict[str, Any]] = []
        self._layout, self._root, self._shard, self._scratch = layout, root, shard, scratch
        self._stack = contextlib.ExitStack()
        self._files: dict[str, _Parquet | _Npy] = {}
        self._waiting = Rows()

    def append(self, rows: Rows) -> None:
        """Add rows, and write every group that is full.

        Raises:
            MaekitError: a file cannot be written; names the path.
        """
        self.rows += len(rows)
        self._waiting.append(rows)
        while (count := self._waiting.group()) is not None:
            self._write(self._waiting[:count])
            self._waiting = self._waiting[count:]

    def complete(self) -> None:
        """Write the remaining rows; the files stay in the scratch directory.

        Raises:
            MaekitError: a file cannot be written; names the path.
        """
        if len(self._waiting):
            self._write(self._waiting)
        for path, file in self._files.items():
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
        for file in self._files.values():
            if isinstance(file, _Parquet):
                file.drop()
        self._stack.__exit__(_Abandoned, _Abandoned(), None)

    def _write(self, group: Rows) -> None:
        for path in self.paths:
            with self._told(path):
                if path not in self._files:
                    self._files[path] = self._open(path)  # which writes its first bytes
                self._files[path].write(group)

    @contextlib.contextmanager
    def _told(self, path: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise files.write_failure(self._root / path, error) from error

    def _open(self, path: str) -> "_Parquet | _Npy":
        stream = self._stack.enter_context(files.atomic_file(self._root / path, scratch=self._scratch))
        return _Npy(stream, self._layout) if path.endswith(".npy") else _Parquet(stream, self._layout, self._shard)


class _Abandoned(Exception):
    pass


class _Parquet:
    def __init__(self, stream: IO[bytes], layout: Layout, shard: str) -> None:
        self._layout, self._shard, self._schema = layout, shard, layout.schema()
        # Embedding floats do not compress.
        compression = {name: "zstd" for name in self._schema.names if name != "embedding"}
        if "embedding" in self._schema.names:
            compression["embedding.list.element"] = "none"
        self._writer = pq.ParquetWriter(
            stream,
            self._schema,
            compression=compression,
            use_dictionary=["shard"],
            column_encoding={"index": "DELTA_BINARY_PACKED"},
        )

    def write(self, rows: Rows) -> None:
        """Write one group of rows."""
        columns: dict[str, Any] = {
            "key": rows.keys,
            "shard": [self._shard] * len(rows),
            "index": rows.ordinals,
            **{extension: _kept(extension, values) for extension, values in rows.kept.items()},
        }
        if "embedding" in self._schema.names:
            values = rows.matrix().astype(self._layout.dtype, copy=False)
            columns["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), self._layout.dim)
        self._writer.write_table(pa.table(columns, schema=self._schema))

    def end(self) -> None:
        """Write the end of the file."""
        self._writer.close()

    def drop(self) -> None:
        """Make sure that nothing more is written."""
        self._writer.is_open = False  # else it writes its footer when garbage-collected


def _kept(extension: str, values: list[bytes | None]) -> list[Any]:
    """Return sidecars as they are stored: text or bytes."""
    if extension not in _TEXT:
        return values
    # Bytes that are not UTF-8 become \xNN: a caption in another encoding must not cost its sample the embedding.
    return [None if value is None else value.decode("utf-8", "backslashreplace") for value in values]


class _Npy:
    def __init__(self, stream: IO[bytes], layout: Layout) -> None:
        self._stream, self._dim, self._rows = stream, layout.dim, 0
        self._dtype = np.dtype(layout.dtype).newbyteorder("<")
        self._header()

    def write(self, rows: Rows) -> None:
        """Write one group of rows."""
        self._stream.write(rows.matrix().astype(self._dtype, copy=False).tobytes())
        self._rows += len(rows)

    def end(self) -> None:
        """Write the header anew, now that the number of rows is known."""
        self._stream.seek(0)
        self._header()

    def _header(self) -> None:
        """Write the header; numpy pads it, so a later rewrite with more rows takes the same number of bytes."""
        descr = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self._rows, self._dim)}
        np.lib.format.write_array_header_1_0(self._stream, header)
