"""`maekit embed --verify`: reread everything and check, shard by shard, that rows + errors = keys."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from maekit.embedding.commit_record import CommitRecord
from maekit.embedding.device_worker import Task
from maekit.embedding.inputs import Images
from maekit.embedding.output_directory import OutputDirectory
from maekit.shards.cache import RemoteCache
from maekit.system import files
from maekit.system.errors import MaekitError
from maekit.system.machine import cores
from maekit.system.parallel import map_in_threads
from maekit.system.progress import Progress

# Allowed deviation of a stored embedding's norm from 1; rounding to float16 changes it by up to 5e-4.
_NORM_TOLERANCE = 2e-3
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Verdict:
    """Result of a verification.

    Attributes:
        shards: number of shards whose files match their records.
        rows: rows in those shards.
        errors: keys without a row in those shards.
        problems: one line per problem.
    """

    shards: int
    rows: int
    errors: int
    problems: list[str] = field(default_factory=list)


def verify(
    output: OutputDirectory,
    tasks: Sequence[Task],
    remote: RemoteCache,
    progress: Progress,
    stop_if_asked: Callable[[], None],
) -> Verdict:
    """Compare the files of the given shards with their records and with the shards themselves.

    Args:
        output: the output to verify.
        tasks: the shards.
        remote: cache that fetches remote shards.
        progress: receives progress updates.
        stop_if_asked: called for each shard; raises to stop.
    """
    shards = rows = errors = 0
    problems: list[str] = []

    def check(task: Task) -> tuple[CommitRecord | None, str | None]:
        record = output.committed(task.part.name, task.scope.first)
        if record is None:
            return None, f"{task.part.name}: has no valid commit record"
        try:
            return record, _problem(output, record, task, remote)
        except MaekitError as error:
            return record, f"{task.part.name}: {error}"

    progress.start("verify", len(tasks))
    try:
        for number, (record, problem) in enumerate(map_in_threads(check, tasks, threads=cores()), 1):
            stop_if_asked()
            if problem is not None:
                problems.append(problem)
            elif record is not None:
                shards, rows, errors = shards + 1, rows + record.rows, errors + record.errors
            progress.advance(number)
    finally:
        progress.stop()
    problems += [f"{path}: belongs to no committed shard" for path in output.unaccounted()]
    return Verdict(shards, rows, errors, problems)


def _problem(output: OutputDirectory, record: CommitRecord, task: Task, remote: RemoteCache) -> str | None:
    """Return the first problem of a shard's files, or None."""
    name = record.shard
    for file in record.outputs:
        path = output.path / file["path"]
        if files.sha256_file(path) != file["sha256"]:
            return f"{path}: its SHA-256 is not that of its commit record"
    if record.rows + record.errors != record.keys:
        return f"{name}: {record.rows} rows + {record.errors} errors are not {record.keys} keys"
    if bool(record.outputs) != bool(record.rows):
        return f"{name}: {record.rows} rows in {len(record.outputs)} files"
    errors = output.errors_of(name)
    if len(errors) != record.errors:
        return f"{name}: {len(errors)} errors are listed, {record.errors} in its commit record"
    images = task.part.open(remote)
    try:
        return _unreconciled(output, record, errors, images, task.scope.ordinals(images))
    finally:
        images.close()


def _unreconciled(
    output: OutputDirectory,
    record: CommitRecord,
    errors: Sequence[dict[str, Any]],
    images: Images,
    ordinals: Sequence[int],
) -> str | None:
    """Return the first missing, extra or misplaced key or the first invalid embedding, as a message; else None."""
    name = record.shard
    if images.digest != record.input_digest:
        return f"{name}: has changed since it was embedded"
    without = {int(row["index"]): str(row["key"]) for row in errors}
    expected = iter(ordinals)
    rows = 0
    for keys, indexes, embeddings in _rows(output, record):
        for key, index in zip(keys, indexes, strict=True):
            ordinal = next(expected, None)
            while ordinal in without:
                if without.pop(ordinal) != images.key(ordinal):
                    return f"{name}: sample {ordinal} stands under another key among its errors"
                ordinal = next(expected, None)
            if ordinal != index or images.key(index) != key:
                return f"{name}: sample {ordinal} should come where {key!r} (sample {index}) stands"
        if (problem := _impossible(embeddings, output)) is not None:
            return f"{name}: {problem}"
        rows += len(keys)
    left = [ordinal for ordinal in expected if without.pop(ordinal, None) != images.key(ordinal)]
    if left or without:
        odd = left[0] if left else next(iter(without))
        return f"{name}: sample {odd} has neither row nor error, or is not one of the samples meant"
    if rows != record.rows:
        return f"{name}: {rows} rows, {record.rows} in its commit record"
    return None


def _impossible(embeddings: NDArray[Any], output: OutputDirectory) -> str | None:
    layout = output.layout
    if embeddings.shape[1] != layout.dim or embeddings.dtype != np.dtype(layout.dtype):
        return f"embeddings are {embeddings.dtype} of length {embeddings.shape[1]}, not {layout.dtype} of {layout.dim}"
    values = embeddings.astype(np.float32)
    if not np.isfinite(values).all():
        return "an embedding is not finite"
    if layout.footer["normalize"] and (np.abs(np.linalg.norm(values, axis=1) - 1) > _NORM_TOLERANCE).any():
        return "an embedding has not the length 1"
    return None


def _rows(output: OutputDirectory, record: CommitRecord) -> Iterator[tuple[list[str], list[int], NDArray[Any]]]:
    """Yield keys, indexes and embeddings of a shard, up to 4,096 rows at a time.

    Raises:
        MaekitError: a file cannot be read, or the two files differ in the number of rows.
    """
    paths = [output.path / file["path"] for file in record.outputs]
    if not paths:
        return
    try:
        table = pq.ParquetFile(paths[-1])
        matrix = None if output.layout.format == "parquet" else _matrix(paths[0])
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
            yield batch.column("key").to_pylist(), batch.column("index").to_pylist(), embeddings
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise MaekitError(f"{paths[-1]}: cannot be read: {error}") from error


def _matrix(path: Path) -> NDArray[Any]:
    matrix: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    if matrix.ndim != 2:
        raise MaekitError(f"{path}: has {matrix.ndim} dimensions, not 2")
    return matrix
