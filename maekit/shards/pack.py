"""`maekit pack`: a folder of images -> tar shards, written by webdataset's writer, the same bytes every time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from maekit import files
from maekit.errors import InputError
from maekit.shards.index import IMAGE_EXTENSIONS


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
        classes: class names by label; empty where the folder has no class folders.
    """

    shards: list[Path]
    samples: int
    bytes: int
    classes: list[str]


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
    the names are written to `out/classes.txt`.

    Args:
        images: the folder of images.
        out: a folder for the shards, without shards in it.
        samples_per_shard: how many images a shard holds (the last one holds the rest).
        on_sample: called with (done, total) after each image.

    Raises:
        InputError: no image, a folder with shards in it, or two images that would get one key.
        MaekitError: a file cannot be read or written.
    """
    if samples_per_shard < 1:
        raise InputError(f"--samples-per-shard {samples_per_shard}: a shard holds at least one sample")
    if not images.is_dir():
        raise InputError(f"{images}: no such folder of images")
    if out.is_dir() and (present := sorted(out.glob("*.tar"))):
        raise InputError(f"{out} already holds {present[0].name}; pack into an empty folder")
    sources, classes = _sources(images)
    shards = []
    done = 0
    for number in range(-(-len(sources) // samples_per_shard)):
        shard = out / f"{number:05d}.tar"
        with files.atomic_file(shard) as file, _tar_writer(file) as writer:
            for source in sources[number * samples_per_shard : (number + 1) * samples_per_shard]:
                sample: dict[str, object] = {"__key__": source.key, _extension(source.path): source.path.read_bytes()}
                if source.label is not None:
                    sample["cls"] = str(source.label).encode()
                writer.write(sample)
                done += 1
                on_sample(done, len(sources))
        shards.append(shard)
    if classes:
        files.write_atomically(out / "classes.txt", "".join(f"{name}\n" for name in classes).encode())
    return PackReport(shards, len(sources), sum(shard.stat().st_size for shard in shards), classes)


def _tar_writer(file: IO[bytes]) -> Any:
    """Return webdataset's writer: fixed times for equal bytes, PAX for names of any length."""
    import webdataset

    return webdataset.TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT")


def _extension(path: Path) -> str:
    return path.suffix[1:].lower()


def _image_files(images: Path) -> Iterator[Path]:
    for path in sorted(images.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(images).parts)
        if not hidden and _extension(path) in IMAGE_EXTENSIONS and path.is_file():
            yield path


def _sources(images: Path) -> tuple[list[_Source], list[str]]:
    paths = list(_image_files(images))
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
        if key in owners:
            raise InputError(f"{path} and {owners[key]} would both get the key {key!r}; rename one of them")
        owners[key] = path
        sources.append(_Source(path, key, labels.get(below.parts[0]) if in_folders else None))
    return sources, classes
