"""Labelled images from shards: the `cls` member of each sample is its class."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from maekit.shards.cache import RemoteCache
from maekit.shards.read import LABEL, ShardSet, open_shards
from maekit.shards.spec import find_shards
from maekit.system.errors import InputError
from maekit.system.progress import Progress

_NUMBER = re.compile(r"-?[0-9]{1,18}")


@dataclass(frozen=True)
class LabelledSet:
    """Samples that have a label.

    Attributes:
        shards: the shards that hold them.
        numbers: numbers of the samples in `shards`, int64 `[n]`.
        texts: text of each sample's `cls` member.
        unlabelled: number of drawn samples whose label is missing or empty.
        names: names of the classes by number, from the `classes.txt` of `maekit pack`; empty if there is none.
        damaged: number of damaged shards, which are left out.
    """

    shards: ShardSet
    numbers: NDArray[np.int64]
    texts: list[str]
    unlabelled: int
    names: tuple[str, ...] = ()
    damaged: int = 0

    def summary(self, classes: Sequence[str], unreadable: int) -> dict[str, object]:
        """Return the counts of the set as JSON values; only labels in `classes` count as classes."""
        there = set(self.texts)
        return {
            "shards": len(self.shards.shards),
            "damaged": self.damaged,
            "samples": self.shards.samples,
            "images": len(self.numbers),
            "classes": len(there & set(classes)),
            "unlabelled": self.unlabelled,
            "unreadable": unreadable,
            "unused": self.shards.unused,
        }


def open_labelled(
    specs: Sequence[str],
    name: str,
    progress: Progress,
    *,
    images: int | None = None,
    image: str | None = None,
    cache_gb: float = 50.0,
) -> LabelledSet:
    """Read the labels of shards.

    Args:
        specs: input specs.
        name: name of the setting that gave them, for messages.
        progress: receives progress updates, and a note for each damaged shard, which is left out.
        images: draw at most N samples at random, with a fixed seed; None means all.
        image: which member of a sample is its image.
        cache_gb: gigabytes of disk for remote shards.

    Raises:
        InputError: no such shards, samples with several images, or no sample with a label.
    """
    found = find_shards(tuple(specs))
    shards = open_shards(
        found,
        image=image,
        skip_damaged=True,
        remote=RemoteCache(int(cache_gb * 1e9)),
        on_damage=lambda damage: progress.note(f"left out: {damage}"),
    )
    shards.refuse_ambiguous()
    count = min(images or shards.samples, shards.samples)
    # Not evenly spaced: if classes alternate, every fourth sample may be of the same class.
    chosen = np.sort(np.random.default_rng(0).choice(shards.samples, count, replace=False)).tolist()
    progress.start(f"labels of `{name}`", count)
    texts: dict[int, str] = {}
    try:
        for done, (number, text) in enumerate(zip(chosen, shards.labels(chosen), strict=True), 1):
            if text:
                texts[number] = text
            if done % 1000 == 0 or done == count:
                progress.advance(done)
    finally:
        progress.stop()
    if not texts:
        raise InputError(
            f"`{name}` {' '.join(specs)}: none of {count} samples has a .{LABEL} member; `maekit pack` makes them "
            "of class folders or of `table`"
        )
    return LabelledSet(
        shards,
        numbers=np.array(list(texts), np.int64),
        texts=list(texts.values()),
        unlabelled=count - len(texts),
        names=_names(shards),
        damaged=len(found) - len(shards.shards),
    )


def open_sets(
    train: Sequence[str],
    test: Sequence[str],
    progress: Progress,
    *,
    images: tuple[int | None, int | None],
    image: str | None = None,
    cache_gb: float = 50.0,
) -> tuple[list[LabelledSet], tuple[str, ...]]:
    """Open the training set and, if `test` is given, the test set; return them and the classes of the training set.

    `images` limits the number of images of each; the other arguments are those of `open_labelled`.

    Raises:
        InputError: as `open_labelled`; or all training images are of one class.
    """
    sets = [open_labelled(train, "train", progress, images=images[0], image=image, cache_gb=cache_gb)]
    if test:
        sets.append(open_labelled(test, "test", progress, images=images[1], image=image, cache_gb=cache_gb))
    sets = by_name(sets)
    classes = classes_of(sets[0].texts)
    if len(classes) < 2:
        raise InputError(f"`train` {' '.join(train)}: all images are of one class, {classes[0][:60]!r}")
    return sets, classes


def _names(shards: ShardSet) -> tuple[str, ...]:
    """Return the class names stored beside the shards; empty unless all shards are local and in one folder."""
    folders = {file.path.parent for file in shards.shards if file.url is None}
    if len(folders) != 1 or shards.remote is not None:
        return ()
    return shards.class_names(0)


def by_name(sets: Sequence[LabelledSet]) -> list[LabelledSet]:
    """Return the sets with class names as labels if each set has names, else unchanged.

    Folders that were packed separately may number the same classes differently.
    """
    if not all(labelled.names for labelled in sets):
        return list(sets)

    def named(text: str, names: Sequence[str]) -> str:
        return names[int(text)] if _NUMBER.fullmatch(text) and 0 <= int(text) < len(names) else text

    return [replace(labelled, texts=[named(text, labelled.names) for text in labelled.texts]) for labelled in sets]


def classes_of(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct labels, sorted; numerically if all of them are integers."""
    there = set(texts)
    if all(_NUMBER.fullmatch(text) for text in there):
        return tuple(sorted(there, key=lambda text: (int(text), text)))
    return tuple(sorted(there))


def encode(texts: Iterable[str], classes: Sequence[str]) -> NDArray[np.int64]:
    """Return the index of each label in `classes`, int64 `[n]`; -1 for an unknown label."""
    numbers = {text: number for number, text in enumerate(classes)}
    return np.array([numbers.get(text, -1) for text in texts], np.int64)
