"""The samples of tar shards that `maekit pack` writes anew: each whole, named once, from archives of any writer.

Read are also archives that a strict scan refuses: with members of a sample apart from each other or twice, without an
end marker, or several in one file. A broken header is refused here, too.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from maekit.shards.image_choice import IMAGE_EXTENSIONS
from maekit.shards.index import METADATA, NAME, crc32_of, header_reader, readable_name
from maekit.shards.spec import ShardFile
from maekit.shards.tar import Member, TarDamage, scan_members
from maekit.system import files
from maekit.system.errors import InputError

_REPEATED, _REPLACED, _REFUSED, _NAMELESS = "repeated", "replaced by a later one", "refused", "without a sample"


@dataclass(frozen=True, slots=True)
class Source:
    """Where the bytes of a member come from.

    Attributes:
        extension: of the member, without its dot.
        path: the file.
        offset: byte offset in a shard; None for a whole file.
        size: bytes of data in a shard.
    """

    extension: str
    path: str
    offset: int | None = None
    size: int = 0

    def read(self) -> bytes:
        """Return the bytes.

        Raises:
            MaekitError: the file cannot be read.
        """
        with files.reading(self.path), open(self.path, "rb") as file:
            if self.offset is None:
                return file.read()
            file.seek(self.offset)
            return file.read(self.size)


Samples = dict[str, list[Source]]


def samples_of(
    shards: Sequence[ShardFile], *, by_name: bool, on_note: Callable[[str], None]
) -> tuple[Samples, dict[str, int]]:
    """Return the members of each sample of some shards, in the order in which the samples begin, by key.

    Args:
        shards: the shards, local ones.
        by_name: give each image a sample of its own, named after it, instead of one for each WebDataset key.
        on_note: called for members that are left out.

    Returns:
        the samples, and how many members were left out, by reason.

    Raises:
        InputError: a shard is remote, cannot be read or has a broken header.
    """
    left_out: Counter[str] = Counter()
    found: Samples = {}
    for shard in shards:
        if shard.url is not None:
            raise InputError(f"{shard.url}: shards are packed anew from local files; download them first")
        members = _whole(shard.path, left_out, on_note)
        named = _by_name(members) if by_name else _by_key(members, left_out)
        # A key that several shards have is told apart by the shard.
        here = {key if key not in found else f"{shard.path.stem}/{key}": sources for key, sources in named.items()}
        found |= here
    return found, dict(left_out)


def _whole(path: Path, left_out: Counter[str], on_note: Callable[[str], None]) -> list[tuple[str, Source, int]]:
    """Return (key or stem, source, CRC-32) of the members of a shard that can be kept."""
    kept = []
    with files.reading(path, InputError), open(path, "rb", buffering=0) as file:
        descriptor = file.fileno()
        try:
            for member in scan_members(header_reader(descriptor), os.fstat(descriptor).st_size, lenient=True):
                name, problem = _name(member)
                if problem:
                    left_out[_REFUSED] += 1
                    on_note(f"{path}: left out {name}: {problem}")
                elif NAME.fullmatch(name) is None or METADATA.match(name):
                    left_out[_NAMELESS] += 1
                else:
                    extension = name.rpartition(".")[2].lower()
                    source = Source(extension, str(path), member.offset, member.size)
                    kept.append((name, source, crc32_of(descriptor, member.offset, member.size)))
        except TarDamage as damage:
            raise InputError(f"{path}: damaged at byte {damage.offset}: {damage.reason}") from damage
    return kept


def _name(member: Member) -> tuple[str, str]:
    """Return a name that a member can be kept under, and why it cannot be kept, if so."""
    name = readable_name(member)
    is_nameable = member.problem.startswith("its name")
    name = name.lstrip("/") if is_nameable else name
    return name, "" if is_nameable and ".." not in name.split("/") else member.problem


def _by_key(members: Sequence[tuple[str, Source, int]], left_out: Counter[str]) -> Samples:
    """Group members by WebDataset's key; of two of one name, the later one is kept, as by tar."""
    samples: dict[str, dict[str, tuple[Source, int]]] = {}
    for name, source, crc in members:
        match = NAME.fullmatch(name)
        assert match is not None
        extension = match["extension"].lower()
        sample = samples.setdefault(match["key"], {})
        if extension in sample:
            left_out[_REPEATED if sample[extension][1] == crc else _REPLACED] += 1
        sample[extension] = (Source(extension, source.path, source.offset, source.size), crc)
    return {key: [source for source, _ in sample.values()] for key, sample in samples.items()}


def _by_name(members: Sequence[tuple[str, Source, int]]) -> Samples:
    """Give each image a sample of its own, with the other members of its name."""
    stems: dict[str, list[Source]] = {}
    for name, source, _ in members:
        stems.setdefault(name.rpartition(".")[0], []).append(source)
    return {key: sources for stem, group in stems.items() for key, sources in _each_image(stem, group)}


def _each_image(stem: str, group: Sequence[Source]) -> Iterator[tuple[str, list[Source]]]:
    images = [source for source in group if source.extension in IMAGE_EXTENSIONS]
    others = list({source.extension: source for source in group if source not in images}.values())
    for number, image in enumerate(images):
        # A key ends at the first dot of its last component, but the folders before it may have dots.
        is_plain = len(images) == 1 and "." not in stem.rpartition("/")[2]
        yield stem if is_plain else f"{stem}/image{number or ''}", [image, *others]
