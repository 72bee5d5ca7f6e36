"""What a folder holds: images, shards, archives, and everything else by kind: no file is left out in silence."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from maekit.shards.image_choice import IMAGE_EXTENSIONS, may_be_image
from maekit.system import files
from maekit.system.errors import InputError
from maekit.system.file_kinds import HEAD, kind_of

TAR = ".tar"
# Also searched for in a directory, so that a compressed shard is reported as such and never skipped silently.
_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2", ".tar.lz4")
_ARCHIVES = (".zip", ".7z", ".rar")
# Folders of these names make the folder around them a run, or an output of embedding: pictures in it are no input.
_OWN = frozenset(("checkpoints", "_maekit"))


def is_shard(file_name: str) -> bool:
    """Whether the search of a directory takes a file of this name for a shard."""
    return file_name.lower().endswith((TAR, *_COMPRESSED_TARS)) and not file_name.startswith(".")


def extension_of(path: Path) -> str:
    """Return the last extension of a file name, in lower case and without its dot."""
    return path.suffix[1:].lower()


@dataclass
class FolderContents:
    """The files below a folder.

    Attributes:
        images: image files, sorted.
        formats: formats of those whose extension tells nothing, in lower case.
        shards: tar files, compressed ones included, sorted.
        archives: zip files and the like.
        others: files that are none of these, with their kinds: the format, if it is an image that is not decoded, else
            the extension.
        remedies: what to do about images that are not decoded, by format.
    """

    images: list[Path] = field(default_factory=list)
    formats: dict[Path, str] = field(default_factory=dict)
    shards: list[Path] = field(default_factory=list)
    archives: list[Path] = field(default_factory=list)
    others: dict[Path, str] = field(default_factory=dict)
    remedies: dict[str, str] = field(default_factory=dict)

    @property
    def unused(self) -> dict[str, int]:
        """Number of files that are neither images nor shards, by kind."""
        return dict(Counter(self.others.values()).most_common())

    def refuse_mixture(self, folder: Path) -> None:
        """Check that images do not lie beside shards or archives: only one of them would be read.

        Raises:
            InputError: names what is there.
        """
        packed = [*self.shards, *self.archives]
        if self.images and packed:
            raise InputError(
                f"{folder} holds {len(self.images)} images (such as {self.images[0].name}) beside {len(packed)} "
                f"archives (such as {packed[0].name}): name the shards, unpack the archives, or move the images"
            )

    def __str__(self) -> str:
        counts = {"images": len(self.images), "archives": len(self.archives), **self.unused}
        remedies = {kind: f", not decoded: {remedy}" for kind, remedy in self.remedies.items()}
        said = [f"{count} {kind}{remedies.get(kind, '')}" for kind, count in counts.items() if count]
        return f"it holds {'; '.join(said)}" if said else "it is empty"


def look_into(folder: Path) -> FolderContents:
    """List the files below a folder, at any depth. Files without a known extension are looked at.

    Raises:
        InputError: a folder or a file cannot be read, or a link is broken.
    """
    found = FolderContents()
    own: set[Path] = set()
    for path in files.walk_files(folder):
        own.update(parent.parent for parent in path.parents if parent.name in _OWN and parent != folder)
        extension = extension_of(path)
        if is_shard(path.name):
            found.shards.append(path)
        elif path.name.lower().endswith(_ARCHIVES):
            found.archives.append(path)
        elif extension in IMAGE_EXTENSIONS:
            found.images.append(path)
        elif extension and not may_be_image(extension):
            found.others[path] = extension
        else:
            _sort_in(found, path)
    if found.shards and own:
        found.images = [path for path in found.images if own.isdisjoint(path.parents)]
    return found


def _sort_in(found: FolderContents, path: Path) -> None:
    """Add a file by its first bytes."""
    with files.reading(path, InputError), open(path, "rb") as file:
        kind = kind_of(file.read(HEAD))
    if kind is not None and kind.is_decoded:
        found.images.append(path)
        found.formats[path] = kind.name.lower()
    elif kind is not None and kind.is_image:
        found.others[path] = kind.name
        found.remedies[kind.name] = kind.remedy
    else:
        found.others[path] = extension_of(path) or "no extension"


def undecoded_notes(contents: FolderContents) -> Iterator[str]:
    """Yield a note for each format of images that is not decoded."""
    for kind, remedy in contents.remedies.items():
        yield f"{contents.unused[kind]} files of {kind} are not decoded; {remedy}"
