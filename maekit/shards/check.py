"""`maekit check`: the strict scan of a whole set of shards, and what it found."""

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from maekit.errors import DamagedShard, MaekitError
from maekit.shards.index import ShardIndex, build_index, write_index
from maekit.shards.spec import ShardFile


@dataclass
class ShardReport:
    """What the scan of one shard found.

    Attributes:
        name: the shard.
        samples: how many samples it holds.
        bytes: its size.
        without_image: samples that hold no member with an image extension.
        ignored: members that belong to no sample.
        damage: what is wrong, or None; a shard that cannot be read counts as damaged at byte 0.
    """

    name: str
    samples: int = 0
    bytes: int = 0
    without_image: int = 0
    ignored: int = 0
    damage: DamagedShard | None = None


@dataclass
class CheckReport:
    """What the scan of all shards found.

    Attributes:
        shards: one report per shard, in order.
        duplicates: keys that stand in more than one shard (which is no damage: a sample is named by shard and ordinal).
    """

    shards: list[ShardReport] = field(default_factory=list)
    duplicates: int = 0

    @property
    def samples(self) -> int:
        """Samples in the sound shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def damaged(self) -> list[ShardReport]:
        """The damaged shards."""
        return [shard for shard in self.shards if shard.damage]

    def summary(self) -> dict[str, object]:
        """Return the object that `--json` prints."""
        return {
            "samples": self.samples,
            "shards": len(self.shards),
            "bytes": sum(shard.bytes for shard in self.shards),
            "damaged": len(self.damaged),
            "duplicates": self.duplicates,
            "without_image": sum(shard.without_image for shard in self.shards),
            "ignored": sum(shard.ignored for shard in self.shards),
            "damage": [
                {"shard": shard.name, "offset": shard.damage.offset, "reason": shard.damage.reason}
                for shard in self.shards
                if shard.damage
            ],
        }


def check_shards(
    shards: Sequence[ShardFile],
    *,
    write_indexes: bool = False,
    on_shard: Callable[[ShardReport], None] = lambda report: None,
) -> CheckReport:
    """Scan every shard from its first byte to its last; no cached index is trusted.

    Args:
        shards: the shard files, as `find_shards` returns them.
        write_indexes: write `NAME.tar.index` beside each sound shard.
        on_shard: called after each shard.

    Raises:
        MaekitError: an index cannot be written.
    """
    report = CheckReport()
    hashes = []
    for shard in shards:
        found = ShardReport(shard.name)
        try:
            index = build_index(shard.path)
        except DamagedShard as damage:
            found.damage = damage
        except MaekitError as error:  # a shard that cannot be read is as good as damaged, and the others still count
            found.damage = DamagedShard(str(shard.path), 0, str(error))
        else:
            found.samples = index.samples
            found.without_image = sum(index.image(ordinal) is None for ordinal in range(index.samples))
            found.ignored = index.ignored_count
            hashes.append(_key_hashes(index))
            if write_indexes:
                write_index(index)
        with contextlib.suppress(OSError):
            found.bytes = shard.path.stat().st_size
        report.shards.append(found)
        on_shard(found)
    if hashes:
        _, counts = np.unique(np.concatenate(hashes), return_counts=True)
        report.duplicates = int((counts > 1).sum())
    return report


def _key_hashes(index: ShardIndex) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Return a 64-bit hash of each key, uint64 `[samples]`: 8 bytes a key, whatever its length."""
    keys = map(index.key, range(index.samples))
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, np.uint64)
