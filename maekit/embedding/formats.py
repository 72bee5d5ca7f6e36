"""The files that rows of embeddings go to, written a group of rows at a time: memory does not grow with a shard.

parquet   OUT/a/000.parquet                       key, shard, index, embedding, and the members kept
npy       OUT/img_emb/img_emb_00017.npy           float32 or float16 [rows, dim], little-endian, C order
          OUT/metadata/metadata_00017.parquet     key, shard, index, and the members kept; row by row the same

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
# Of a fixed size, so that files do not depend on the size of batches.
_GROUP = 4096
_GROUP_BYTES = 64 << 20  # of members kept
# Members of these extensions are text; all others are kept as bytes.
_TEXT = frozenset(("json", "jsonl", "txt", "text", "cls", "caption", "url", "id", "html", "xml", "csv", "tsv", "yaml"))


@dataclass
class Rows:
    """Some rows of one shard, in order.

    Attributes:
        keys: of the samples.
        ordinals: their places in the shard.
        embeddings: float32 `[rows, dim]`.
        kept: for each extension kept, the members' bytes; None where a sample has none.
    """

    keys: list[str] = field(default_factory=list)
    ordinals: list[int] = field(default_factory=list)
    embeddings: list[NDArray[np.float32]] = field(default_factory=list)
    kept: dict[str, list[bytes | None]] = field(default_factory=dict)

    def append(
        self, keys: list[str], ordinals: list[int], embeddings: NDArray[Any], kept: dict[str, list[bytes | None]]
    ) -> None:
        """Add rows behind these."""
        self.keys += keys
        self.ordinals += ordinals
        self.embeddings.append(embeddings)
        for extension, values in kept.items():
            self.kept.setdefault(extension, []).extend(values)

    def __len__(self) -> int:
        return len(self.keys)

    def group(self) -> int | None:
        """Return how many of the rows make a group; None where they do not yet. It depends on the rows alone."""
        taken = 0
        for row, members in enumerate(zip(*self.kept.values(), strict=True), 1):
            taken += sum(len(member) for member in members if member is not None)
            if row == _GROUP or taken >= _GROUP_BYTES:
                return row
        return _GROUP if len(self) >= _GROUP else None

    def split(self, count: int) -> tuple["Rows", "Rows"]:
        """Return the first `count` rows, and the others."""
        whole = np.concatenate(self.embeddings)
        kept = [(extension, values[:count], values[count:]) for extension, values in self.kept.items()]
        first = Rows(self.keys[:count], self.ordinals[:count], [whole[:count]], {e: a for e, a, _ in kept})
        return first, Rows(self.keys[count:], self.ordinals[count:], [whole[count:]], {e: b for e, _, b in kept})


@dataclass(frozen=True)
class Layout:
    """What the files of a shard are called and hold.

    Attributes:
        format: `parquet` or `npy`.
        dtype: of the stored embeddings, `float32` or `float16`.
        dim: length of an embedding.
        keep: extensions of the members that ride along.
        footer: what the parquet files say of the model, as JSON values.
    """

    format: str
    dtype: str
    dim: int
    keep: tuple[str, ...]
    footer: dict[str, Any]

    def paths(self, name: str, number: int | None) -> list[str]:
        """Return the files of a shard, relative to the output directory.

        Args:
            name: of the shard, without `.tar`.
            number: of the shard, in the npy layout.
        """
        if self.format == "parquet":
            return [f"{name}.parquet"]
        return [f"img_emb/img_emb_{number:05d}.npy", f"metadata/metadata_{number:05d}.parquet"]

    def schema(self, *, with_embeddings: bool) -> pa.Schema:
        """Return the columns of a parquet file."""
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
        """Write what comes last."""

    def drop(self) -> None:
        """Write nothing more."""


class ShardFiles:
    """Writer of the files of one shard. They stay in the scratch directory until they are committed.

    Args:
        layout: what they hold.
        root: the output directory.
        paths: where they go, relative to it.
        shard: the shard's name.
        scratch: where they are while they are unfinished.
    """

    def __init__(self, layout: Layout, root: Path, paths: Sequence[str], shard: str, scratch: Path) -> None:
        self._layout, self._root, self._paths, self._shard, self._scratch = layout, root, paths, shard, scratch
        self._stack = contextlib.ExitStack()
        self._files: list[_File] = []
        self._waiting = Rows()
        self.rows = 0

    def append(self, rows: Rows) -> None:
        """Add rows.

        Raises:
            MaekitError: they cannot be written; names the path.
        """
        self.rows += len(rows)
        if len(rows):
            self._waiting.append(rows.keys, rows.ordinals, np.concatenate(rows.embeddings), rows.kept)
        while (count := self._waiting.group()) is not None:
            group, self._waiting = self._waiting.split(count)
            self._write(group)

    def complete(self) -> None:
        """Write what is left; the files still have no names.

        Raises:
            MaekitError: they cannot be written; names the path.
        """
        if len(self._waiting):
            self._write(self._waiting)
            self._waiting = Rows()
        for path, file in zip(self._paths, self._files, strict=False):
            with self._told(path):
                file.end()

    def publish(self) -> None:
        """Make the files durable and give them their names; without any row there is none.

        Raises:
            MaekitError: as above.
        """
        self._stack.close()

    def abandon(self) -> None:
        """Leave nothing of them."""
        for file in self._files:
            file.drop()
        self._stack.__exit__(_Abandoned, _Abandoned(), None)

    def _write(self, group: Rows) -> None:
        if not self._files:
            for path in self._paths:
                with self._told(path):  # formats write their first bytes when they are opened
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
            compression["embedding.list.element"] = "none"  # floats of a network do not compress
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
        self._writer.is_open = False  # else it would write its footer when it is collected


def _kept(extension: str, values: list[bytes | None]) -> pa.Array:
    if extension not in _TEXT:
        return pa.array(values, pa.binary())
    # What is not UTF-8 stays readable as \xNN: a caption in another encoding must not cost its embedding.
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
        """Write the header; numpy pads it so that a larger number of rows fits into the same bytes."""
        descr = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self._rows, self._dim)}
        np.lib.format.write_array_header_1_0(self._stream, header)
