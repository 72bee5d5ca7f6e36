"""Input specs -> shard files. Each spec is a directory, a tar, a glob, a brace pattern, or a URL."""

import glob
import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from maekit.shards.folder import TAR, is_shard, look_into
from maekit.shards.image_choice import IMAGE_EXTENSIONS
from maekit.system import files
from maekit.system.errors import InputError
from maekit.system.redaction import address, identity, is_redacted, redact
from maekit.system.text import count

_IPV6 = re.compile(r"//\[[0-9a-fA-F:.]+\]")  # an IPv6 address as host


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One shard.

    Attributes:
        name: the path relative to the common root of the input, with `/`; it names the shard in every output.
        path: the file; for a remote shard, its file in the cache.
        url: the URL of a remote shard; None if it is local.
    """

    name: str
    path: Path
    url: str | None = None

    @property
    def where(self) -> str:
        """What messages call it: its path, or its URL without secrets."""
        return str(self.path) if self.url is None else address(self.url)


def find_shards(specs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[ShardFile]:
    """Return the shards that the input specs name, sorted by name.

    Raises:
        InputError: a spec names or matches nothing; says what was asked and what there is.
    """
    if isinstance(specs, (str, os.PathLike)):
        specs = [specs]
    paths: dict[Path, str | None] = {}  # path that gives the name -> URL, or None for a local shard
    roots: list[Path] = []
    for spec in specs:
        text = os.fspath(spec).removeprefix("file://")
        if not text:
            raise InputError("an empty name of shards was given")
        if "://" in text or text.startswith("pipe:"):
            root, urls = _expand_remote(text)
            for url in urls:
                first = paths.setdefault(path := _url_path(url), url)
                if first is None or identity(first) != identity(url):
                    raise InputError(f"{first or path} and {url} would both be named {path.name}; give one of them")
        else:
            with files.reading(text[:200], InputError):
                root, found = _expand(text)
            paths.update(dict.fromkeys(found))
        roots.append(root)
    if not paths:
        raise InputError("no shards were given: name a directory of .tar files, a .tar, a glob, a brace pattern, a URL")
    for path in paths:
        files.require_utf8(path)
    common = os.path.commonpath([str(root) for root in roots])
    shards = [
        ShardFile(os.path.relpath(path, common).replace(os.sep, "/"), path if url is None else _cache_path(url), url)
        for path, url in paths.items()
    ]
    return sorted(shards, key=lambda shard: shard.name)


def connect(url: str) -> tuple[Any, str]:
    """Return the fsspec filesystem of a URL and the path on it.

    Raises:
        InputError: the protocol is unknown, its package is missing (says what to install), or connecting fails.
    """
    import fsspec

    protocol = url.partition("://")[0]
    options: dict[str, Any] = {}
    try:  # never `from error`: a traceback would show what the library says, with the password
        if protocol in ("http", "https"):
            import aiohttp

            # A silent server must not block a run for ever; a slow one may take any time.
            options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)}
        filesystem, path = fsspec.core.url_to_fs(url, **options)
        return filesystem, path
    except ImportError as error:
        raise InputError(redact(f"{url}: {error}", url)) from None
    except ValueError as error:
        raise InputError(redact(f"{url}: fsspec knows no protocol {protocol!r} ({error})", url)) from None
    except Exception as error:  # some connect at once, and each raises its own types
        raise InputError(redact(f"{url}: cannot connect: {str(error) or type(error).__name__}", url)) from None


def _expand_remote(spec: str) -> tuple[Path, list[str]]:
    """Return the root of a remote spec, and its URLs."""
    if spec.startswith("pipe:") or "::" in _IPV6.sub("//", spec):
        raise InputError(f"{spec}: neither commands nor chained URLs are run; name a directory or tar by its URL")
    if is_redacted(spec):
        raise InputError(f"{spec}: what *** stands for is stored nowhere; name the shards by the whole URL")
    urls: list[str] = []
    for pattern in _braces(spec):
        urls += [pattern] if is_shard(_file_name(pattern)) and not _has_wildcard(pattern) else _listed(pattern)
    behind = _behind_host(spec)
    fixed = spec.removesuffix(behind) + re.split(r"[*\[{]", behind, maxsplit=1)[0].partition("?")[0]
    is_directory = not is_shard(_file_name(spec)) and not any(c in behind for c in "*[{")
    root = _url_path(fixed.rstrip("/") if is_directory else fixed.rpartition("/")[0])
    return root, urls


def _listed(pattern: str) -> list[str]:
    """Return the URLs of the shards below a remote directory, or matching a remote pattern."""
    filesystem, path = connect(pattern)
    try:
        if _has_wildcard(pattern):
            there = [name for name in filesystem.glob(path) if not _is_index(name)]
        else:
            there = filesystem.find(path)
    except Exception as error:  # each protocol raises its own types
        said = f"{pattern}: cannot be listed: {str(error) or type(error).__name__}"
        raise InputError(redact(said, pattern)) from None
    found = there if _has_wildcard(pattern) else [name for name in there if is_shard(_file_name(name))]
    if not found:
        what = "no file matches this pattern" if _has_wildcard(pattern) else "no .tar file is listed there"
        if images := [name for name in there if PurePosixPath(name).suffix[1:].lower() in IMAGE_EXTENSIONS]:
            what += f", but {count('image', len(images))}; download the folder, and `maekit pack` it into shards"
        raise InputError(f"{redact(pattern, pattern)}: {what}")
    return [filesystem.unstrip_protocol(name) for name in sorted(found)]


def _has_wildcard(url: str) -> bool:
    path = _behind_host(url)
    return "*" in path or "[" in path  # a question mark begins the query of a URL


def _behind_host(url: str) -> str:
    """Return the part of a URL after its host, which may be an address such as [::1]."""
    return url.partition("://")[2].partition("/")[2]


def _file_name(url: str) -> str:
    return url.partition("?")[0].rpartition("/")[2]


def _url_path(url: str) -> Path:
    """Return the URL as an absolute path, so that one rule names local and remote shards."""
    parts = PurePosixPath(address(url)).parts
    if ".." in parts:  # a listing may contain anything, and shard names become names of output files
        raise InputError(f"{url}: the URL of a shard must not lead back up")
    return Path("/", *parts)


def _cache_path(url: str) -> Path:
    name = hashlib.sha256(identity(url).encode()).hexdigest()
    return files.cache_directory() / "shards" / name[:2] / f"{name}{TAR}"


def _expand(spec: str) -> tuple[Path, list[Path]]:
    """Return the root and the files of one spec, as absolute paths."""
    path = Path(os.path.abspath(spec))
    if path.is_dir():
        contents = look_into(path)
        if not contents.shards:
            hint = "; `maekit pack` turns a folder of images into shards" if contents.images else ""
            raise InputError(f"{spec}: no .tar file in this directory ({contents}{hint})")
        contents.refuse_mixture(path)
        return path, contents.shards
    if path.is_file():
        return path.parent, [path]
    if any(c in spec for c in "*?[{"):
        found = [Path(os.path.abspath(p)) for pattern in _braces(spec) for p in _matches(pattern, spec)]
        # The root is the folder before the first wildcard, so that names do not change when more files match.
        fixed = os.path.abspath(os.path.dirname(re.split(r"[*?\[{]", spec, maxsplit=1)[0]) or ".")
        return Path(fixed), found
    raise InputError(f"{spec}: no such file or directory ({_nearest_parent(path)})")


def _braces(spec: str) -> list[str]:
    import braceexpand  # webdataset itself uses it for brace patterns

    try:
        return list(braceexpand.braceexpand(spec)) if "{" in spec else [spec]
    except ValueError:
        raise InputError(f"{spec}: the braces of this pattern do not match up") from None


def _matches(pattern: str, spec: str) -> list[str]:
    if not any(c in pattern for c in "*?["):
        if not os.path.isfile(pattern):
            raise InputError(f"{pattern}: no such file (expanded from {spec})")
        return [pattern]
    # Indexes lie beside shards, and a wildcard after .tar would match them too.
    found = sorted(p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p) and not _is_index(p))
    if not found:
        raise InputError(f"{pattern}: no file matches this pattern")
    return found


def _is_index(name: str) -> bool:
    return name.lower().endswith(f"{TAR}.index")


def _nearest_parent(path: Path) -> str:
    parent = next(parent for parent in path.parents if parent.is_dir())
    return f"{parent} exists, {path.relative_to(parent).parts[0]} in it does not"
