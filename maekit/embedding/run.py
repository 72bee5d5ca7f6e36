"""`maekit embed`: from shards to embeddings, one committed file per shard."""

import time
from dataclasses import dataclass
from pathlib import Path

from maekit import files
from maekit.embedding.pipeline import EmbeddingPipeline
from maekit.embedding.session import CPU, EncoderSession
from maekit.embedding.writer import DTYPES, OutputDirectory, OutputOptions, check_output_names
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
        workers = config.workers or cores()
        pipeline = EmbeddingPipeline(session, batch_size=batch_size, workers=workers)
        return _run(config, shards, pipeline, output, session.provider, progress)


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


def _run(
    config: EmbedConfig,
    shards: list[ShardFile],
    pipeline: EmbeddingPipeline,
    output: OutputDirectory,
    provider: str,
    progress: Progress,
) -> EmbedResult:
    rows = errors = skipped = 0
    damaged: list[str] = []
    todo: list[tuple[ShardFile, ShardIndex]] = []

    def leave_out(shard: ShardFile, reason: str) -> None:
        damaged.append(reason)
        output.write_damage(shard, reason)
        progress.note(f"left out: {reason}")

    progress.start("index shards", len(shards))
    for number, shard in enumerate(shards):
        progress.advance(number)
        try:
            index = load_index(shard.path)
        except MaekitError as error:
            leave_out(shard, str(error))
            continue
        record = output.committed(shard, index)
        if record is not None:
            skipped, rows, errors = skipped + 1, rows + record.rows, errors + record.errors
        elif index.samples:
            todo.append((shard, index))
    progress.stop()
    for orphan in output.orphans(shards):
        progress.note(f"{orphan} was embedded earlier and is not in the input now; its file stays in {config.out}")
    if skipped:
        progress.note(f"{skipped} of {len(shards)} shards are committed already")
    total = sum(index.samples for _, index in todo)
    started, started_cpu = time.perf_counter(), time.process_time()
    done_before = 0
    done = 0
    progress.start("embed", total)
    try:
        with stop_on_signal() as stopped_by:
            for result in pipeline.run([index for _, index in todo]):
                if result is not None and result.failure is not None:
                    leave_out(todo[result.number][0], result.failure)
                elif result is not None:
                    record = output.write(*todo[result.number], result)
                    rows, errors = rows + record.rows, errors + record.errors
                    done += record.rows + record.errors
                    done_before = pipeline.timing.images
                progress.advance(done + pipeline.timing.images - done_before)
                elapsed = time.perf_counter() - started
                progress.figures(
                    {
                        "images_per_second": pipeline.timing.images / elapsed,
                        "binds": pipeline.timing.binds,
                        "errors": errors,
                    }
                )
                if signal_name := stopped_by():
                    raise Stopped(
                        f"stopped by {signal_name}; finished shards are committed, run the same command again to go on"
                    )
    finally:
        progress.stop()
    elapsed = time.perf_counter() - started
    timing = pipeline.timing
    if provider == CPU:
        share = (time.process_time() - started_cpu) / (elapsed * cores())
    else:
        share = max(timing.running, timing.waiting) / elapsed
    return EmbedResult(
        out=config.out,
        rows=rows,
        errors=errors,
        shards=len(todo),
        skipped=skipped,
        damaged=damaged,
        images_per_second=round(timing.images / elapsed, 2) if timing.images else 0.0,
        limit_share=round(share, 4) if timing.images else 0.0,
        binds=timing.binds,
        provider=provider,
    )


def raise_if_damaged(result: EmbedResult) -> None:
    """Raise where shards were left out: the work is done as far as it can be, and that is not all of it.

    Raises:
        MaekitError: names the first of them.
    """
    if result.damaged:
        raise MaekitError(f"{len(result.damaged)} shards are damaged and have no embeddings: {result.damaged[0]}")
