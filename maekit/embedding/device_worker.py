"""The work of one device: parts in order -> open and check -> pipeline -> commit.

Every part that goes in is reported as one `Outcome`.
"""

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import ClassVar

from maekit.embedding.commit_record import CommitRecord
from maekit.embedding.decode_pool import DecodePool
from maekit.embedding.inputs import OpenPart, PlannedPart, content_of
from maekit.embedding.output_directory import OutputDirectory
from maekit.embedding.pipeline import EmbeddingPipeline, Timing
from maekit.embedding.session import EncoderSession, OutOfMemory, Precision, Runtime
from maekit.embedding.writer import Writer
from maekit.encoder_file import EncoderDescription
from maekit.providers import runs_on_cpu
from maekit.shards.cache import RemoteCache
from maekit.system.errors import MaekitError
from maekit.system.locks import LockedError

_GPU_CONCURRENCY = 2
_GLANCE_SECONDS = 0.05  # how long to wait for the next shard before yielding to the caller


@dataclass(frozen=True)
class Running:
    """Where the model runs.

    Attributes:
        description: what the model's file states about itself.
        provider: execution provider that runs its nodes.
        reason: why that provider.
        nodes: number of the model's nodes on each provider.
        concurrency: batches in the session at a time. On a CPU, one per core, each in one thread: none waits for
            another, and a row has the same bits for any number of cores. On a GPU, two: one is copied while the other
            is computed.
    """

    description: EncoderDescription
    provider: str
    reason: str
    nodes: dict[str, int]
    concurrency: int


@dataclass(frozen=True)
class Outcome:
    """Result of one part.

    Attributes:
        name: name of the part.
        kind: `embedded`, `skipped` (it was committed already), `left_out`, or `elsewhere` (another run holds it).
        record: its commit record, or None; for a part left out, the record of an earlier run.
        reason: why it was left out, or which run holds it.
    """

    name: str
    kind: str
    record: CommitRecord | None = None
    reason: str = ""


@dataclass(frozen=True)
class Assignment:
    """The work of a device, or of all devices.

    Attributes:
        parts: the parts to embed; None while the next one is not known yet.
        output: receives rows and records.
        batch_size: images per run of the model.
        report: called once for each part, from any thread.
        note: called with messages for the user.
        stopped: returns whether to stop; finished parts stay.
        ahead: parts that a device fetches and indexes ahead.
    """

    parts: Iterable[PlannedPart | None]
    output: OutputDirectory
    batch_size: int
    report: Callable[[Outcome], None]
    note: Callable[[str], None]
    stopped: Callable[[], object]
    ahead: int = 2


@dataclass
class OneDevice:
    """The model on one device, in this process; a context manager.

    Attributes:
        model: the ONNX file.
        name: `auto`, `cpu`, `cuda` or `cuda:N`.
        provider_options: options of the CUDA provider.
        runtime: `auto`, `onnxruntime` or `openvino`.
        precision: `fp32` or `bf16`.
        cores: CPU cores that it may use.
        workers: decoding processes.
        remote: cache that fetches remote shards.
        running: where the model runs; known once entered.
        timing: time spent in each stage.
        count: number of devices.
    """

    model: Path
    name: str
    _: KW_ONLY
    provider_options: Mapping[str, str]
    runtime: Runtime
    precision: Precision
    cores: int
    workers: int
    remote: RemoteCache
    running: Running = field(init=False)
    timing: Timing = field(init=False, default_factory=Timing)
    count: ClassVar[int] = 1
    _under_way: dict[int, OpenPart] = field(init=False, default_factory=dict)

    def __enter__(self) -> "OneDevice":
        # Fork first: a child forked later would inherit the state of ONNX Runtime's threads without the threads.
        self._pool = DecodePool(self.workers)
        try:
            session = EncoderSession(
                self.model,
                device=self.name,
                threads=1,
                provider_options=self.provider_options,
                runtime=self.runtime,
                precision=self.precision,
                calls=self.cores,
            )
        except BaseException:
            self.__exit__()
            raise
        concurrency = self.cores if runs_on_cpu(session.provider) else _GPU_CONCURRENCY
        self.running = Running(session.description, session.provider, session.reason, session.nodes, concurrency)
        self._session = session
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.__exit__()

    def run(self, job: Assignment) -> Iterator[None]:
        """Embed all parts of the job, once, yielding regularly.

        Raises:
            MaekitError: the model failed, or the output cannot be written.
        """
        self._job, self._batch_size = job, job.batch_size
        arrivals = self._arrivals()
        again: list[OpenPart] = []
        try:
            while True:
                try:
                    yield from self._embed(itertools.chain(again, arrivals))
                    return
                except OutOfMemory as error:
                    if self._batch_size == 1:
                        raise
                    self._batch_size //= 2
                    self._job.note(f"{error}: going on with batches of {self._batch_size}")
                    again = list(self._under_way.values())
        finally:
            arrivals.close()
            for part in self._under_way.values():
                part.resources.close()

    def _embed(self, parts: Iterable[OpenPart | None]) -> Iterator[None]:
        self._pipeline = EmbeddingPipeline(
            self._session,
            self._pool,
            batch_size=self._batch_size,
            concurrency=self.running.concurrency,
            timing=self.timing,
        )
        writer = Writer(self._job.output, blank=self._blank, done=self._settle, note=self._job.note, timing=self.timing)
        results = self._pipeline.run(parts)
        try:
            for result in results:
                if result is not None:
                    writer.put(result)
                writer.check()
                yield
                if self._job.stopped():
                    self._pool.abort()  # one image may take long
                    break
        finally:
            results.close()
            writer.close()

    def _blank(self, part: OpenPart, content: int) -> CommitRecord:
        """Return the record of a part, with the results of writing it left blank."""
        return CommitRecord(
            shard=part.images.name,
            input_digest=part.images.digest,
            input_bytes=part.images.size,
            input_content=content,
            input_version=part.images.version,
            first=part.planned.scope.first,
            options={**self._job.output.options.to_json(), "batch_size": self._batch_size},
            providers=list(self._session.registered),
            nodes=self._session.nodes,
            keys=len(part.ordinals),
            rows=0,
            errors=0,
            outputs=[],
            unused=part.images.unused,
            runtime=self._session.version,
        )

    def _settle(self, part: OpenPart, record: CommitRecord | None, failure: str) -> None:
        """Report a part that the writer has finished or given up; runs in the writer's thread."""
        del self._under_way[part.images.number]
        with part.resources:
            if record is not None:
                self._job.report(Outcome(part.images.name, "embedded", record))
                return
            self._pipeline.give_up(part.images)
            if not self.remote.is_stopped:  # stopped by a signal: the next run embeds the part
                self._leave_out(part.planned, failure)

    def _arrivals(self) -> Generator[OpenPart | None, None, None]:
        """Yield each part that opens and still has to be embedded; None while the next one is not ready yet."""
        planned = iter(self._job.parts)
        pool = ThreadPoolExecutor(self._job.ahead, "arrive")
        flying: deque[Future[OpenPart | None]] = deque()
        has_more = True
        try:
            while True:
                if len(flying) < self._job.ahead:
                    for following in planned:
                        if following is not None:
                            flying.append(pool.submit(self._arrive, following))
                        if following is None or len(flying) == self._job.ahead:
                            break
                    else:
                        has_more = False
                if not flying and not has_more:
                    return
                if not flying or not wait([flying[0]], _GLANCE_SECONDS).done:
                    yield None
                    continue
                part = flying.popleft().result()
                if self._job.stopped():
                    if part is not None:
                        part.resources.close()
                    return
                if part is not None:
                    self._under_way[part.images.number] = part
                    yield part
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for future in flying:
                if not future.cancelled() and future.exception() is None and (left := future.result()) is not None:
                    left.resources.close()

    def _arrive(self, planned: PlannedPart) -> OpenPart | None:
        """Lock, fetch, index and open a part; report it and return None if there is nothing to embed."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._job.output.sole_owner_of(planned.name))
            except LockedError as held:
                self._job.report(Outcome(planned.name, "elsewhere", reason=held.owner))
                return None
            try:
                return self._open(planned, stack)
            except MaekitError as error:
                if not self.remote.is_stopped:
                    self._leave_out(planned, str(error))
                return None

    def _open(self, planned: PlannedPart, stack: contextlib.ExitStack) -> OpenPart | None:
        output = self._job.output
        record = None if planned.is_retried else output.committed(planned.name, planned.scope.first)
        if record is not None and planned.has_version(record.input_version):
            self._job.report(Outcome(planned.name, "skipped", record))  # another run embedded it in the meantime
            return None
        images = planned.part.open(self.remote)
        stack.callback(images.close)
        ordinals = planned.scope.ordinals(images)
        if record is not None and (record.input_digest, record.input_bytes) == (images.digest, images.size):
            # The version alone differs: this is a copy, or the part was modified or repaired.
            content = content_of(images, ordinals, output.options.keep, self._job.stopped)
            if content == record.input_content:
                output.renew(record, images.version, images.unused)
                self._job.report(Outcome(planned.name, "skipped", record))
                return None
        return OpenPart(planned, images, ordinals, stack.pop_all())

    def _leave_out(self, planned: PlannedPart, reason: str) -> None:
        """Continue without a part. What an earlier run embedded from it stays and counts."""
        record = self._job.output.committed(planned.name, planned.scope.first)
        if record is not None:
            reason += " (its earlier embeddings stay)"
        else:
            self._job.output.write_damage(planned.name, reason)
        self._job.report(Outcome(planned.name, "left_out", record, reason))
