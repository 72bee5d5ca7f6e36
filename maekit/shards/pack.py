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
from maekit.shards.folder import FolderContents, extension_of, look_into, undecoded_notes
from maekit.shards.index import METADATA, build_index, index_path, read_index, write_index
from maekit.shards.read import CLASS_NAMES
from maekit.shards.repack import Source, samples_of
from maekit.shards.spec import find_shards
from maekit.shards.table import Labels, read_table
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
class _Sample:
    """One sample: its key, where its members come from, and a label to be stored without a file."""

    key: str
    members: tuple[Source, ...]
    label: int | None


@dataclass(frozen=True, slots=True)
class _Shard:
    """One shard of the plan."""

    path: Path
    samples: tuple[_Sample, ...]


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
    samples, classes, passed_over = _samples(images, config, progress)
    aside = out.parent / f".{out.name}.packing"
    with locks.sole_owner(aside):
        folder = aside / _FOLDER
        divided = enumerate(_divide(samples, config))
        plan = [_Shard(folder / f"{number:05d}.tar", tuple(group)) for number, group in divided]
        _take_up(aside, _fingerprint(samples, classes, plan))
        resumed = sum(index_path(shard.path).exists() for shard in plan)
        if resumed:
            progress.note(f"going on: {resumed} of {count('shard', len(plan))} written before")
        _write(plan, config.workers or cores(), progress)
        if classes:
            files.write_atomically(folder / "classes.txt", "".join(f"{name}\n" for name in classes).encode())
        _publish(aside, out)
    shards = [out / shard.path.name for shard in plan]
    labelled = sum(map(_has_label, samples))
    return PackReport(
        shards=shards,
        samples=len(samples),
        bytes=sum(shard.stat().st_size for shard in shards),
        classes=classes,
        class_counts=dict(Counter(classes[sample.label] for sample in samples if classes and sample.label is not None)),
        unlabelled=len(samples) - labelled if labelled else 0,
        empty=sum(_size(sample.members[0]) == 0 for sample in samples),
        sidecars=dict(Counter(m.extension for sample in samples for m in sample.members if m.extension in SIDECARS)),
        passed_over=passed_over,
        resumed=resumed,
    )


def _has_label(sample: _Sample) -> bool:
    return sample.label is not None or any(member.extension == "cls" for member in sample.members)


def _check(images: Path, out: Path, config: PackConfig) -> None:
    check(config)
    if config.table is None and (config.path_column or config.label_column):
        raise InputError("`path_column` and `label_column` name columns of `table`, which is not given")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; SHARDS names a folder")
    if os.path.ismount(out) or out == Path.cwd():
        raise InputError(f"{out} cannot be replaced by a finished folder; name a new folder in it")
    if out.is_dir() and (present := sorted(out.iterdir())):
        raise InputError(f"{out} already holds {present[0].name}; pack into a new or empty folder")


def _labels_of_folders(pictures: Sequence[Path], config: PackConfig, progress: Progress) -> Labels:
    """Return the label of each picture: its first folder, or None if one lies in no folder, or none is asked for."""
    astray = [path for path in pictures if len(path.parts) == 1]
    in_folders = config.classes and not astray
    if config.classes and 0 < len(astray) < len(pictures):
        progress.note(f"no classes: {astray[0]} lies in no folder ({len(astray)} of {len(pictures)} images)")
    return {path: path.parts[0] if in_folders else None for path in pictures}


def _samples(images: Path, config: PackConfig, progress: Progress) -> tuple[list[_Sample], list[str], dict[str, int]]:
    """Return the samples in order, the class names, and the number of files or members not packed, per kind."""
    contents = look_into(images) if images.is_dir() else None
    if contents is None or (contents.shards and not contents.images):
        return _samples_of_shards(config, progress)
    if config.key_by != PackConfig.key_by:
        raise InputError(f"`key_by` = {config.key_by}: is for shards; each file of a folder is a sample of its own")
    contents.refuse_mixture(images)
    for text in undecoded_notes(contents):
        progress.note(text)
    found = {
        path.relative_to(images): path for path in sorted([*contents.images, *contents.archives, *contents.others])
    }
    pictures = [path.relative_to(images) for path in contents.images]
    table = Path(config.table).resolve() if config.table else None
    if config.table is not None:
        wanted = read_table(images, config, found)
    else:
        wanted = _labels_of_folders(pictures, config, progress)
    if not wanted:
        raise InputError(f"{images}: no image file in this folder ({contents})")
    pictured = set(pictures)
    names = sorted({label for label in wanted.values() if isinstance(label, str)})
    numbers = {name: number for number, name in enumerate(names)}
    problems: list[str] = []
    owners: dict[str, Path] = {}
    used: set[Path] = set()
    samples = []
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
        there = [found[member] for member in own]
        members = tuple(Source(contents.formats.get(file) or extension_of(file), str(file)) for file in there)
        samples.append(_Sample(key, members, numbers[label] if isinstance(label, str) else label))
    if problems:
        raise InputError(first_few(problems))
    passed_over = Counter(
        "images not in the table" if path in pictured else _kind(file, contents)
        for path, file in found.items()
        if path not in used and file.resolve() != table
    )
    return samples, names, dict(passed_over)


def _samples_of_shards(config: PackConfig, progress: Progress) -> tuple[list[_Sample], list[str], dict[str, int]]:
    if config.table is not None:
        raise InputError("`table` is for a folder of images; shards keep their labels")
    shards = find_shards(config.images)
    found, left_out = samples_of(shards, by_name=config.key_by == "name", on_note=progress.note)
    if not found:
        raise InputError(f"{config.images}: no sample in these shards")
    names = {shard.path.parent / CLASS_NAMES for shard in shards}
    texts = {path.read_text(encoding="utf-8") if path.is_file() else "" for path in names}
    classes = texts.pop().splitlines() if len(texts) == 1 else []
    return [_Sample(key, tuple(members), None) for key, members in found.items()], classes, left_out


def _kind(file: Path, contents: FolderContents) -> str:
    """Return the kind of a file that is not packed: the format of an image that is not decoded, or its extension."""
    kind = contents.others.get(file)
    return kind if kind in contents.remedies else file.suffix.lower() or "no extension"


def _divide(samples: Sequence[_Sample], config: PackConfig) -> Iterator[list[_Sample]]:
    """Divide the samples into shards by count and size."""
    limit = None if config.shard_mb is None else int(config.shard_mb * 1e6)
    group: list[_Sample] = []
    held = tarfile.RECORDSIZE  # the end of an archive is padded to this
    for sample in samples:
        size = _bytes_in_tar(sample) if limit is not None else 0
        if group and (len(group) == config.samples_per_shard or (limit is not None and held + size > limit)):
            yield group
            group, held = [], tarfile.RECORDSIZE
        group.append(sample)
        held += size
    yield group


def _bytes_in_tar(sample: _Sample) -> int:
    """Return how many bytes a sample takes in an archive."""
    sizes = [(member.extension, _size(member)) for member in sample.members]
    if sample.label is not None:
        sizes.append(("cls", len(str(sample.label))))
    total = 0
    for kind, size in sizes:
        header = tarfile.TarInfo(f"{sample.key}.{kind}").tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")
        total += len(header) + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return total


def _stat(path: str) -> os.stat_result:
    with files.reading(path):
        return os.stat(path)


def _size(member: Source) -> int:
    return _stat(member.path).st_size if member.offset is None else member.size


def _fingerprint(samples: Sequence[_Sample], classes: Sequence[str], plan: Sequence[_Shard]) -> bytes:
    """Return a digest of everything that determines the bytes of the shards and the class names."""
    digest = hashlib.sha256(json.dumps([[len(shard.samples) for shard in plan], list(classes)]).encode())
    for sample in samples:
        members = []
        for member in sample.members:
            status = _stat(member.path)
            where = () if member.offset is None else (member.offset, member.size)
            members.append((member.extension, member.path, status.st_size, status.st_mtime_ns, *where))
        digest.update(json.dumps([sample.key, sample.label, members]).encode())
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

    progress.start("pack", sum(len(shard.samples) for shard in plan))
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
    if kept and list(kept.keys()) == [sample.key for sample in shard.samples] and kept.describes(shard.path):
        return kept.samples
    written: list[tuple[str, str, int | None]] = []
    with (
        files.atomic_file(shard.path) as file,
        # A fixed mtime for identical bytes, PAX for names of any length.
        webdataset.TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as writer,
    ):
        for sample in shard.samples:
            members = _read(sample)
            written += [(sample.key, kind, zlib.crc32(data)) for kind, data in sorted(members.items())]
            writer.write({"__key__": sample.key, **members})
    index = build_index(shard.path, crc=True)
    there = [(index.key(n), member.extension, member.crc) for n in range(index.samples) for member in index.members(n)]
    if there != written:
        shard.path.unlink()
        raise MaekitError(f"{shard.path}: what was read back is not what was written; is the disk sound?")
    write_index(index)
    return index.samples


def _read(sample: _Sample) -> dict[str, bytes]:
    """Return the members of a sample by extension."""
    members = {member.extension: member.read() for member in sample.members}
    if sample.label is not None:
        members["cls"] = str(sample.label).encode()
    return members


def _publish(aside: Path, out: Path) -> None:
    """Rename the finished folder to `out`, and remove the temporary folder."""
    with files.writing(out):
        with contextlib.suppress(FileNotFoundError):
            out.rmdir()
        files.rename(aside / _FOLDER, out)
        files.fsync_directory(out.parent)
        for own in (_PLAN, ".lock"):  # after the rename: without the plan, a call after a kill would start over
            (aside / own).unlink()
        aside.rmdir()
