"""`maekit pack`: a folder of images -> tar shards, written by webdataset's writer, the same bytes every time."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from maekit import files
from maekit.errors import InputError, MaekitError
from maekit.shards.index import IMAGE_EXTENSIONS, METADATA


@dataclass(frozen=True, slots=True)
class _Source:
    path: Path
    key: str
    label: int | None


@dataclass(frozen=True)
class PackReport:
    """What was packed.

    Attributes:
        shards: the shards written, in order.
        samples: images in them.
        bytes: size of the shards.
        classes: class names by label; empty where some image lies in no class folder.
        passed_over: files that are no images, how many of each extension.
    """

    shards: list[Path]
    samples: int
    bytes: int
    classes: list[str]
    passed_over: dict[str, int]


def pack(
    images: Path,
    out: Path,
    *,
    samples_per_shard: int = 1000,
    on_sample: Callable[[int, int], None] = lambda done, total: None,
) -> PackReport:
    """Pack every image file below `images` into `out/00000.tar`, `out/00001.tar`, …

    Image bytes go in unchanged. The key is the path below `images` without its extension. Where every image lies in a
    folder below `images`, the first folder is its class, numbered in sorted order, and goes in as a `.cls` member;
    the names are written to `out/classes.txt`. The folder appears whole or not at all.

    Args:
        images: the folder of images.
        out: a new or empty folder for the shards.
        samples_per_shard: how many images a shard holds (the last one holds the rest).
        on_sample: called with (done, total) after each image.

    Raises:
        InputError: no image, a folder that is not empty, or names that make no keys.
        MaekitError: a file cannot be read or written.
    """
    if samples_per_shard < 1:
        raise InputError(f"--samples-per-shard {samples_per_shard}: a shard holds at least one sample")
    if not images.is_dir():
        raise InputError(f"{images}: no such folder of images")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; SHARDS names a folder")
    if out.is_dir() and (present := sorted(out.iterdir())):
        raise InputError(f"{out} already holds {present[0].name}; pack into a new or empty folder")
    sources, classes, passed_over = _sources(images)
    # An interrupted pack must not look like a small but whole set of shards.
    aside = out.absolute().parent / f".{out.name}.packing"
    shutil.rmtree(aside, ignore_errors=True)
    names = [f"{number:05d}.tar" for number in range(-(-len(sources) // samples_per_shard))]
    for number, name in enumerate(names):
        first = number * samples_per_shard
        samples = _read_samples(sources[first : first + samples_per_shard])
        with files.atomic_file(aside / name) as file, _tar_writer(file) as writer:
            for done, sample in enumerate(samples, first + 1):
                writer.write(sample)
                on_sample(done, len(sources))
    if classes:
        files.write_atomically(aside / "classes.txt", "".join(f"{name}\n" for name in classes).encode())
    try:
        aside.rename(out)
        files.fsync_directory(out.absolute().parent)
    except OSError as error:
        raise files.write_failure(out, error) from error
    shards = [out / name for name in names]
    return PackReport(shards, len(sources), sum(shard.stat().st_size for shard in shards), classes, passed_over)


def _read_samples(sources: list[_Source]) -> Iterator[dict[str, object]]:
    for source in sources:
        try:
            data = source.path.read_bytes()
        except OSError as error:
            raise MaekitError(f"cannot read {source.path}: {error.strerror or error}") from error
        sample: dict[str, object] = {"__key__": source.key, _extension(source.path): data}
        if source.label is not None:
            sample["cls"] = str(source.label).encode()
        yield sample


def _tar_writer(file: IO[bytes]) -> Any:
    """Return webdataset's writer: fixed times for equal bytes, PAX for names of any length."""
    import webdataset

    return webdataset.TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT")


def _extension(path: Path) -> str:
    return path.suffix[1:].lower()


def _sources(images: Path) -> tuple[list[_Source], list[str], dict[str, int]]:
    paths = []
    passed_over: dict[str, int] = {}
    for path in files.walk_files(images):
        if _extension(path) in IMAGE_EXTENSIONS:
            paths.append(path)
        else:
            kind = path.suffix.lower() or "no extension"
            passed_over[kind] = passed_over.get(kind, 0) + 1
    if not paths:
        kinds = ", ".join(sorted(IMAGE_EXTENSIONS))
        raise InputError(f"{images}: no image file in this folder (looked for {kinds})")
    relative = [path.relative_to(images) for path in paths]
    in_folders = all(len(path.parts) > 1 for path in relative)
    classes = sorted({path.parts[0] for path in relative}) if in_folders else []
    labels = {name: label for label, name in enumerate(classes)}
    owners: dict[str, Path] = {}
    sources = []
    for path, below in zip(paths, relative, strict=True):
        # A key ends at the first dot of its last part, so dots inside a stem become underscores.
        key = below.with_name(below.stem.replace(".", "_")).as_posix()
        files.require_utf8(path)
        if METADATA.match(key):
            raise InputError(f"{path}: WebDataset sets names such as __x__ aside as its own; rename it")
        if key in owners:
            raise InputError(f"{path} and {owners[key]} would both get the key {key!r}; rename one of them")
        owners[key] = path
        sources.append(_Source(path, key, labels.get(below.parts[0]) if in_folders else None))
    return sources, classes, passed_over
