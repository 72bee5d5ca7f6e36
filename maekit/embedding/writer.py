"""The last stage: rows -> files, shard by shard. It has its own thread, so that no batch waits for the disk."""

import queue
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maekit.embedding.commit_record import CommitRecord
from maekit.embedding.decode_pool import Rejected
from maekit.embedding.formats import Rows, ShardFiles
from maekit.embedding.inputs import OpenPart, sidecar_crc
from maekit.embedding.output_directory import OutputDirectory
from maekit.embedding.pipeline import Result, Timing
from maekit.system.errors import ImageError, MaekitError

_WAITING = 8  # batches


class Writer:
    """Writes the results that the pipeline yields.

    Args:
        output: receives rows and records.
        blank: returns the commit record of a part, given the CRC-32 of its content, without the results of writing it.
        done: called in the writer's thread for each part: with its record, or None and why it could not be embedded.
        note: called with messages for the user, in the writer's thread.
        timing: the writer adds its seconds and rows here.
    """

    def __init__(
        self,
        output: OutputDirectory,
        *,
        blank: Callable[[OpenPart, int], CommitRecord],
        done: Callable[[OpenPart, CommitRecord | None, str], None],
        note: Callable[[str], None],
        timing: Timing,
    ) -> None:
        self._output, self._blank, self._done, self._note, self._timing = output, blank, done, note, timing
        self._has_noted = False
        self._queue: queue.Queue[Result | None] = queue.Queue(_WAITING)
        self._files: ShardFiles | None = None
        self._given_up: set[int] = set()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="writer", daemon=True)
        self._thread.start()

    def put(self, result: Result | None) -> None:
        """Queue the next result, None after the last; blocks while the disk is slower than the model.

        Raises:
            MaekitError: an earlier result could not be written.
        """
        while True:
            self.check()
            try:
                return self._queue.put(result, timeout=0.2)
            except queue.Full:
                continue

    def check(self) -> None:
        """Raise a pending write error. Needed because the last result can fail after the final `put`.

        Raises:
            MaekitError: a result could not be written.
        """
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Write all queued results, discard an incomplete part, and end the thread.

        Raises:
            MaekitError: a result could not be written.
        """
        try:
            self.put(None)
        finally:
            self._thread.join()
        self.check()

    def _serve(self) -> None:
        try:
            while (result := self._queue.get()) is not None:
                started = time.perf_counter()
                self._write(result)
                self._timing.writing += time.perf_counter() - started
        except BaseException as error:
            self._error = error
        finally:
            self._abandon()

    def _write(self, result: Result) -> None:
        part = result.part
        if part.images.number in self._given_up:
            return
        if result.failure is not None:
            return self._give_up(part, result.failure)
        if self._files is None:
            self._files = self._output.begin(part.images.name)
            self._crcs = np.zeros((1 + len(self._output.options.keep), len(part.ordinals)), "<u4")
        try:
            rows = self._gather(result, self._files.errors)
        except MaekitError as error:  # a sidecar cannot be read
            return self._give_up(part, str(error))
        self._files.append(rows)
        self._timing.rows += len(rows)
        if result.is_last:
            self._end(part, self._files)

    def _gather(self, result: Result, errors: list[dict[str, Any]]) -> Rows:
        """Join keys, embeddings and sidecars into rows; add the samples without a row to `errors`.

        Raises:
            MaekitError: the part cannot be read.
        """
        images, ordinals, keep = result.part.images, result.part.ordinals, self._output.options.keep
        refused = list(result.refused)
        kept: dict[str, list[bytes | None]] = {extension: [] for extension in keep}
        good: list[int] = []
        unfit = _unfit(result.embeddings, self._output.options.dtype)
        for row, position in enumerate(result.positions):
            if row in unfit:
                refused.append(Rejected(position, "not_finite", unfit[row]))
                continue
            try:
                values = [images.sidecar(ordinals[position], extension) for extension in keep]
            except ImageError as error:
                refused.append(Rejected(position, error.reason, f"a member kept: {error}"))
                continue
            good.append(row)
            for number, (extension, value) in enumerate(zip(keep, values, strict=True), 1):
                kept[extension].append(value)
                self._crcs[number, position] = zlib.crc32(value or b"")
        for position, reason, detail in refused:
            ordinal = ordinals[position]
            errors.append({"key": images.key(ordinal), "index": ordinal, "reason": reason, "detail": detail})
            for number, extension in enumerate(keep, 1):
                self._crcs[number, position] = sidecar_crc(images, ordinal, extension)
        for position, crc in result.crcs:
            self._crcs[0, position] = crc
        chosen = [ordinals[result.positions[row]] for row in good]
        embeddings = result.embeddings if len(good) == len(result.positions) else result.embeddings[good]
        return Rows([images.key(ordinal) for ordinal in chosen], chosen, [embeddings], kept)

    def _end(self, part: OpenPart, shard_files: ShardFiles) -> None:
        unfit = [error for error in shard_files.errors if error["reason"] == "not_finite"]
        if len(unfit) > shard_files.rows and not self._has_noted:
            self._has_noted = True
            self._note(
                f"{part.images.name}: {len(unfit)} of {len(unfit) + shard_files.rows} embeddings are not finite: it is "
                f"the model, not the images ({unfit[0]['detail']})"
            )
        if (changed := part.images.changed()) is not None:
            return self._give_up(part, changed)
        record = self._output.commit(part.images, shard_files, self._blank(part, zlib.crc32(self._crcs.tobytes())))
        self._files = None
        self._done(part, record, "")

    def _give_up(self, part: OpenPart, failure: str) -> None:
        self._abandon()
        self._given_up.add(part.images.number)
        self._done(part, None, failure)

    def _abandon(self) -> None:
        if self._files is not None:
            self._files.abandon()
            self._files = None


def _unfit(embeddings: NDArray[np.float32], dtype: str) -> dict[int, str]:
    """Return the rows that cannot be stored because they would not be finite, each with what is wrong."""
    with np.errstate(over="ignore"):  # of float16
        is_stored = np.isfinite(embeddings.astype(dtype, copy=False)).all(axis=1)
    found = {}
    for row in np.flatnonzero(~is_stored).tolist():
        if np.isfinite(embeddings[row]).all():
            largest = np.abs(embeddings[row]).max()
            found[row] = f"values up to {largest:.3g} are too large for {dtype}; `dtype=float32` holds them"
        else:
            found[row] = "the model gives values that are not finite"
    return found
