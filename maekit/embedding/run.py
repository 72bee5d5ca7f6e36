"""`maekit embed`: from shards to embeddings, one committed file per shard."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from maekit import files
from maekit.embedding.pipeline import EmbeddingPipeline, ShardResult, content_of
from maekit.embedding.session import CPU, EncoderSession
from maekit.embedding.writer import DTYPES, CommitRecord, OutputDirectory, OutputOptions, check_output_names
from maekit.errors import DamagedShard, InputError, MaekitError, Stopped
from maekit.machine import cores
from maekit.parallel import map_in_threads
from maekit.progress import Progress, Silent
from maekit.shards.index import ShardIndex, load_index
from maekit.shards.read import MemberReader
from maekit.shards.remote import RemoteCache
from maekit.shards.spec import ShardFile, find_shards
from maekit.signals import stop_on_signal

# On a CPU larger batches only fall out of the caches; a GPU wants to be filled.
_CPU_BATCH, _GPU_BATCH = 16, 256
_AHEAD = 4  # shards fetched and indexed before their turn


@dataclass
class EmbedConfig:
    """One embedding job.

    Attributes:
        model: the ONNX file that `maekit export` wrote.
        shards: input specs: directories, tars, globs, brace patterns, URLs.
        out: the output directory.
        device: `auto`, `cpu` or `cuda`.
        dtype: of the stored embeddings, `float32` or `float16`.
        batch_size: images per run of the model; None is 16 on a CPU and 256 on a GPU.
        workers: decoding threads; None is one per CPU core.
        overwrite: delete what another model or other options left in `out`.
        cache_gb: gigabytes of disk for shards fetched from remote.
    """

    model: str
    shards: tuple[str, ...]
    out: str
    device: str = "auto"
    dtype: str = "float32"
    batch_size: int | None = None
    workers: int | None = None
    overwrite: bool = False
    cache_gb: float = 50.0


@dataclass(frozen=True)
class EmbedResult:
    """What was done; `--json` prints it.

    Attributes:
        out: the output directory.
        rows: keys with an embedding, in all shards of the input, those of earlier runs included.
        errors: keys without.
        shards: shards embedded now.
        skipped: shards that were committed already.
        damaged: one line for each shard that cannot be read or trusted; of these only what was embedded earlier counts.
        images_per_second: of this run.
        limit_share: on a CPU, the share of the cores' time that this process used; on a GPU, the share of the time that
            the slower of decoding and model was at work.
        binds: the slower of the two.
        provider: where the model ran.
    """

    out: str
    rows: int
    errors: int
    shards: int
    skipped: int
    damaged: list[str]
    images_per_second: float
    limit_share: float
    binds: str
    provider: str


def embed(config: EmbedConfig, progress: Progress | None = None) -> EmbedResult:
    """Embed every sample of every shard; what is committed already is skipped.

    Raises:
        InputError: bad usage, no shards, no working provider, or an output of another model.
        Stopped: SIGTERM or SIGINT came; finished shards are committed.
        MaekitError: failed while working.
    """
    progress = progress or Silent()
    _check(config)
    shards = find_shards(config.shards)
    check_output_names(shards)
    session = EncoderSession(Path(config.model), device=config.device)
    progress.note(f"provider: {session.provider} ({session.reason})")
    batch_size = config.batch_size or (_CPU_BATCH if session.provider == CPU else _GPU_BATCH)
    options = OutputOptions(session.description.sha256, config.dtype, batch_size, session.provider)
    output = OutputDirectory(Path(config.out), session.description, options)
    output.refuse_foreign()
    with files.sole_owner(output.bookkeeping):
        remote = RemoteCache(int(config.cache_gb * 1e9))
        pipeline = EmbeddingPipeline(session, batch_size=batch_size, workers=config.workers or cores(), remote=remote)
        job = _Job(output, progress, remote)
        job.look(shards)
        output.claim(overwrite=config.overwrite)
        todo = job.plan(shards)
        started, started_cpu = time.perf_counter(), time.process_time()
        job.embed(todo, pipeline)
        if not (job.rows or job.errors or job.damaged):
            raise InputError(f"the {len(shards)} shards hold no sample at all")
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
    timing = pipeline.timing
    if session.provider == CPU:
        share = cpu_seconds / (seconds * cores())
    else:
        share = max(timing.running, timing.waiting) / seconds
    return EmbedResult(
        out=config.out,
        rows=job.rows,
        errors=job.errors,
        shards=job.shards,
        skipped=job.skipped,
        damaged=job.damaged,
        images_per_second=round(timing.images / seconds, 2) if timing.images else 0.0,
        limit_share=round(share, 4) if timing.images else 0.0,
        binds=timing.binds,
        provider=session.provider,
    )


def _check(config: EmbedConfig) -> None:
    if config.dtype not in DTYPES:
        raise InputError(f"--dtype {config.dtype}: must be one of {', '.join(DTYPES)}")
    for option, value in (("--batch-size", config.batch_size), ("--workers", config.workers)):
        if value is not None and value < 1:
            raise InputError(f"{option} {value}: must be at least 1")
    if not config.cache_gb > 0:
        raise InputError(f"--cache-gb {config.cache_gb:g}: must be greater than 0")
    if "://" in config.model:
        raise InputError(f"{config.model}: the model is read from a local file; download it first")
    files.require_utf8(Path(config.out))
    if "://" in config.out:
        raise InputError(
            f"--out {config.out}: write to a local or mounted directory, then copy it (aws s3 sync, gsutil)"
        )


@dataclass(frozen=True)
class _Arrival:
    """A shard whose turn has come.

    Attributes:
        shard: the shard, on this machine and sound.
        index: what is in it.
        version: the mark of its version.
        record: its commit record, where it still holds what was embedded.
    """

    shard: ShardFile
    index: ShardIndex
    version: str | None
    record: CommitRecord | None = None


@dataclass
class _Job:
    """The work on one output directory, and its account.

    Attributes:
        output: where rows and records go.
        progress: where to show how it goes on.
        remote: where remote shards come from.
        rows: keys with an embedding, earlier ones included.
        errors: keys without, likewise.
        shards: committed now.
        skipped: shards committed earlier.
        damaged: one line for each shard left out.
        sizes: bytes of each shard, as far as they are known.
        versions: the mark of each shard's version when the run began, likewise.
    """

    output: OutputDirectory
    progress: Progress
    remote: RemoteCache
    rows: int = 0
    errors: int = 0
    shards: int = 0
    skipped: int = 0
    damaged: list[str] = field(default_factory=list)
    sizes: dict[ShardFile, int] = field(default_factory=dict)
    versions: dict[ShardFile, str | None] = field(default_factory=dict)

    def look(self, shards: list[ShardFile]) -> None:
        """Learn size and version of each shard, without reading it.

        Raises:
            InputError: the cache is too small for the remote ones.
        """
        for shard, version in zip(shards, map_in_threads(self._version, shards, threads=_AHEAD), strict=True):
            self.versions[shard] = version
        if distant := [self.sizes.get(shard, 0) for shard in shards if shard.url is not None]:
            self.remote.refuse_if_too_small(min(len(distant), _AHEAD + 2), max(distant))

    def plan(self, shards: list[ShardFile]) -> list[ShardFile]:
        """Return the shards that are not known to be committed: those that are new, or look changed.

        Raises:
            InputError: a shard is committed under another name.
        """
        todo = []
        for shard in shards:
            record = self.output.committed(shard)
            if record is not None and self.versions[shard] and record.input_version == self.versions[shard]:
                self._skip(record)
            else:
                todo.append(shard)
        self._refuse_renamed(shards, todo)
        if self.skipped:
            self.progress.note(f"{self.skipped} of {len(shards)} shards are committed already")
        return todo

    def _refuse_renamed(self, shards: list[ShardFile], todo: list[ShardFile]) -> None:
        """Refuse shards that were embedded under other names: their rows would stand twice in the output.

        Raises:
            InputError: names one of them.
        """
        orphans = self.output.orphans(shards)
        known = {(Path(r.shard).name, r.input_version): r for r in orphans if r.input_version}
        for shard in todo:
            earlier = known.get((Path(shard.name).name, self.versions[shard] or ""))
            if earlier is None or self.output.committed(shard) is not None:
                continue
            if shard.url is None and not _has_digest(shard, earlier.input_digest):
                continue  # another one of the same name, size and time
            raise InputError(
                f"the shard {earlier.shard} of an earlier run would be {shard.name} now, and stand twice in "
                f"{self.output.path}: names are relative to the common folder of all inputs; give the same one, or "
                "another --out"
            )
        for record in orphans:
            self.progress.note(
                f"{record.shard} was embedded earlier and is not in the input now; its file stays where it is"
            )

    def embed(self, todo: list[ShardFile], pipeline: EmbeddingPipeline) -> None:
        """Embed and commit shard by shard; each is fetched and judged when its turn comes.

        Raises:
            Stopped: SIGTERM or SIGINT came.
            MaekitError: the model failed, or the output cannot be written.
        """
        arrived: dict[int, _Arrival] = {}
        self.progress.start("embed", sum(self.sizes.get(shard, 0) for shard in todo), unit="bytes")
        started = time.perf_counter()
        timing = pipeline.timing
        try:
            # Downloads are told at once: the main thread may be waiting for one.
            with stop_on_signal(self.remote.stop) as stopped_by:
                for result in pipeline.run(self._arrivals(todo, arrived, stopped_by)):
                    if result is not None:
                        self._settle(arrived.pop(result.number), result)
                    rate = timing.images / (time.perf_counter() - started)
                    self.progress.advance(int(timing.bytes))
                    self.progress.figures({"images_per_second": rate, "binds": timing.binds, "errors": self.errors})
                    if stopped_by():
                        break
                if signal_name := stopped_by():
                    raise Stopped(f"stopped by {signal_name}; finished shards are committed, run it again to go on")
        finally:
            self.progress.stop()

    def _arrivals(
        self, todo: list[ShardFile], arrived: "dict[int, _Arrival]", stopped_by: Callable[[], str | None]
    ) -> Iterator[ShardIndex]:
        """Yield the index of each shard that is sound and not committed after all; `arrived` says which it was."""
        number = 0
        for shard, arrival in zip(todo, map_in_threads(self._arrive, todo, threads=_AHEAD), strict=True):
            if stopped_by():
                return
            if isinstance(arrival, MaekitError):
                self._leave_out(shard, arrival)
            elif arrival.record is not None:
                self.output.renew(arrival.record, arrival.version)
                self._skip(arrival.record)
            elif not arrival.index.samples:
                self._settle(arrival, ShardResult(-1, [], np.empty((0, 0), np.float32), []))
            else:
                arrived[number] = arrival
                number += 1
                yield arrival.index

    def _arrive(self, shard: ShardFile) -> "_Arrival | MaekitError":
        """Fetch and index a shard, and see whether it holds what its commit record says."""
        try:
            for attempt in range(3):
                version = self.remote.fetch(shard) if shard.url is not None else self._version(shard)
                if shard.url is None or shard.path.exists() or attempt == 2:
                    break  # else another process has just needed the room
            try:
                index = load_index(shard.path)
            except DamagedShard:
                if shard.url is None:
                    raise
                version = self.remote.fetch_anew(shard)  # the copy here may be what is damaged
                index = load_index(shard.path)
            record = self.output.committed(shard)
            if record is not None and (record.input_digest, record.input_bytes) == (index.digest, index.size):
                # Only its time or its mark is another: a copy, or a shard that was changed or mended.
                with contextlib.closing(MemberReader(remote=self.remote)) as reader:
                    is_same = content_of(index, reader) == record.input_content
                return _Arrival(shard, index, version, record if is_same else None)
            return _Arrival(shard, index, version)
        except DamagedShard as damage:
            return DamagedShard(shard.url or damage.path, damage.offset, damage.reason)
        except MaekitError as error:
            return error

    def _version(self, shard: ShardFile) -> str | None:
        """Return a mark that changes with the shard, without reading it; None where there is none."""
        try:
            if shard.url is not None:
                there = self.remote.describe(shard)
                self.sizes[shard] = there.size or 0
                return there.version or None
            status = shard.path.stat()
            self.sizes[shard] = status.st_size
            return f"{status.st_size} bytes, {status.st_mtime_ns} ns"
        except (MaekitError, OSError):
            return None  # told when its turn comes

    def _settle(self, arrival: "_Arrival", result: ShardResult) -> None:
        if self.remote.is_stopped and result.failure is not None:
            return  # a signal came; the next run goes on with it
        if result.failure is not None:
            self._leave_out(arrival.shard, MaekitError(result.failure))
        else:
            self.shards += 1
            self._count(self.output.write(arrival.shard, arrival.index, result, arrival.version))

    def _count(self, record: CommitRecord) -> None:
        self.rows += record.rows
        self.errors += record.errors

    def _skip(self, record: CommitRecord) -> None:
        self.skipped += 1
        self._count(record)

    def _leave_out(self, shard: ShardFile, error: MaekitError) -> None:
        """Go on without a shard. What was embedded from it while it was sound stays, and counts."""
        reason = str(error)
        record = self.output.committed(shard)
        if record is not None:
            self._count(record)
            reason += " (its earlier embeddings stay)"
        else:
            self.output.write_damage(shard, reason)
        self.damaged.append(reason)
        self.progress.note(f"left out: {reason}")


def _has_digest(shard: ShardFile, digest: str) -> bool:
    try:
        return load_index(shard.path).digest == digest
    except MaekitError:
        return False  # told when its turn comes


def raise_if_damaged(result: EmbedResult) -> None:
    """Raise where shards were left out: the work is done as far as it can be, and that is not all of it.

    Raises:
        MaekitError: names the first of them.
    """
    if result.damaged:
        raise MaekitError(f"{len(result.damaged)} shards were left out: {result.damaged[0]}")
