"""`maekit embed`: images to embeddings, shard by shard; each shard is committed as a whole."""

import contextlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from maekit.config.embed import EmbedConfig
from maekit.embedding.commit_record import CommitRecord, OutputOptions
from maekit.embedding.device_worker import Outcome, Task
from maekit.embedding.devices import Assignment, DeviceOptions, Devices, ManyDevices, OneDevice
from maekit.embedding.inputs import FolderPart, Part, Scope, TarPart, find_inputs
from maekit.embedding.output_directory import OutputDirectory, batch_size_of, check_output_names
from maekit.embedding.speed import Speed
from maekit.embedding.splits import Split, find_split
from maekit.embedding.verify import Verdict, verify
from maekit.images import Preprocess
from maekit.providers import CPU, check_device, gpu_count
from maekit.shards.cache import RemoteCache
from maekit.shards.index import load_index
from maekit.system import files
from maekit.system.errors import InputError, MaekitError, Stopped
from maekit.system.machine import cores
from maekit.system.parallel import map_in_threads
from maekit.system.progress import Progress, Silent
from maekit.system.signals import stop_on_signal

# On a CPU larger batches only fall out of the caches: of 4 to 64 images the small batches are fastest, for models of 65
# and of 197 tokens. A GPU needs large batches, of more images the smaller they are. The size is not measured at the
# start of a run: it changes the last bits of the arithmetic, and must not vary with the noise of a measurement.
_CPU_BATCH, _GPU_BATCH, _LARGEST_GPU_BATCH = 8, 256, 1024
_USUAL_PIXELS = 224 * 224
_LOOKING = 16  # shards whose version is requested concurrently
# Shards that one device uses at once: fetched ahead, being embedded, being written.
_IN_USE = 6


@dataclass(frozen=True)
class EmbedResult:
    """Result of a run; `--json` prints it.

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
    """

    out: str
    rows: int
    errors: int
    shards: int
    skipped: int
    damaged: list[str]
    elsewhere: list[str]
    images_per_second: float
    limit_share: float
    rates: dict[str, float]
    binds: str
    provider: str
    batch_size: int
    split: str
    verified: Verdict | None = None


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
    with stop_on_signal(remote.stop) as stopped_by, _devices(config, split, remote) as devices:
        running = devices.running
        progress.note(f"provider: {running.provider} ({running.reason})")
        if on_cpu := running.nodes.get(CPU) if running.provider != CPU else None:
            progress.note(f"{on_cpu} of {sum(running.nodes.values())} nodes of the model run on the CPU")
        if split.count > 1:
            progress.note(f"split {split.number} of {split.count}, numbered from 0 (from {split.origin})")
        parts = find_inputs(config.shards, config.keep)
        output = _output(config, split, devices)
        output.refuse_foreign()
        check_output_names(output.layout, parts)
        with output.sole_run():
            job = _Job(output, progress, remote, stopped_by)
            job.look(parts, max(1, len(config.devices)))
            output.claim([part.name for part in parts], overwrite=config.overwrite)
            if hidden := [part.name for part in parts if any(p.startswith("_") for p in part.name.split("/"))]:
                progress.note(f"{hidden[0]}: pyarrow.dataset and others pass over files and folders with a leading _")
            todo = job.plan(parts, split, Scope(config.select, config.limit))
            started = time.perf_counter()
            job.embed(todo, devices)
            seconds = time.perf_counter() - started
            if not (job.rows or job.errors or job.damaged or job.elsewhere) and split.count == 1:
                output.discard_if_new()
                raise InputError(f"the {len(parts)} shards hold no sample at all{_narrowed(config)}")
            verdict = verify(output, job.tasks, remote, progress, job.stop_if_asked) if config.verify else None
        speed = Speed.of(devices.timing, seconds, devices)
    return EmbedResult(
        out=config.out,
        rows=job.rows,
        errors=job.errors,
        shards=job.shards,
        skipped=job.skipped,
        damaged=job.damaged,
        elsewhere=job.elsewhere,
        images_per_second=round(speed.images_per_second, 2),
        limit_share=round(speed.limit_share, 4),
        rates={stage: round(rate, 2) for stage, rate in speed.rates.items()},
        binds=speed.binds,
        provider=running.provider,
        batch_size=output.options.batch_size,
        split=split.name,
        verified=verdict,
    )


def _check(config: EmbedConfig) -> Split:
    """Refuse impossible settings before anything starts, and return the split."""
    config.validate()
    for device in config.devices or (config.device,):
        check_device(device)
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
    options = [DeviceOptions(Path(config.model), name, config.provider_options, share, workers) for name in names]
    return ManyDevices(options, remote) if len(options) > 1 else OneDevice(options[0], remote)


def _output(config: EmbedConfig, split: Split, devices: Devices) -> OutputDirectory:
    running = devices.running
    description = running.description
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
        batch_size=config.batch_size or earlier or _usual_batch_size(description.preprocess, running.provider),
    )
    return OutputDirectory(Path(config.out), description, options, split.name)


def _usual_batch_size(preprocess: Preprocess, provider: str) -> int:
    """Return images per batch: 8 on a CPU; on a GPU as many pixels as 256 images of 224 x 224 have."""
    if provider == CPU:
        return _CPU_BATCH
    size = max(1, _GPU_BATCH * _USUAL_PIXELS // (preprocess.size[0] * preprocess.size[1]))
    return min(_LARGEST_GPU_BATCH, 1 << (size.bit_length() - 1))


def _narrowed(config: EmbedConfig) -> str:
    return f" whose key matches {config.select}" if config.select is not None else ""


@dataclass
class _Job:
    """State and counts of one run.

    Attributes:
        output: receives rows and records.
        progress: receives progress updates.
        remote: cache that fetches remote shards.
        stopped_by: returns the name of the signal received, or None.
        rows: keys with an embedding, including earlier ones.
        errors: keys without one, including earlier ones.
        shards: shards committed by this run.
        skipped: shards committed earlier.
        damaged: one line per shard left out.
        elsewhere: names of the shards that another run holds.
        tasks: all shards of this run.
        sizes: bytes of each part; 0 if unknown.
        versions: version of each part when the run began; None if unknown.
    """

    output: OutputDirectory
    progress: Progress
    remote: RemoteCache
    stopped_by: Callable[[], str | None]
    rows: int = 0
    errors: int = 0
    shards: int = 0
    skipped: int = 0
    damaged: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)

    def look(self, parts: Sequence[Part], devices: int) -> None:
        """Look up the size and version of each part without reading it.

        Raises:
            InputError: the cache is too small for the remote parts.
        """
        looks = map_in_threads(lambda part: part.look(self.remote), parts, threads=_LOOKING)
        for part, (version, size) in zip(parts, looks, strict=True):
            self.stop_if_asked()
            self.versions[part.name], self.sizes[part.name] = version, size
        if distant := [self.sizes[part.name] for part in parts if part.is_remote]:
            self.remote.refuse_if_too_small(min(len(distant), _IN_USE * devices), max(distant))

    def plan(self, parts: Sequence[Part], split: Split, scope: Scope) -> list[Task]:
        """Return the shards of this split that are new or look changed.

        Raises:
            InputError: a shard is committed under another name.
        """
        self._refuse_renamed(parts)
        scopes = self._scopes(parts, scope)
        self.tasks = [
            Task(part, self.versions[part.name], scopes[part.name]) for part in split.of(parts) if part.name in scopes
        ]
        todo = []
        for task in self.tasks:
            record = self.output.committed(task.part.name, task.scope.first)
            if record is not None and task.version and record.input_version == task.version:
                self._settle(Outcome(task.part.name, "skipped", record))
            else:
                todo.append(task)
        if self.skipped:
            self.progress.note(f"{self.skipped} of {len(self.tasks)} shards are committed already")
        return todo

    def _scopes(self, parts: Sequence[Part], scope: Scope) -> dict[str, Scope]:
        """Return which samples of each part to embed; a limit takes the first ones of the whole input."""
        if scope.first is None:
            return {part.name: scope for part in parts}
        scopes: dict[str, Scope] = {}
        left = scope.first
        for part in parts:
            self.stop_if_asked()
            if not left:
                break
            try:
                images = part.open(self.remote)
            except MaekitError:
                scopes[part.name] = Scope(scope.select, left)  # reported when its turn comes; it adds no rows
                continue
            try:
                count = len(Scope(scope.select).ordinals(images))
            finally:
                images.close()
            scopes[part.name] = Scope(scope.select, left if count > left else None)
            left -= min(count, left)
        return scopes

    def _refuse_renamed(self, parts: Sequence[Part]) -> None:
        """Refuse shards that were embedded under other names: the output would contain their rows twice.

        Raises:
            InputError: a shard was renamed; names it.
        """
        orphans = self.output.orphans([part.name for part in parts])
        known = {(Path(r.shard).name, r.input_version): r for r in orphans if r.input_version}
        for part in parts:
            earlier = known.get((Path(part.name).name, self.versions[part.name] or ""))
            if earlier is None or self.output.committed(part.name, earlier.first) is not None:
                continue
            if not _has_digest(part, earlier):
                continue  # a different shard with the same name, size and time
            raise InputError(
                f"the shard {earlier.shard} of an earlier run would be {part.name} now, and stand twice in "
                f"{self.output.path}: names are relative to the common folder of all inputs; give the same one, or "
                "another `out`"
            )
        for record in orphans:
            if any(isinstance(part, FolderPart) for part in parts) and re.fullmatch(r"images-\d{5,}", record.shard):
                self.output.forget(record.shard)  # its images now belong to other parts
                continue
            self.progress.note(
                f"{record.shard} was embedded earlier and is not in the input now; its rows stay where they are"
            )

    def embed(self, todo: list[Task], devices: Devices) -> None:
        """Embed and commit shard by shard; each is fetched and checked when its turn comes.

        Raises:
            Stopped: received SIGTERM or SIGINT.
            MaekitError: the model failed, or the output cannot be written.
        """
        self.progress.start("embed", sum(self.sizes[task.part.name] for task in todo), unit="bytes")
        started = time.perf_counter()
        try:
            batch_size = self.output.options.batch_size
            job = Assignment(todo, self.output, batch_size, self._settle, self.progress.note, self.stopped_by)
            for _ in devices.run(job):
                self._show(devices, time.perf_counter() - started)
            self._show(devices, time.perf_counter() - started)
            self.stop_if_asked()
        finally:
            self.progress.stop()

    def stop_if_asked(self) -> None:
        """Stop if a signal was received.

        Raises:
            Stopped: a signal was received.
        """
        if signal_name := self.stopped_by():
            raise Stopped(f"stopped by {signal_name}; finished shards are committed, run it again to go on")

    def _show(self, devices: Devices, seconds: float) -> None:
        timing = devices.timing
        speed = Speed.of(timing, seconds, devices)
        self.progress.advance(int(timing.bytes))
        self.progress.figures(
            {
                "images_per_second": speed.images_per_second,
                "rates": speed.rates,
                "binds": speed.binds,
                "errors": self.errors,
            }
        )

    def _settle(self, outcome: Outcome) -> None:
        """Count the result of a shard."""
        if outcome.record is not None:
            self.rows += outcome.record.rows
            self.errors += outcome.record.errors
        if outcome.kind == "embedded":
            self.shards += 1
        elif outcome.kind == "skipped":
            self.skipped += 1
        elif outcome.kind == "elsewhere":
            self.elsewhere.append(outcome.name)
            self.progress.note(f"{outcome.name} is in the hands of {outcome.reason}")
        else:
            self.damaged.append(outcome.reason)
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
        raise MaekitError(f"{len(result.damaged)} shards were left out: {result.damaged[0]}")
    if result.elsewhere:
        raise MaekitError(
            f"{len(result.elsewhere)} shards are in the hands of another run: {result.elsewhere[0]}; run the command "
            "again when it has ended"
        )
    if result.verified is not None and result.verified.problems:
        problems = result.verified.problems
        raise MaekitError(f"`verify`: {len(problems)} problems, the first: {problems[0]}")
