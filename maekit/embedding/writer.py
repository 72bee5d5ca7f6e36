"""The last stage: rows -> files, shard by shard. It has its own thread, so that no batch waits for the disk."""

import queue
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from maekit.embedding.commit_record import CommitRecord, ErrorRow
from maekit.embedding.decode_pool import Rejected
from maekit.embedding.formats import Rows
from maekit.embedding.inputs import Images, riding_crc
from maekit.embedding.output_directory import OutputDirectory, ShardWork
from maekit.embedding.pipeline import Opened, Part, Timing
from maekit.system.errors import ImageError, MaekitError

_WAITING = 8  # batches


@dataclass(frozen=True)
class Written:
    """A shard that has been committed or given up.

    Attributes:
        images: the shard.
        record: its commit record; None if it could not be embedded.
        failure: why it could not be embedded, or None.
    """

    images: Images
    record: CommitRecord | None
    failure: str | None


class Writer:
    """Writes the results that the pipeline yields.

    Args:
        output: receives rows and records.
        blank: returns a shard's commit record without the fields known only at its end.
        done: called in the writer's thread for each shard that was committed or given up.
        timing: the writer adds its seconds and rows here.
    """

    def __init__(
        self,
        output: OutputDirectory,
        blank: Callable[[Opened], CommitRecord],
        done: Callable[[Written], None],
        timing: Timing,
    ) -> None:
        self._output, self._blank, self._done, self._timing = output, blank, done, timing
        self._queue: queue.Queue[Part | None] = queue.Queue(_WAITING)
        self._work: ShardWork | None = None
        self._given_up: set[int] = set()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="writer", daemon=True)
        self._thread.start()

    def put(self, part: Part) -> None:
        """Queue the next part; blocks while the disk is slower than the model.

        Raises:
            MaekitError: an earlier part could not be written.
        """
        while True:
            self.check()
            try:
                return self._queue.put(part, timeout=0.2)
            except queue.Full:
                continue

    def check(self) -> None:
        """Raise a pending write error. Needed because the last part can fail after the final `put`.

        Raises:
            MaekitError: a part could not be written.
        """
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Write all queued parts, discard an incomplete shard, and end the thread.

        Raises:
            MaekitError: a part could not be written.
        """
        while self._thread.is_alive() and self._error is None:
            try:
                self._queue.put(None, timeout=0.2)
                break
            except queue.Full:
                continue
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _serve(self) -> None:
        try:
            while (part := self._queue.get()) is not None:
                started = time.perf_counter()
                self._write(part)
                self._timing.writing += time.perf_counter() - started
        except BaseException as error:
            self._error = error
        finally:
            self._abandon()

    def _write(self, part: Part) -> None:
        images = part.shard.images
        if images.number in self._given_up:
            return
        if part.failure is not None:
            return self._give_up(images, part.failure)
        if self._work is None:
            self._work = self._output.begin(images.name)
            keep = len(self._output.options.keep)
            self._crcs = np.zeros((1 + keep, len(part.shard.ordinals)), "<u4")
        try:
            rows = self._gather(part, self._work)
        except MaekitError as error:  # a sidecar cannot be read
            return self._give_up(images, str(error))
        self._work.files.append(rows)
        self._timing.rows += len(rows)
        if part.is_last:
            self._end(part, self._work)

    def _gather(self, part: Part, work: ShardWork) -> Rows:
        """Join keys, embeddings and sidecars into rows; samples without a row become errors.

        Raises:
            MaekitError: the shard cannot be read.
        """
        images, ordinals, keep = part.shard.images, part.shard.ordinals, self._output.options.keep
        refused = list(part.refused)
        kept: dict[str, list[bytes | None]] = {extension: [] for extension in keep}
        good: list[int] = []
        for row, position in enumerate(part.positions):
            try:
                values = [images.sidecar(ordinals[position], extension) for extension in keep]
            except ImageError as error:
                refused.append(Rejected(position, error.reason, f"a member kept: {error}"))
                continue
            good.append(row)
            for number, (extension, value) in enumerate(zip(keep, values, strict=True), 1):
                kept[extension].append(value)
                self._crcs[number, position] = zlib.crc32(value or b"")
        for refusal in refused:
            ordinal = ordinals[refusal.row]
            work.errors.append(ErrorRow(ordinal, images.key(ordinal), refusal.reason, refusal.detail))
            for number, extension in enumerate(keep, 1):
                self._crcs[number, refusal.row] = riding_crc(images, ordinal, extension)
        for position, crc in part.crcs:
            self._crcs[0, position] = crc
        chosen = [ordinals[part.positions[row]] for row in good]
        embeddings = part.embeddings if len(good) == len(part.positions) else part.embeddings[good]
        return Rows([images.key(ordinal) for ordinal in chosen], chosen, [embeddings], kept)

    def _end(self, part: Part, work: ShardWork) -> None:
        images = part.shard.images
        if (changed := images.changed()) is not None:
            return self._give_up(images, changed)
        blank = self._blank(part.shard)
        content = zlib.crc32(self._crcs.tobytes())
        record = self._output.commit(images, work, CommitRecord(**{**vars(blank), "input_content": content}))
        self._work = None
        self._done(Written(images, record, None))

    def _give_up(self, images: Images, failure: str) -> None:
        self._abandon()
        self._given_up.add(images.number)
        self._done(Written(images, None, failure))

    def _abandon(self) -> None:
        if self._work is not None:
            self._work.files.abandon()
            self._work = None
