"""`maekit embed`: images to embeddings, shard by shard; each shard is committed as a whole."""

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from maekit.config.embed import EmbedConfig
from maekit.embedding.commit_record import CommitRecord, OutputOptions
from maekit.embedding.device_worker import Assignment, OneDevice, Outcome
from maekit.embedding.devices import Devices, ManyDevices
from maekit.embedding.inputs import FolderPart, Part, PlannedPart, Scope, TarPart, find_inputs
from maekit.embedding.output_directory import OutputDirectory, batch_size_of, check_output_names, provider_of
from maekit.embedding.session import Runtime, check_runtime
from maekit.embedding.speed import Speed
from maekit.embedding.splits import Split, find_split, unused_split
from maekit.embedding.verify import Verdict, verify
from maekit.images import Preprocess
from maekit.providers import CPU, OPENVINO, check_device, gpu_count, runs_on_cpu
from maekit.shards.cache import RemoteCache
from maekit.shards.index import load_index
from maekit.system import files
from maekit.system.errors import InputError, MaekitError, Stopped
from maekit.system.machine import cores
from maekit.system.parallel import map_in_threads
from maekit.system.progress import Progress, Silent
from maekit.system.signals import stop_on_signal
from maekit.system.text import count

# On a CPU larger batches only fall out of the caches: of 4 to 64 images the small batches are fastest, for models of 65
# and of 197 tokens. A GPU needs large batches, of more images the smaller they are. The size is not measured at the
# start of a run: it changes the last bits of the arithmetic, and must not vary with the noise of a measurement.
_CPU_BATCH, _GPU_BATCH, _LARGEST_GPU_BATCH = 8, 256, 1024
_USUAL_PIXELS = 224 * 224
_LOOKING = 16  # parts whose version is requested concurrently
# Parts that one device uses at once: fetched ahead, being embedded, being written.
_IN_USE = 6


@dataclass
class EmbedResult:
    """Result of a run; `--json` prints it. A run counts in it.

    Attributes:
        out: the output directory.
        rows: keys with an embedding, in all shards of this split, including those of earlier runs.
        errors: keys without one.
        shards: shards embedded by this run.
        skipped: shards that were committed already.
        damaged: one line per shard that cannot be read or trusted; only what was embedded from it earlier counts.
        elsewhere: shards that another run holds.
        images_per_second: throughput of this run.
        limit_share: utilisation: that throughput as a fraction of the limit set by decoding and the model. On a CPU
            they share the cores, and the limit is 1 / (1 / decode + 1 / model); on a GPU it is the slower of the two.
        rates: images per second of each stage if it ran alone: `decode`, `model`, `write`.
        binds: the bottleneck: the slowest stage.
        provider: execution provider that ran the model.
        batch_size: images per run of the model.
        split: name of the split: `all`, or for example `0-of-8`.
        verified: result of `--verify`; None if it was not requested.
        unused: number of images, or of files in a folder, that are the image of no sample, by kind.
    """

    out: str
    rows: int = 0
    errors: int = 0
    shards: int = 0
    skipped: int = 0
    damaged: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    images_per_second: float = 0.0
    limit_share: float = 0.0
    rates: dict[str, float] = field(default_factory=dict)
    binds: str = ""
    provider: str = ""
    batch_size: int = 0
    split: str = "all"
    verified: Verdict | None = None
    unused: dict[str, int] = field(default_factory=dict)


def embed(config: EmbedConfig, progress: Progress | None = None) -> EmbedResult:
    """Embed every sample of every shard; skip shards that are committed already.

    Raises:
        InputError: bad usage, no shards, no working provider, or the output belongs to another model.
        Stopped: received SIGTERM or SIGINT; finished shards are committed.
        MaekitError: a failure during the run.
    """
    progress = progress or Silent()
    split = _check(config)
    remote = RemoteCache(int(config.cache_gb * 1e9))
    # A signal stops downloads at once: the main thread may be waiting for one.
    begun = threading.Event()
    stopping = stop_on_signal(remote.stop, has_begun=begun.is_set, before="the first image", after="after this batch")
    with stopping as stopped_by, _devices(config, split, remote) as devices:
        running = devices.running
        progress.note(f"provider: {running.provider} ({running.reason})")
        if on_cpu := running.nodes.get(CPU) if running.provider != CPU else None:
            progress.note(f"{on_cpu} of {sum(running.nodes.values())} nodes of the model run on the CPU")
        if split.count > 1:
            progress.note(f"split {split.number} of {split.count}, numbered from 0 (from {split.origin})")
        elif config.split is None and (variables := unused_split()):
            progress.note(f"{variables} name a split; the whole input is embedded (`split=auto` takes that split)")
        parts = find_inputs(config.shards, config.keep, image=config.image, on_note=progress.note)
        output = _output(config, split, devices)
        output.refuse_foreign()
        check_output_names(output.layout, parts)
        result = EmbedResult(
            config.out, provider=running.provider, batch_size=output.options.batch_size, split=split.name
        )
        with output.sole_run():
            job = _Job(output, progress, remote, stopped_by, result)
            planned = job.look(parts, config.select, devices.count)
            output.claim([part.name for part in parts], overwrite=config.overwrite)
            if hidden := [part.name for part in parts if any(p.startswith("_") for p in part.name.split("/"))]:
                progress.note(f"{hidden[0]}: pyarrow.dataset and others pass over files and folders with a leading _")
            job.refuse_renamed(planned)
            planned = split.of(planned if config.limit is None else list(job.first(planned, config.limit)))
            todo = job.without_committed(planned, config.reasons_to_retry)
            begun.set()
            seconds = job.embed(todo, devices)
            if not (result.rows or result.errors or result.damaged or result.elsewhere):
                if split.count > 1:
                    progress.note(f"split {split.name} is empty: of {count('shard', len(parts))}, none falls to it")
                    return result
                output.discard_if_new()
                narrowed = f" whose key matches {config.select}" if config.select is not None else ""
                raise InputError(f"the {count('shard holds', len(parts), 'shards hold')} no sample at all{narrowed}")
            if config.verify:
                result.verified = verify(
                    output,
                    planned,
                    remote=remote,
                    progress=progress,
                    stop_if_asked=job.stop_if_asked,
                    stopped=stopped_by,
                )
        result.images_per_second, result.rates, result.limit_share, result.binds = Speed.of(devices, seconds)
    return result


def _check(config: EmbedConfig) -> Split:
    """Refuse impossible settings before anything starts, and return the split."""
    config.validate()
    for device in config.devices or (config.device,):
        check_device(device)
        check_runtime(config.runtime, config.precision, device)
    files.require_utf8(Path(config.out))
    split = find_split(config.split, config.num_splits)
    if config.overwrite and split.count > 1:
        raise InputError("`overwrite` with several splits: each would delete what the others wrote; delete `out` first")
    if config.limit is not None and split.count > 1:
        raise InputError("`limit` with several splits: run it as one")
    return split


def _devices(config: EmbedConfig, split: Split, remote: RemoteCache) -> Devices:
    """Return the devices; this machine's cores are divided among them and the other splits that run here."""
    device = config.device
    if split.local_count > 1 and not config.devices and device in ("auto", "cuda"):
        with contextlib.suppress(OSError):  # no driver; reported when the device is opened
            if (there := gpu_count() or 0) > 1:
                device = f"cuda:{split.local_number % there}"
    names = config.devices or (device,)
    share = max(1, cores() // (split.local_count * len(names)))
    workers = max(1, config.workers // len(names)) if config.workers else share
    devices = [
        OneDevice(
            Path(config.model),
            name,
            provider_options=config.provider_options,
            runtime=_runtime(config),
            precision=config.precision,
            cores=share,
            workers=workers,
            remote=remote,
        )
        for name in names
    ]
    return ManyDevices(devices) if len(devices) > 1 else devices[0]


def _runtime(config: EmbedConfig) -> Runtime:
    """Return the runtime; `auto` is what the output was made with, if there is one."""
    if config.runtime != "auto" or config.overwrite:
        return config.runtime
    made_with = provider_of(Path(config.out))
    if made_with is None:
        return "auto"
    return "openvino" if made_with == OPENVINO else "onnxruntime"


def _output(config: EmbedConfig, split: Split, devices: Devices) -> OutputDirectory:
    running, description = devices.running, devices.running.description
    earlier = None if config.overwrite else batch_size_of(Path(config.out))
    options = OutputOptions(
        model=description.sha256,
        provider=running.provider,
        provider_options=dict(sorted(config.provider_options.items())),
        format=config.format,
        dtype=config.dtype,
        keep=config.keep,
        select=config.select,
        limit=config.limit,
        image=config.image,
        precision=config.precision if config.precision != "fp32" else None,
        batch_size=config.batch_size or earlier or _usual_batch_size(description.preprocess, running.provider),
    )
    return OutputDirectory(Path(config.out), description, options, split.name)


def _usual_batch_size(preprocess: Preprocess, provider: str) -> int:
    """Return images per batch: 8 on a CPU; on a GPU as many pixels as 256 images of 224 x 224 have."""
    if runs_on_cpu(provider):
        return _CPU_BATCH
    size = max(1, _GPU_BATCH * _USUAL_PIXELS // (preprocess.size[0] * preprocess.size[1]))
    return min(_LARGEST_GPU_BATCH, 1 << (size.bit_length() - 1))


@dataclass
class _Job:
    """One run.

    Attributes:
        output: receives rows and records.
        progress: receives progress updates.
        remote: cache that fetches remote shards.
        stopped_by: returns the name of the signal received, or None.
        result: the run is counted here.
    """

    output: OutputDirectory
    progress: Progress
    remote: RemoteCache
    stopped_by: Callable[[], str | None]
    result: EmbedResult

    def look(self, parts: Sequence[Part], select: str | None, devices: int) -> list[PlannedPart]:
        """Look up the version and the size of each part without reading it.

        Raises:
            InputError: the cache is too small for the remote parts.
        """
        planned = []
        looks = map_in_threads(lambda part: part.look(self.remote), parts, threads=_LOOKING)
        for part, (version, size) in zip(parts, looks, strict=True):
            self.stop_if_asked()
            planned.append(PlannedPart(part, version, size, Scope(select)))
        if distant := [remote.size for remote in planned if remote.part.is_remote]:
            self.remote.refuse_if_too_small(min(len(distant), _IN_USE * devices), max(distant))
        return planned

    def first(self, parts: Sequence[PlannedPart], limit: int) -> Iterator[PlannedPart]:
        """Yield the parts that hold the first `limit` samples of the input, each with how many of them it gives."""
        for planned in parts:
            self.stop_if_asked()
            if not limit:
                return
            select = planned.scope.select
            try:
                images = planned.part.open(self.remote)
            except MaekitError:
                yield replace(planned, scope=Scope(select, limit))  # reported when its turn comes; it adds no rows
                continue
            with contextlib.closing(images):
                count = len(Scope(select).ordinals(images))
            yield replace(planned, scope=Scope(select, limit if count > limit else None))
            limit -= min(count, limit)

    def without_committed(self, parts: Sequence[PlannedPart], retry: Sequence[str]) -> list[PlannedPart]:
        """Return the parts that are new, look changed, or have errors with a reason to retry; count the others."""
        todo = []
        for planned in parts:
            record = self.output.committed(planned.name, planned.scope.first)
            if record is not None and retry and self.output.has_errors(record, retry):
                todo.append(replace(planned, is_retried=True))
            elif record is not None and planned.has_version(record.input_version):
                if isinstance(planned.part, FolderPart) and record.unused != planned.part.unused:
                    record = self.output.renew(record, record.input_version, dict(planned.part.unused))
                self._settle(Outcome(planned.name, "skipped", record))
            else:
                todo.append(planned)
        if retried := sum(planned.is_retried for planned in todo):
            self.progress.note(f"{count('shard', retried)} with errors to retry: embedded again")
        if self.result.skipped:
            self.progress.note(f"{self.result.skipped} of {count('shard', len(parts))} committed already")
        return todo

    def refuse_renamed(self, parts: Sequence[PlannedPart]) -> None:
        """Refuse shards that were embedded under other names: the output would contain their rows twice.

        Raises:
            InputError: a shard was renamed; names it.
        """
        orphans = self.output.orphans({planned.name for planned in parts})
        known = {(Path(r.shard).name, r.input_version): r for r in orphans if r.input_version}
        for planned in parts:
            earlier = known.get((Path(planned.name).name, planned.version or ""))
            if earlier is None or self.output.committed(planned.name, earlier.first) is not None:
                continue
            if not _has_digest(planned.part, earlier):
                continue  # a different shard with the same name, size and time
            raise InputError(
                f"the shard {earlier.shard} of an earlier run would be {planned.name} now, and stand twice in "
                f"{self.output.path}: names are relative to the common folder of all inputs; give the same one, or "
                "another `out`"
            )
        for record in orphans:
            if isinstance(parts[0].part, FolderPart) and re.fullmatch(r"images-\d{5,}", record.shard):
                self.output.forget(record.shard)  # its images now belong to other parts
                continue
            self.progress.note(
                f"{record.shard} was embedded earlier and is not in the input now; its rows stay where they are"
            )

    def embed(self, todo: list[PlannedPart], devices: Devices) -> float:
        """Embed and commit part by part; each is fetched and checked when its turn comes. Return the seconds it took.

        Raises:
            Stopped: received SIGTERM or SIGINT.
            MaekitError: the model failed, or the output cannot be written.
        """
        self.progress.start("embed", sum(planned.size for planned in todo), unit="bytes")
        started = time.perf_counter()
        job = Assignment(
            todo,
            self.output,
            self.result.batch_size,
            report=self._settle,
            note=self.progress.note,
            stopped=self.stopped_by,
            ahead=4 if any(planned.part.is_remote for planned in todo) else 2,
        )
        try:
            for _ in devices.run(job):
                self._show(devices, time.perf_counter() - started)
            seconds = time.perf_counter() - started
            self._show(devices, seconds)
            self.stop_if_asked()
        finally:
            self.progress.stop()
        return seconds

    def stop_if_asked(self) -> None:
        """Stop if a signal was received.

        Raises:
            Stopped: a signal was received.
        """
        if signal_name := self.stopped_by():
            raise Stopped(f"stopped by {signal_name}; finished shards are committed, run it again to go on")

    def _show(self, devices: Devices, seconds: float) -> None:
        self.progress.advance(int(devices.timing.bytes))
        self.progress.figures({**Speed.of(devices, seconds)._asdict(), "errors": self.result.errors})

    def _settle(self, outcome: Outcome) -> None:
        """Count the result of a part."""
        result = self.result
        if outcome.record is not None:
            result.rows += outcome.record.rows
            result.errors += outcome.record.errors
            for kind, number in outcome.record.unused.items():
                result.unused[kind] = result.unused.get(kind, 0) + number
        if outcome.kind == "embedded":
            result.shards += 1
        elif outcome.kind == "skipped":
            result.skipped += 1
        elif outcome.kind == "elsewhere":
            result.elsewhere.append(outcome.name)
            self.progress.note(f"{outcome.name} is in the hands of {outcome.reason}")
        else:
            result.damaged.append(outcome.reason)
            self.progress.note(f"left out: {outcome.reason}")


def _has_digest(part: Part, record: CommitRecord) -> bool:
    """Whether a part still has the digest that was embedded; a remote part counts as the same, by its version."""
    if not isinstance(part, TarPart) or part.is_remote:
        return part.is_remote
    try:
        return load_index(part.shard.path).digest == record.input_digest
    except MaekitError:
        return False  # reported when its turn comes


def raise_if_incomplete(result: EmbedResult) -> None:
    """Raise if a finished run left shards out or verification found problems.

    Raises:
        MaekitError: names the first of them.
    """
    if result.damaged:
        raise MaekitError(f"{count('shard was', len(result.damaged), 'shards were')} left out: {result.damaged[0]}")
    if result.elsewhere:
        raise MaekitError(
            f"{count('shard is', len(result.elsewhere), 'shards are')} in the hands of another run: "
            f"{result.elsewhere[0]}; run the command again when it has ended"
        )
    if result.verified is not None and result.verified.problems:
        problems = result.verified.problems
        raise MaekitError(f"`verify`: {count('problem', len(problems))}, the first: {problems[0]}")
    if result.errors and not result.rows:
        of = count("sample", result.errors)
        raise MaekitError(f"none of {of} has an embedding; {result.out}/_maekit/errors says why")
