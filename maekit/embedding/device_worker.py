"""The work of one device: shards in order -> open and check -> pipeline -> commit.

Every shard that goes in is reported as one `Outcome`.
"""

import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from maekit.embedding.commit_record import CommitRecord
from maekit.embedding.decode_pool import DecodePool
from maekit.embedding.inputs import Part, Scope, content_of
from maekit.embedding.output_directory import OutputDirectory
from maekit.embedding.pipeline import EmbeddingPipeline, Opened, Timing
from maekit.embedding.session import EncoderSession, OutOfMemory
from maekit.embedding.writer import Writer, Written
from maekit.shards.cache import RemoteCache
from maekit.system.errors import MaekitError
from maekit.system.locks import LockedError

_GLANCE_SECONDS = 0.05  # how long to wait for the next shard before yielding to the caller


@dataclass(frozen=True)
class Task:
    """A shard to embed.

    Attributes:
        part: the shard.
        version: its version when the run began; None if unknown.
        scope: which of its samples to embed.
    """

    part: Part
    version: str | None
    scope: Scope


@dataclass(frozen=True)
class Outcome:
    """Result of one shard.

    Attributes:
        name: name of the shard.
        kind: `embedded`, `skipped` (it was committed already), `left_out`, or `elsewhere` (another run holds it).
        record: its commit record, or None; for a shard left out, the record of an earlier run.
        reason: why it was left out, or which run holds it.
    """

    name: str
    kind: str
    record: CommitRecord | None = None
    reason: str = ""


@dataclass
class _UnderWay:
    """A shard that is being embedded, with the stack that closes it and releases its lock."""

    task: Task
    opened: Opened
    stack: contextlib.ExitStack


class DeviceWork:
    """Embeds shards on one device.

    Args:
        session: the encoder on this device.
        pool: decodes the images.
        output: receives rows and records.
        remote: cache that fetches remote shards.
        batch_size: images per run of the model.
        concurrency: batches in the session at a time.
        ahead: shards to fetch and index ahead.
        report: called once for each shard, from any thread.
        note: called with messages for the user.
        stopped: returns whether to stop; finished shards stay.
    """

    def __init__(
        self,
        session: EncoderSession,
        pool: DecodePool,
        output: OutputDirectory,
        remote: RemoteCache,
        *,
        batch_size: int,
        concurrency: int,
        ahead: int,
        report: Callable[[Outcome], None],
        note: Callable[[str], None],
        stopped: Callable[[], object],
    ) -> None:
        self._session, self._pool, self._output, self._remote = session, pool, output, remote
        self._batch_size, self._concurrency, self._ahead = batch_size, concurrency, ahead
        self._report, self._note, self._stopped = report, note, stopped
        self._under_way: dict[int, _UnderWay] = {}
        self._past = Timing()
        self._timing = Timing()
        self._lock = threading.Lock()
        self._pipeline: EmbeddingPipeline | None = None

    @property
    def timing(self) -> Timing:
        """Time spent in each stage so far."""
        return self._past + self._timing

    def run(self, tasks: Iterable[Task | None]) -> Iterator[None]:
        """Embed all tasks, yielding regularly. `tasks` gives None while its next task is not known yet.

        Raises:
            MaekitError: the model failed, or the output cannot be written.
        """
        arrivals = self._arrivals(tasks)
        again: list[Opened] = []
        try:
            while True:
                try:
                    yield from self._embed(itertools.chain(again, arrivals))
                    return
                except OutOfMemory as error:
                    if self._batch_size == 1:
                        raise
                    self._batch_size //= 2
                    self._note(f"{error}: going on with batches of {self._batch_size}")
                    again = [way.opened for way in self._under_way.values()]
        finally:
            arrivals.close()
            for way in self._under_way.values():
                way.stack.close()

    def _embed(self, shards: Iterable[Opened | None]) -> Iterator[None]:
        self._past, self._timing = self.timing, Timing()
        pipeline = EmbeddingPipeline(
            self._session, self._pool, batch_size=self._batch_size, concurrency=self._concurrency
        )
        self._timing = pipeline.timing
        writer = Writer(self._output, self._blank, self._settle, pipeline.timing)
        parts = pipeline.run(shards)
        self._pipeline = pipeline
        try:
            for part in parts:
                if part is not None:
                    writer.put(part)
                writer.check()
                yield
                if self._stopped():
                    self._pool.abort()  # one image may take long
                    break
        finally:
            parts.close()
            writer.close()

    def _blank(self, shard: Opened) -> CommitRecord:
        """Return the record of a shard, with its results left blank."""
        images = shard.images
        with self._lock:
            task = self._under_way[images.number].task
        return CommitRecord(
            shard=images.name,
            input_digest=images.digest,
            input_bytes=images.size,
            input_content=0,
            input_version=images.version,
            first=task.scope.first,
            options={**self._output.options.to_json(), "batch_size": self._batch_size},
            providers=list(self._session.registered),
            nodes=self._session.nodes,
            keys=len(shard.ordinals),
            rows=0,
            errors=0,
            outputs=[],
        )

    def _settle(self, written: Written) -> None:
        """Report a shard that the writer has finished or given up; runs in the writer's thread."""
        with self._lock:
            way = self._under_way.pop(written.images.number)
        with way.stack:
            if written.record is not None:
                self._report(Outcome(written.images.name, "embedded", written.record))
                return
            if self._pipeline is not None:
                self._pipeline.give_up(written.images)
            if not self._remote.is_stopped:  # stopped by a signal: the next run embeds the shard
                self._leave_out(way.task, written.failure or "")

    def _arrivals(self, tasks: Iterable[Task | None]) -> Generator[Opened | None, None, None]:
        """Yield each shard that opens and still has to be embedded; None while the next one is not ready yet."""
        waiting = iter(tasks)
        pool = ThreadPoolExecutor(self._ahead, "arrive")
        flying: deque[tuple[Task, Future[_UnderWay | None]]] = deque()
        try:
            while True:
                has_more = True
                while len(flying) < self._ahead:
                    try:
                        task = next(waiting)
                    except StopIteration:
                        has_more = False
                        break
                    if task is None:
                        break
                    flying.append((task, pool.submit(self._arrive, task)))
                if not flying and not has_more:
                    return
                if not flying or not wait([flying[0][1]], _GLANCE_SECONDS).done:
                    yield None
                    continue
                way = flying.popleft()[1].result()
                if self._stopped():
                    if way is not None:
                        way.stack.close()
                    return
                if way is not None:
                    with self._lock:
                        self._under_way[way.opened.images.number] = way
                    yield way.opened
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for _, future in flying:
                if not future.cancelled() and future.exception() is None and (left := future.result()) is not None:
                    left.stack.close()

    def _arrive(self, task: Task) -> _UnderWay | None:
        """Lock, fetch, index and open a shard; report it and return None if there is nothing to embed."""
        name = task.part.name
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._output.sole_owner_of(name))
            except LockedError as held:
                self._report(Outcome(name, "elsewhere", reason=held.owner))
                return None
            try:
                return self._judge(task, stack)
            except MaekitError as error:
                if not self._remote.is_stopped:
                    self._leave_out(task, str(error))
                return None

    def _judge(self, task: Task, stack: contextlib.ExitStack) -> _UnderWay | None:
        record = self._output.committed(task.part.name, task.scope.first)
        if record is not None and task.version is not None and record.input_version == task.version:
            self._report(Outcome(task.part.name, "skipped", record))  # another run embedded it in the meantime
            return None
        images = task.part.open(self._remote)
        stack.callback(images.close)
        ordinals = task.scope.ordinals(images)
        if record is not None and (record.input_digest, record.input_bytes) == (images.digest, images.size):
            # The version alone differs: this is a copy, or the shard was modified or repaired.
            content = content_of(images, ordinals, self._output.options.keep, self._stopped)
            if content == record.input_content:
                self._output.renew(record, images.version)
                self._report(Outcome(task.part.name, "skipped", record))
                return None
        return _UnderWay(task, Opened(images, ordinals), stack.pop_all())

    def _leave_out(self, task: Task, reason: str) -> None:
        """Continue without a shard. What an earlier run embedded from it stays and counts."""
        record = self._output.committed(task.part.name, task.scope.first)
        if record is not None:
            reason += " (its earlier embeddings stay)"
        else:
            self._output.write_damage(task.part.name, reason)
        self._report(Outcome(task.part.name, "left_out", record, reason))
