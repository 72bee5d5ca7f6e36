"""Which member of a sample is its image, one at a time and counted over a shard."""

import random
from pathlib import Path

import pytest
from support.errors import raises
from support.shards import write_shard

from maekit.shards.image_choice import FIRST
from maekit.shards.index import ShardIndex, build_index
from maekit.shards.read import open_shards
from maekit.shards.spec import find_shards
from maekit.system.errors import ImageError, InputError

EXTENSIONS = ("jpg", "png", "rgb.png", "depth.png", "mask.png", "jfif", "img", "heic", "json", "cls", "npy", "bin")


def chosen(index: ShardIndex, ordinal: int) -> str | None:
    try:
        return index.image(ordinal).extension
    except ImageError as error:
        return None if error.reason == "no_image" else error.reason


@pytest.mark.parametrize(
    ("members", "by_default", "first"),
    [
        (("jpg",), "jpg", "jpg"),
        (("json", "jpg", "cls"), "jpg", "jpg"),
        (("mask.png", "rgb.png"), "rgb.png", "mask.png"),
        (("mask.png", "jpg"), "jpg", "jpg"),
        (("mask.png",), None, "mask.png"),
        (("jfif",), "jfif", None),
        (("img", "json"), "img", None),
        (("heic", "json", "npy"), "heic", None),
        (("img", "heic"), None, None),
        (("txt", "npy"), None, None),
    ],
)
def test_the_only_image_and_the_first(
    tmp_path: Path, members: tuple[str, ...], by_default: str | None, first: str | None
) -> None:
    index = build_index(write_shard(tmp_path / "x.tar", {"a": dict.fromkeys(members, b"x")}))
    assert chosen(index, 0) == by_default
    assert not index.is_ambiguous(0)
    index.choice = FIRST
    assert chosen(index, 0) == first


def test_counts_agree_with_single_samples(tmp_path: Path) -> None:
    chance = random.Random(0)
    samples = {
        f"{number:03d}": dict.fromkeys(chance.sample(EXTENSIONS, chance.randint(1, 5)), b"x") for number in range(400)
    }
    index = build_index(write_shard(tmp_path / "x.tar", samples))
    first = build_index(index.path)
    first.choice = FIRST
    for choice in (None, FIRST, "rgb.png"):
        index.choice = choice
        counts = index.count_images()
        several = [index.is_ambiguous(n) for n in range(400)]
        assert counts.several == sum(several)
        assert counts.without == sum(chosen(index, n) is None for n in range(400))
        assert counts.changed == sum(chosen(index, n) != chosen(first, n) for n in range(400))
        images = [m for m in EXTENSIONS if m not in ("json", "cls", "npy", "bin")]
        unused = {m: sum(m in s and chosen(index, n) != m for n, s in enumerate(samples.values())) for m in images}
        assert counts.unused == {m: count for m, count in unused.items() if count}


def test_ambiguous_samples_are_refused_with_the_ways_to_choose(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.tar", {"a": {"jpg": b"1"}, "b": {"depth.png": b"1", "json": b"", "rgb.png": b"2"}})
    found = find_shards(str(tmp_path))
    said = r"the sample 'b' has several images \(depth.png; rgb.png\): choose one by --image depth"
    with raises(InputError, match=said):
        open_shards(found).refuse_ambiguous()
    for image in (FIRST, "rgb.png"):
        open_shards(found, image=image).refuse_ambiguous()
    assert open_shards(found, image="rgb.png").unused == {"jpg": 1, "depth.png": 1}


def test_the_choice_is_part_of_the_digest_where_it_changes_an_image(tmp_path: Path) -> None:
    write_shard(tmp_path / "plain" / "x.tar", {"a": {"jpg": b"1"}, "b": {"jpg": b"2", "json": b""}})
    write_shard(tmp_path / "several" / "x.tar", {"a": {"depth.png": b"1", "rgb.png": b"2"}})
    plain, several = (find_shards(str(tmp_path / name)) for name in ("plain", "several"))
    assert open_shards(plain).digest == open_shards(plain, image=FIRST).digest
    digests = {image: open_shards(several, image=image).digest for image in (None, FIRST, "rgb.png")}
    assert len(set(digests.values())) == 3
    # A run that was started before there was a choice goes on with the first image, unasked.
    resumed = open_shards(several, known_digest=digests[FIRST])
    resumed.refuse_ambiguous()
    assert resumed.digest == digests[FIRST]
    assert resumed.index(0).image(0).extension == "depth.png"
