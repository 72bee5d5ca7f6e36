"""Read the output of `maekit embed`, shard by shard: only files named in commit records."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from maekit.embedding.commit_record import BOOKKEEPING, CommitRecord, read_record, recorded_shards
from maekit.embedding.inputs import Images, Part, Scope, content_of
from maekit.system import files
from maekit.system.errors import InputError, MaekitError

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class EmbeddedShard:
    """The rows of one shard, in the shard's order.

    Attributes:
        record: its commit record.
        keys: keys of the samples.
        ordinals: positions of the samples in the shard, int32 `[n]`.
        vectors: float32 `[n, dim]`.
    """

    record: CommitRecord
    keys: list[str]
    ordinals: NDArray[np.int32]
    vectors: NDArray[np.float32]


class EmbeddingFolder:
    """An output directory of `maekit embed`, opened for reading.

    Args:
        path: the directory.

    Attributes:
        path: the directory.
        records: records of the committed shards, sorted by file; some may have no row.

    Raises:
        InputError: it is no output of `maekit embed`, has no row yet, or mixes models.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not is_embeddings(path):
            raise InputError(f"{path} holds no embeddings: it is no `out` of `maekit embed`")
        records = [read_record(path, name) for name in recorded_shards(path)]
        self.records = [record for record in records if record and bool(record.rows) == bool(record.outputs)]
        self._dim = 0  # known once a shard is read
        if not self.rows:
            raise InputError(f"{path} holds no embedding yet; run `maekit embed` on it first")
        models = {str(record.options.get("model")) for record in self.records}
        if len(models) > 1:
            raise InputError(f"{path} holds embeddings of {len(models)} models; embed anew with `overwrite`")

    @property
    def model(self) -> str:
        """SHA-256 of the ONNX file that made the embeddings."""
        return str(self.records[0].options.get("model"))

    @property
    def rows(self) -> int:
        """Total number of embeddings."""
        return sum(record.rows for record in self.records)

    def shards(self) -> Iterator[EmbeddedShard]:
        """Yield the rows of each shard that has any.

        Raises:
            MaekitError: a file is missing or does not match its record.
        """
        return (self.read(record) for record in self.records if record.rows)

    def read(self, record: CommitRecord) -> EmbeddedShard:
        """Return the rows of a shard.

        Raises:
            MaekitError: a file is missing or does not match its record.
        """
        paths = [self.path / output["path"] for output in record.outputs]
        for path, output in zip(paths, record.outputs, strict=True):
            if not path.is_file() or files.sha256_file(path) != output["sha256"]:
                raise MaekitError(
                    f"{path}: missing, or changed since it was embedded; `maekit embed` with `verify=true` tells"
                )
        batches = list(read_rows(paths))
        keys = [key for keys, _, _ in batches for key in keys]
        if len(keys) != record.rows:
            raise MaekitError(f"{paths[-1]}: {len(keys)} rows where {record.rows} should be")
        ordinals, vectors = (np.concatenate([batch[column] for batch in batches]) for column in (1, 2))
        self._dim = self._dim or vectors.shape[1]
        if vectors.shape[1] != self._dim:
            raise MaekitError(f"{paths[-1]}: embeddings of length {vectors.shape[1]} where {self._dim} should be")
        if not np.isfinite(vectors).all():
            raise MaekitError(f"{paths[0]}: holds embeddings that are not finite")
        return EmbeddedShard(record, keys, ordinals, np.asarray(vectors, np.float32))


def read_rows(paths: Sequence[Path]) -> Iterator[tuple[list[str], NDArray[np.int32], NDArray[Any]]]:
    """Yield keys, ordinals and embeddings `[n, dim]` of a shard, up to 4,096 rows at a time.

    Args:
        paths: the files of the shard, as its commit record names them.

    Raises:
        MaekitError: a file cannot be read, or the two files differ in the number of rows.
    """
    try:
        table = pq.ParquetFile(paths[-1])
        matrix = np.load(paths[0], mmap_mode="r", allow_pickle=False) if len(paths) > 1 else None
        if matrix is not None and matrix.ndim != 2:
            raise MaekitError(f"{paths[0]}: has {matrix.ndim} dimensions, not 2")
        if matrix is not None and len(matrix) != table.metadata.num_rows:
            raise MaekitError(f"{paths[0]} has {len(matrix)} rows, {paths[1]} {table.metadata.num_rows}")
        done = 0
        for batch in table.iter_batches(_ROWS_AT_ONCE):
            if matrix is None:
                column = batch.column("embedding")
                embeddings = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
            else:
                embeddings = np.asarray(matrix[done : done + len(batch)])
            done += len(batch)
            yield batch.column("key").to_pylist(), batch.column("index").to_numpy(), embeddings
    except (OSError, EOFError, ValueError, KeyError, AttributeError, BadZipFile, pa.ArrowException) as error:
        raise MaekitError(f"{paths[-1]}: cannot be read: {error}") from error


def is_made_from(record: CommitRecord, part: Part, images: Images) -> bool:
    """Whether a shard's embeddings were made from these images; unless the version proves it, all bytes are read.

    An index's digest covers keys and sizes alone: two shards of uncompressed images may share it.

    Args:
        record: commit record of the embeddings.
        part: the part that holds the images.
        images: the opened part.

    Raises:
        MaekitError: the images cannot be read.
    """
    if record.input_digest != images.digest:
        return False
    if record.shard == part.name and record.input_version is not None and record.input_version == images.version:
        return True
    select, keep = record.options.get("select"), record.options.get("keep") or []
    ordinals = Scope(select, record.first).ordinals(images)
    return content_of(images, ordinals, keep) == record.input_content


def is_embeddings(path: Path) -> bool:
    """Whether a path is an output directory of `maekit embed`."""
    return (path / BOOKKEEPING / ".output.json").is_file()
