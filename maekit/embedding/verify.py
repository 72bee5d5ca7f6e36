"""`maekit embed --verify`: reread everything and check, shard by shard, that rows + errors = keys."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maekit.embedding.commit_record import CommitRecord
from maekit.embedding.inputs import Images, PlannedPart, content_of
from maekit.embedding.output_directory import OutputDirectory
from maekit.embedding.stored import read_rows
from maekit.shards.cache import RemoteCache
from maekit.system import files
from maekit.system.errors import MaekitError
from maekit.system.machine import cores
from maekit.system.parallel import map_in_threads
from maekit.system.progress import Progress

# Allowed deviation of a stored embedding's norm from 1; rounding to float16 changes it by up to 5e-4.
_NORM_TOLERANCE = 2e-3


@dataclass
class Verdict:
    """Result of a verification.

    Attributes:
        shards: number of shards whose files match their records.
        rows: rows in those shards.
        errors: keys without a row in those shards.
        problems: one line per problem.
    """

    shards: int = 0
    rows: int = 0
    errors: int = 0
    problems: list[str] = field(default_factory=list)


def verify(
    output: OutputDirectory,
    parts: Sequence[PlannedPart],
    *,
    remote: RemoteCache,
    progress: Progress,
    stop_if_asked: Callable[[], None],
    stopped: Callable[[], object],
) -> Verdict:
    """Compare the files of the given shards with their records and with the shards themselves, whose bytes are reread.

    Args:
        output: the output to verify.
        parts: the shards.
        remote: cache that fetches remote shards.
        progress: receives progress updates.
        stop_if_asked: called for each shard; raises to stop.
        stopped: returns whether to stop, from any thread.
    """
    verdict = Verdict()

    def check(planned: PlannedPart) -> CommitRecord | str:
        record = output.committed(planned.name, planned.scope.first)
        if record is None:
            return f"{planned.name}: has no valid commit record"
        try:
            return _problem(output, record, planned, remote, stopped) or record
        except MaekitError as error:
            return f"{planned.name}: {error}"

    progress.start("verify", len(parts))
    try:
        for number, checked in enumerate(map_in_threads(check, parts, threads=cores()), 1):
            stop_if_asked()
            if isinstance(checked, str):
                verdict.problems.append(checked)
            else:
                verdict.shards += 1
                verdict.rows += checked.rows
                verdict.errors += checked.errors
            progress.advance(number)
    finally:
        progress.stop()
    verdict.problems += [f"{path}: belongs to no committed shard" for path in output.unaccounted()]
    return verdict


def _problem(
    output: OutputDirectory,
    record: CommitRecord,
    planned: PlannedPart,
    remote: RemoteCache,
    stopped: Callable[[], object],
) -> str | None:
    """Return the first problem of a shard's files, or None."""
    name = record.shard
    for file in record.outputs:
        path = output.path / file["path"]
        if files.sha256_file(path) != file["sha256"]:
            return f"{path}: its SHA-256 is not that of its commit record"
    if bool(record.outputs) != bool(record.rows):
        return f"{name}: {record.rows} rows in {len(record.outputs)} files"
    errors = output.errors_of(name)
    if len(errors) != record.errors:
        return f"{name}: {len(errors)} errors are listed, {record.errors} in its commit record"
    with contextlib.closing(planned.part.open(remote)) as images:
        ordinals = planned.scope.ordinals(images)
        if (problem := _unreconciled(output, record, errors=errors, images=images, ordinals=ordinals)) is not None:
            return problem
        # The digest covers keys and sizes alone. What took a decoder with it has no CRC-32 in the record.
        crashed = {ordinal for ordinal, _, reason in errors if reason == "crashed"}
        content = content_of(images, ordinals, output.options.keep, stopped, without=crashed)
        if content != record.input_content:
            return f"{name}: its images or kept members have other bytes than those embedded; touch it, and embed again"
    return None


def _unreconciled(
    output: OutputDirectory,
    record: CommitRecord,
    *,
    errors: Sequence[tuple[int, str, str]],
    images: Images,
    ordinals: Sequence[int],
) -> str | None:
    """Return the first missing, extra or misplaced key or the first invalid embedding, as a message; else None."""
    name = record.shard
    if images.digest != record.input_digest:
        return f"{name}: has changed since it was embedded"
    if record.unused and images.unused != record.unused:
        return f"{name}: {images.unused} are used by no sample, {record.unused} by its commit record"
    without = {ordinal: key for ordinal, key, _ in errors}
    expected = iter(ordinals)
    rows = 0
    batches = read_rows([output.path / file["path"] for file in record.outputs]) if record.outputs else ()
    for keys, indexes, embeddings in batches:
        for key, index in zip(keys, indexes.tolist(), strict=True):
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
