"""Input specs -> shard files: a directory, a tar, a glob, or a brace pattern, in any number."""

import glob
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from maekit import files
from maekit.errors import InputError

TAR = ".tar"
# Found beside .tar in a directory, so that a compressed shard is reported as such and never passed over.
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2", ".tar.lz4")


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One shard on disk.

    Attributes:
        name: the path relative to the common root of the input, with `/`; it names the shard in every output.
        path: where the file is.
    """

    name: str
    path: Path


def find_shards(specs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[ShardFile]:
    """Return the shards that the input specs name, sorted by name.

    Raises:
        InputError: nothing is there, or a pattern matches nothing; says what was asked and what there is.
    """
    if isinstance(specs, (str, os.PathLike)):
        specs = [specs]
    paths: dict[Path, None] = {}
    roots: list[Path] = []
    for spec in specs:
        root, found = _expand(os.fspath(spec))
        roots.append(root)
        paths.update(dict.fromkeys(found))
    if not paths:
        raise InputError("no shards were given: name a directory of .tar files, a .tar, a glob or a brace pattern")
    for found_path in paths:
        files.require_utf8(found_path)
    root = Path(os.path.commonpath([str(root) for root in roots]))
    return sorted((ShardFile(path.relative_to(root).as_posix(), path) for path in paths), key=lambda shard: shard.name)


def _expand(spec: str) -> tuple[Path, list[Path]]:
    """Return the root and the files of one spec, as absolute paths."""
    if "://" in spec or spec.startswith("pipe:"):
        raise InputError(f"{spec}: remote shards are not read yet; copy them to a local or mounted directory first")
    path = Path(os.path.abspath(spec))
    if path.is_dir():
        found = [p for p in files.walk_files(path) if _is_shard(p.name)]
        if not found:
            raise InputError(f"{spec}: no .tar file in this directory ({_contents(path)})")
        return path, found
    if path.is_file():
        return path.parent, [path]
    if any(c in spec for c in "*?[{"):
        found = [Path(os.path.abspath(p)) for pattern in _braces(spec) for p in _matches(pattern, spec)]
        # The folder before the first wildcard, so that names do not change when more files come to match.
        fixed = os.path.abspath(os.path.dirname(re.split(r"[*?\[{]", spec, maxsplit=1)[0]) or ".")
        return Path(fixed), found
    raise InputError(f"{spec}: no such file or directory ({_nearest_parent(path)})")


def _braces(spec: str) -> list[str]:
    import braceexpand  # what webdataset itself expands brace patterns with

    try:
        return list(braceexpand.braceexpand(spec)) if "{" in spec else [spec]
    except ValueError as error:
        raise InputError(f"{spec}: the braces of this pattern do not match up") from error


def _matches(pattern: str, spec: str) -> list[str]:
    if not any(c in pattern for c in "*?["):
        if not os.path.isfile(pattern):
            raise InputError(f"{pattern}: no such file (expanded from {spec})")
        return [pattern]
    found = sorted(p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
    if not found:
        raise InputError(f"{pattern}: no file matches this pattern")
    return found


def _is_shard(file_name: str) -> bool:
    return file_name.lower().endswith((TAR, *COMPRESSED_TARS)) and not file_name.startswith(".")


def _contents(directory: Path) -> str:
    names = sorted(p.name + ("/" if p.is_dir() else "") for p in directory.iterdir())
    if not names:
        return "it is empty"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    hint = "; `maekit pack` turns a folder of images into shards" if _has_image(names) else ""
    return f"it holds {', '.join(names[:3])}{more}{hint}"


def _has_image(names: list[str]) -> bool:
    return any(name.lower().endswith((".jpg", ".jpeg", ".png", ".webp", "/")) for name in names)


def _nearest_parent(path: Path) -> str:
    for parent in path.parents:
        if parent.is_dir():
            return f"{parent} exists, {path.relative_to(parent).parts[0]} in it does not"
    return "nothing of this path exists"
