"""`maekit pack`: a folder of images -> tar shards, written by webdataset's writer, byte-identical on every run.

    folder (and table) -> samples, sorted -> a plan of shards -> each written, read back, indexed -> the folder renamed

Processes write the shards into a temporary folder, which is renamed to the final one when all of them are complete.
After a kill, the next run reuses the finished shards there if the plan is unchanged.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from maekit.config.fields import check
from maekit.config.pack import PackConfig
from maekit.shards.index import IMAGE_EXTENSIONS, METADATA, build_index, index_path, read_index, write_index
from maekit.shards.table import Labels, extension_of, read_table
from maekit.system import files, locks
from maekit.system.errors import InputError, MaekitError, Stopped
from maekit.system.machine import cores
from maekit.system.parallel import Workers
from maekit.system.progress import Progress, Silent
from maekit.system.signals import stop_on_signal
from maekit.system.text import count, first_few

SIDECARS = ("json", "txt", "cls")
_PLAN, _FOLDER = ".plan", "shards"  # in the temporary folder: the plan, and the future folder of shards


@dataclass(frozen=True)
class PackReport:
    """What was packed.

    Attributes:
        shards: the shards, in order; each has its index beside it.
        samples: number of images in them.
        bytes: total size of the shards.
        classes: class names by label; empty if labels are numbers, or there are none.
        class_counts: number of images per class name.
        unlabelled: number of images without a label; 0 if no image has one.
        empty: number of image files of zero bytes.
        sidecars: number of sidecars per extension.
        passed_over: number of files that were not packed, per kind.
        resumed: number of shards that an earlier, interrupted run had written.
    """

    shards: list[Path]
    samples: int
    bytes: int
    classes: list[str]
    class_counts: dict[str, int]
    unlabelled: int
    empty: int
    sidecars: dict[str, int]
    passed_over: dict[str, int]
    resumed: int


@dataclass(frozen=True, slots=True)
class _Source:
    """One sample: its key, its member files as (extension, path), and a label to be stored without a file."""

    key: str
    members: tuple[tuple[str, str], ...]
    label: int | None


@dataclass(frozen=True, slots=True)
class _Shard:
    """One shard of the plan."""

    path: Path
    sources: tuple[_Source, ...]


def pack(config: PackConfig, progress: Progress | None = None) -> PackReport:
    """Pack the image files below a folder into `out/00000.tar`, `out/00001.tar`, …, each with its index beside it.

    Image bytes are stored unchanged. The key is the path below `images` without its extension. A `.json`, `.txt` or
    `.cls` file of the same name is stored as a sidecar. The label is stored as a `.cls` member: an integer from the
    table, or the index of the class name in sorted order; the names are then written to `out/classes.txt`. The folder
    appears whole or not at all; called again after a kill, it keeps the finished shards.

    Args:
        config: the folder of images, the folder of shards, and the options.
        progress: receives progress updates.

    Raises:
        InputError: there is no image, `out` is not empty, the table is wrong, or names cannot be used as keys.
        Stopped: SIGTERM or SIGINT arrived; finished shards are kept for the next call.
        MaekitError: a file cannot be read or written.
    """
    progress = progress or Silent()
    images, out = Path(config.images), Path(os.path.realpath(config.out))
    _check(images, out, config)
    progress.note(f"listing {images}")
    sources, classes, passed_over = _sources(images, config, progress)
    aside = out.parent / f".{out.name}.packing"
    with locks.sole_owner(aside):
        folder = aside / _FOLDER
        divided = enumerate(_divide(sources, config))
        plan = [_Shard(folder / f"{number:05d}.tar", tuple(group)) for number, group in divided]
        _take_up(aside, _fingerprint(sources, classes, plan))
        resumed = sum(index_path(shard.path).exists() for shard in plan)
        if resumed:
            progress.note(f"going on: {resumed} of {count('shard', len(plan))} written before")
        _write(plan, config.workers or cores(), progress)
        if classes:
            files.write_atomically(folder / "classes.txt", "".join(f"{name}\n" for name in classes).encode())
        _publish(aside, out)
    shards = [out / shard.path.name for shard in plan]
    labelled = sum(map(_has_label, sources))
    return PackReport(
        shards=shards,
        samples=len(sources),
        bytes=sum(shard.stat().st_size for shard in shards),
        classes=classes,
        class_counts=dict(Counter(classes[source.label] for source in sources if classes and source.label is not None)),
        unlabelled=len(sources) - labelled if labelled else 0,
        empty=sum(_stat(source.members[0][1]).st_size == 0 for source in sources),
        sidecars=dict(Counter(kind for source in sources for kind, _ in source.members if kind in SIDECARS)),
        passed_over=passed_over,
        resumed=resumed,
    )


def _has_label(source: _Source) -> bool:
    return source.label is not None or any(kind == "cls" for kind, _ in source.members)


def _check(images: Path, out: Path, config: PackConfig) -> None:
    check(config)
    if config.table is None and (config.path_column or config.label_column):
        raise InputError("`path_column` and `label_column` name columns of `table`, which is not given")
    if not images.is_dir():
        raise InputError(f"{images}: no such folder of images")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; SHARDS names a folder")
    if os.path.ismount(out) or out == Path.cwd():
        raise InputError(f"{out} cannot be replaced by a finished folder; name a new folder in it")
    if out.is_dir() and (present := sorted(out.iterdir())):
        raise InputError(f"{out} already holds {present[0].name}; pack into a new or empty folder")


def _sources(images: Path, config: PackConfig, progress: Progress) -> tuple[list[_Source], list[str], dict[str, int]]:
    """Return the samples in order, the class names, and the number of files not packed, per kind."""
    found = {path.relative_to(images): path for path in files.walk_files(images)}
    table = Path(config.table).resolve() if config.table else None
    wanted: Labels
    if config.table is not None:
        wanted = read_table(images, config, found)
    else:
        pictures = [path for path in found if extension_of(path) in IMAGE_EXTENSIONS]
        astray = [path for path in pictures if len(path.parts) == 1]
        in_folders = config.classes and not astray
        if config.classes and 0 < len(astray) < len(pictures):
            progress.note(f"no classes: {astray[0]} lies in no folder ({len(astray)} of {len(pictures)} images)")
        wanted = {path: path.parts[0] if in_folders else None for path in pictures}
    if not wanted:
        kinds = ", ".join(sorted(IMAGE_EXTENSIONS))
        raise InputError(f"{images}: no image file in this folder (looked for {kinds})")
    names = sorted({label for label in wanted.values() if isinstance(label, str)})
    numbers = {name: number for number, name in enumerate(names)}
    problems: list[str] = []
    owners: dict[str, Path] = {}
    used: set[Path] = set()
    sources = []
    for path, label in wanted.items():
        # A key ends at the first dot of its last component, so dots inside a stem become underscores.
        key = path.with_name(path.stem.replace(".", "_")).as_posix()
        try:
            files.require_utf8(path)
        except InputError as error:
            problems.append(str(error))
            continue
        if not os.access(found[path], os.R_OK):
            problems.append(f"{path} cannot be read")
        elif METADATA.match(key):
            problems.append(f"{path}: WebDataset sets names such as __x__ aside as its own; rename it")
        elif (owner := owners.setdefault(key, path)) != path:
            problems.append(f"{owner} and {path} would both get the key {key!r}; rename one of them")
        # A label from the table or the folder replaces a label file, which is counted as passed over.
        beside = [path.with_suffix(f".{kind}") for kind in SIDECARS if kind != "cls" or label is None]
        own = [path, *(other for other in beside if other in found and other not in used)]
        used.update(own)
        members = tuple((extension_of(member), str(found[member])) for member in own)
        sources.append(_Source(key, members, numbers[label] if isinstance(label, str) else label))
    if problems:
        raise InputError(first_few(problems))
    passed_over = Counter(
        "images not in the table" if extension_of(path) in IMAGE_EXTENSIONS else path.suffix.lower() or "no extension"
        for path, file in found.items()
        if path not in used and file.resolve() != table
    )
    return sources, names, dict(passed_over)


def _divide(sources: Sequence[_Source], config: PackConfig) -> Iterator[list[_Source]]:
    """Divide the samples into shards by count and size."""
    limit = None if config.shard_mb is None else int(config.shard_mb * 1e6)
    group: list[_Source] = []
    held = tarfile.RECORDSIZE  # the end of an archive is padded to this
    for source in sources:
        size = _bytes_in_tar(source) if limit is not None else 0
        if group and (len(group) == config.samples_per_shard or (limit is not None and held + size > limit)):
            yield group
            group, held = [], tarfile.RECORDSIZE
        group.append(source)
        held += size
    yield group


def _bytes_in_tar(source: _Source) -> int:
    """Return how many bytes a sample takes in an archive."""
    sizes = [(kind, _stat(path).st_size) for kind, path in source.members]
    if source.label is not None:
        sizes.append(("cls", len(str(source.label))))
    total = 0
    for kind, size in sizes:
        header = tarfile.TarInfo(f"{source.key}.{kind}").tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")
        total += len(header) + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return total


def _stat(path: str) -> os.stat_result:
    with files.reading(path):
        return os.stat(path)


def _fingerprint(sources: Sequence[_Source], classes: Sequence[str], plan: Sequence[_Shard]) -> bytes:
    """Return a digest of everything that determines the bytes of the shards and the class names."""
    digest = hashlib.sha256(json.dumps([[len(shard.sources) for shard in plan], list(classes)]).encode())
    for source in sources:
        stats = [(kind, path, _stat(path)) for kind, path in source.members]
        row = [source.key, source.label, [(kind, path, s.st_size, s.st_mtime_ns) for kind, path, s in stats]]
        digest.update(json.dumps(row).encode())
    return digest.hexdigest().encode()


def _take_up(aside: Path, fingerprint: bytes) -> None:
    """Keep the shards that an interrupted run of the same plan wrote; delete those of another plan."""
    plan, folder = aside / _PLAN, aside / _FOLDER
    if not plan.exists() or plan.read_bytes() != fingerprint:
        shutil.rmtree(folder, ignore_errors=True)
    for unfinished in folder.glob(".*.tmp"):
        unfinished.unlink()
    files.write_atomically(plan, fingerprint)


def _write(plan: Sequence[_Shard], workers: int, progress: Progress) -> None:
    import webdataset  # noqa: F401  (loads torch if installed: once here instead of in each forked process)

    progress.start("pack", sum(len(shard.sources) for shard in plan))
    try:
        with stop_on_signal(after="after this shard") as stopped_by, Workers(min(workers, len(plan))) as pool:
            for done in itertools.accumulate(pool.map(_write_shard, plan)):
                progress.advance(done)
                if done and (name := stopped_by()):
                    raise Stopped(f"stopped by {name}; finished shards are kept, run the same command again to go on")
    finally:
        progress.stop()


def _write_shard(shard: _Shard) -> int:
    """Write one shard and its index, unless they exist; return its number of samples."""
    import webdataset

    # What an interrupted run left is scanned: a disk may have lost data it confirmed.
    kept = read_index(shard.path, index_path(shard.path))
    if kept and list(kept.keys()) == [source.key for source in shard.sources] and kept.describes(shard.path):
        return kept.samples
    written: list[tuple[str, str, int | None]] = []
    with (
        files.atomic_file(shard.path) as file,
        # A fixed mtime for identical bytes, PAX for names of any length.
        webdataset.TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as writer,
    ):
        for source in shard.sources:
            sample = _read(source)
            written += [(source.key, kind, zlib.crc32(data)) for kind, data in sorted(sample.items())]
            writer.write({"__key__": source.key, **sample})
    index = build_index(shard.path, crc=True)
    there = [(index.key(n), member.extension, member.crc) for n in range(index.samples) for member in index.members(n)]
    if there != written:
        shard.path.unlink()
        raise MaekitError(f"{shard.path}: what was read back is not what was written; is the disk sound?")
    write_index(index)
    return index.samples


def _read(source: _Source) -> dict[str, bytes]:
    """Return the members of a sample by extension."""
    sample = {}
    for kind, path in source.members:
        with files.reading(path):
            sample[kind] = Path(path).read_bytes()
    if source.label is not None:
        sample["cls"] = str(source.label).encode()
    return sample


def _publish(aside: Path, out: Path) -> None:
    """Rename the finished folder to `out`, and remove the temporary folder."""
    with files.writing(out):
        with contextlib.suppress(FileNotFoundError):
            out.rmdir()
        (aside / _FOLDER).rename(out)
        files.fsync_directory(out.parent)
        for own in (_PLAN, ".lock"):  # after the rename: without the plan, a call after a kill would start over
            (aside / own).unlink()
        aside.rmdir()
