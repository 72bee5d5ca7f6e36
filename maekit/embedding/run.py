"""`maekit embed`: from shards to embeddings, one committed file per shard."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from maekit import files
from maekit.embedding.pipeline import EmbeddingPipeline
from maekit.embedding.session import CPU, EncoderSession
from maekit.embedding.writer import DTYPES, CommitRecord, OutputDirectory, OutputOptions, check_output_names
from maekit.errors import InputError, MaekitError, Stopped
from maekit.machine import cores
from maekit.progress import Progress, Silent
from maekit.shards.index import ShardIndex, load_index
from maekit.shards.spec import ShardFile, find_shards
from maekit.signals import stop_on_signal

# On a CPU larger batches only fall out of the caches; a GPU wants to be filled.
_CPU_BATCH, _GPU_BATCH = 16, 256


@dataclass
class EmbedConfig:
    """One embedding job.

    Attributes:
        model: the ONNX file that `maekit export` wrote.
        shards: input specs: directories, tars, globs, brace patterns.
        out: the output directory.
        device: `auto`, `cpu` or `cuda`.
        dtype: of the stored embeddings, `float32` or `float16`.
        batch_size: images per run of the model; None is 16 on a CPU and 256 on a GPU.
        workers: decoding threads; None is one per CPU core.
        overwrite: delete what another model or other options left in `out`.
    """

    model: str
    shards: tuple[str, ...]
    out: str
    device: str = "auto"
    dtype: str = "float32"
    batch_size: int | None = None
    workers: int | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class EmbedResult:
    """What was done; `--json` prints it.

    Attributes:
        out: the output directory.
        rows: keys with an embedding, in all shards of the input, those of earlier runs included.
        errors: keys without.
        shards: shards embedded now.
        skipped: shards that were committed already.
        damaged: one line for each shard that cannot be trusted; their samples are in no count.
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
        output.claim(overwrite=config.overwrite)
        pipeline = EmbeddingPipeline(session, batch_size=batch_size, workers=config.workers or cores())
        job = _Job(output, progress)
        todo = job.plan(shards)
        started, started_cpu = time.perf_counter(), time.process_time()
        job.embed(todo, pipeline)
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
        shards=len(todo),
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
    files.require_utf8(Path(config.out))
    if "://" in config.out:
        raise InputError(
            f"--out {config.out}: write to a local or mounted directory, then copy it (aws s3 sync, gsutil)"
        )


@dataclass
class _Job:
    """The work on one output directory, and its account.

    Attributes:
        output: where rows and records go.
        progress: where to show how it goes on.
        rows: keys with an embedding, earlier ones included.
        errors: keys without, likewise.
        skipped: shards committed earlier.
        damaged: one line for each shard left out.
    """

    output: OutputDirectory
    progress: Progress
    rows: int = 0
    errors: int = 0
    skipped: int = 0
    damaged: list[str] = field(default_factory=list)

    def plan(self, shards: list[ShardFile]) -> list[tuple[ShardFile, ShardIndex]]:
        """Index all shards; return those that are not committed yet."""
        todo = []
        self.progress.start("index shards", len(shards))
        try:
            for number, shard in enumerate(shards, 1):
                try:
                    index = load_index(shard.path)
                except MaekitError as error:
                    self._leave_out(shard, str(error))
                    continue
                record = self.output.committed(shard, index)
                if record is not None:
                    self.skipped += 1
                    self._count(record)
                elif index.samples:
                    todo.append((shard, index))
                self.progress.advance(number)
        finally:
            self.progress.stop()
        for orphan in self.output.orphans(shards):
            self.progress.note(f"{orphan} was embedded earlier and is not in the input now; its file stays where it is")
        if self.skipped:
            self.progress.note(f"{self.skipped} of {len(shards)} shards are committed already")
        return todo

    def embed(self, todo: list[tuple[ShardFile, ShardIndex]], pipeline: EmbeddingPipeline) -> None:
        """Embed and commit shard by shard.

        Raises:
            Stopped: SIGTERM or SIGINT came.
            MaekitError: the model failed, or the output cannot be written.
        """
        self.progress.start("embed", sum(index.samples for _, index in todo))
        started = time.perf_counter()
        timing = pipeline.timing
        try:
            with stop_on_signal() as stopped_by:
                for result in pipeline.run([index for _, index in todo]):
                    if result is not None and result.failure is not None:
                        self._leave_out(todo[result.number][0], result.failure)
                    elif result is not None:
                        self._count(self.output.write(*todo[result.number], result))
                    rate = timing.images / (time.perf_counter() - started)
                    self.progress.advance(timing.samples)
                    self.progress.figures({"images_per_second": rate, "binds": timing.binds, "errors": self.errors})
                    if signal_name := stopped_by():
                        raise Stopped(f"stopped by {signal_name}; finished shards are committed, run it again to go on")
        finally:
            self.progress.stop()

    def _count(self, record: CommitRecord) -> None:
        self.rows += record.rows
        self.errors += record.errors

    def _leave_out(self, shard: ShardFile, reason: str) -> None:
        self.damaged.append(reason)
        self.output.write_damage(shard, reason)
        self.progress.note(f"left out: {reason}")


def raise_if_damaged(result: EmbedResult) -> None:
    """Raise where shards were left out: the work is done as far as it can be, and that is not all of it.

    Raises:
        MaekitError: names the first of them.
    """
    if result.damaged:
        raise MaekitError(f"{len(result.damaged)} shards are damaged and have no embeddings: {result.damaged[0]}")
