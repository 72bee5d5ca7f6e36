import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.errors import raises
from support.shards import jpeg, write_shard

from maekit.checking import check_shards
from maekit.shards.index import build_index, load_index, parse_index, write_index
from maekit.shards.order import SampleOrder
from maekit.shards.read import MemberReader, open_shards
from maekit.shards.spec import find_shards
from maekit.system.errors import DamagedShard, ImageError, InputError, MaekitError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT}


def write_tar(path: Path, members: list[tuple[str, bytes]], tar_format: int, directories: bool = False) -> Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        if directories:
            info = tarfile.TarInfo("folder")
            info.type = tarfile.DIRTYPE
            tar.addfile(info)
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read_all(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    """Read a shard through the index and the positional reader."""
    index, reader = build_index(path), MemberReader()
    samples = [
        (index.key(i), {m.extension: reader.read(index, m) for m in index.members(i)}) for i in range(index.samples)
    ]
    reader.close()
    return samples


def read_webdataset(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    """Read a shard as webdataset does: the oracle."""
    dataset = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    return [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in dataset]


names = st.text(st.characters(codec="utf-8", exclude_characters="/.\0\n\r", exclude_categories=["Cs"]), min_size=1)
stems = st.tuples(st.lists(names.filter(lambda n: len(n) < 60), max_size=4), names).map(
    lambda t: "/".join([*t[0], t[1]])
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    keys=st.lists(stems.filter(lambda s: not s.startswith("__")), min_size=1, max_size=6, unique=True),
    extensions=st.lists(st.sampled_from(["jpg", "PNG", "json", "cls", "seg.png", "txt"]), min_size=1, unique=True),
    tar_format=st.sampled_from(["pax", "gnu"]),
    data=st.data(),
)
def test_reads_what_webdataset_reads(tmp_path_factory, keys, extensions, tar_format, data) -> None:
    """On valid tars, long and unicode names included: the same keys, the same members, the same bytes."""
    members = [(f"{key}.{ext}", data.draw(st.binary(max_size=1500))) for key in keys for ext in extensions]
    path = tmp_path_factory.mktemp("wds") / "x.tar"
    write_tar(path, members, FORMATS[tar_format], directories=data.draw(st.booleans()))
    assert read_all(path) == read_webdataset(path)


@pytest.mark.parametrize("tar_format", FORMATS)
def test_formats_against_webdataset(tmp_path: Path, tar_format: str) -> None:
    long = "a" * 60 + "/" + "b" * 90  # needs USTAR's prefix field
    members = [
        ("plain.jpg", b"x" * 512),
        ("plain.json", b"{}"),
        (f"{long}.jpg", b"y" * 513),
        ("grün/bär.jpg", b""),
        ("noextension", b"n"),
        (".hidden.jpg", b"h"),
        ("__meta__/x.json", b"m"),
    ]
    path = write_tar(tmp_path / "x.tar", members, FORMATS[tar_format], directories=True)
    assert read_all(path) == read_webdataset(path)
    assert [key for key, _ in read_all(path)] == ["plain", long, "grün/bär"]
    assert build_index(path).ignored_count == 3


def test_webdataset_writer_is_read(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as writer:
        for i in range(5):
            writer.write({"__key__": f"k{i}", "jpg": b"j" * i, "cls": i, "json": {"n": i}})
    assert read_all(tmp_path / "x.tar") == read_webdataset(tmp_path / "x.tar")


def small_shard(tmp_path: Path) -> Path:
    return write_shard(tmp_path / "s.tar", {f"k{i}": {"jpg": os.urandom(700 + i), "cls": b"1"} for i in range(4)})


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.json", b"3")], "comes again"),
        ([("a.jpg", b"1"), ("a.JPG", b"2")], "comes twice"),
    ],
)
def test_samples_that_webdataset_would_tear_apart(tmp_path: Path, members, said: str) -> None:
    path = write_tar(tmp_path / "x.tar", members, tarfile.PAX_FORMAT)
    with raises(DamagedShard, match=said):
        build_index(path)


def test_index_file_round_trip_and_damage(tmp_path: Path) -> None:
    path = small_shard(tmp_path)
    index = build_index(path)
    raw = np.frombuffer(index.to_bytes(), np.uint8)
    again = parse_index(path, raw)
    assert again is not None
    assert [again.members(i) for i in range(4)] == [index.members(i) for i in range(4)]
    assert list(again.keys()) == ["k0", "k1", "k2", "k3"]
    assert (again.digest, again.size) == (index.digest, index.size)
    for at in range(0, len(raw), 7):
        damaged = raw.copy()
        damaged[at] ^= 4
        assert parse_index(path, damaged) is None


def test_cached_index_follows_the_shard(tmp_path: Path, monkeypatch) -> None:
    """The cache is used while the shard stands as it was, and not afterwards."""
    import maekit.shards.index as module

    path = small_shard(tmp_path)
    load_index(path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "build_index", lambda p: pytest.fail("scanned again"))
        assert load_index(path).samples == 4
    write_shard(path, {"new": {"jpg": b"1"}})
    assert list(load_index(path).keys()) == ["new"]


def test_a_shard_that_changes_under_the_reader_is_refused(tmp_path: Path) -> None:
    path = small_shard(tmp_path)
    index = build_index(path)
    path.write_bytes(path.read_bytes() + bytes(512))
    with raises(MaekitError, match="changed since"):
        MemberReader().read(index, index.members(0)[0])


def test_image_is_the_only_member_with_an_image_extension(tmp_path: Path) -> None:
    samples = {"a": {"json": b"", "seg.png": b"s", "jpg": b"i"}, "b": {"cls": b"", "left.png": b"l"}, "c": {"txt": b""}}
    index = build_index(write_shard(tmp_path / "x.tar", samples))
    assert index.image(0).extension == "jpg"
    assert index.image(1).extension == "left.png"
    with pytest.raises(ImageError) as caught:
        index.image(2)
    assert caught.value.reason == "no_image"


def test_a_member_of_300_megabytes_is_not_read(tmp_path: Path) -> None:
    """Refused by its size in the index, before a byte of it is in memory; the file is a hole on the disk."""
    info = tarfile.TarInfo("a.jpg")
    info.size = 300 << 20
    with open(tmp_path / "x.tar", "wb") as file:
        file.write(info.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(512 + info.size + 1024)
    index = build_index(tmp_path / "x.tar")
    with pytest.raises(ImageError) as caught:
        MemberReader().read_image(index, 0)
    assert caught.value.reason == "too_large"


def test_a_member_that_was_changed_is_not_given_out(tmp_path: Path) -> None:
    path = small_shard(tmp_path)
    index = build_index(path, crc=True)
    write_index(index)
    data = bytearray(path.read_bytes())
    data[index.image(2).offset + 100] ^= 16
    status = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a disk does it
    reader, index = MemberReader(), load_index(path)
    assert len(reader.read_image(index, 1)) == 701
    with pytest.raises(ImageError) as caught:
        reader.read_image(index, 2)
    assert caught.value.reason == "checksum"


def test_an_index_that_came_with_its_shard_is_used(tmp_path: Path, monkeypatch) -> None:
    """Copied together, times differ: known by size and headers; another shard of that size is not taken for it."""
    import maekit.shards.index as module

    path = small_shard(tmp_path)
    write_index(build_index(path, crc=True))
    (tmp_path / "copy").mkdir()
    for name in ("s.tar", "s.tar.index"):
        (tmp_path / "copy" / name).write_bytes((tmp_path / name).read_bytes())
    copy = tmp_path / "copy" / "s.tar"
    os.utime(copy, (1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(module, "build_index", lambda p: pytest.fail("scanned"))
        assert load_index(copy).has_crc
        assert len(MemberReader().read_image(load_index(copy), 0)) == 700
    write_shard(copy, {f"q{i}": {"jpg": os.urandom(700 + i), "cls": b"1"} for i in range(4)})
    assert copy.stat().st_size == path.stat().st_size
    assert list(load_index(copy).keys()) == ["q0", "q1", "q2", "q3"]
    found = check_shards(find_shards(str(copy)))
    assert "not those of the index beside it" in found.damaged[0].damage.reason


def test_a_known_set_opens_without_its_indexes(make_shards, monkeypatch) -> None:
    """The second start reads one catalogue; a changed shard is looked at again, and its index when it is needed."""
    import maekit.shards.read as module

    directory = make_shards(3, 2)
    first = open_shards(find_shards(str(directory)))
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_index", lambda p: pytest.fail("opened"))
        again = open_shards(find_shards(str(directory)))
    assert (again.digest, again.samples) == (first.digest, 5)
    assert [again.index(1).key(i) for i in range(2)] == ["000003", "000004"]
    write_shard(directory / "001.tar", {"new": {"jpg": jpeg(9)}})
    changed = open_shards(find_shards(str(directory)))
    assert (changed.samples, changed.index(1).key(0)) == (4, "new")
    with raises(MaekitError, match="changed since"):
        first.index(1)


def test_find_shards(tmp_path: Path, make_shards, monkeypatch) -> None:
    directory = make_shards(1, 1, 1)
    write_shard(directory / "sub" / "000.tar", {"x": {"jpg": b""}})
    monkeypatch.chdir(tmp_path)

    def found(*specs: str) -> list[str]:
        return [shard.name for shard in find_shards(specs)]

    assert found("shards") == ["000.tar", "001.tar", "002.tar", "sub/000.tar"]
    assert found("shards/001.tar") == ["001.tar"]
    assert found("shards/*.tar") == ["000.tar", "001.tar", "002.tar"]
    assert found("shards/{000..001}.tar") == ["000.tar", "001.tar"]
    assert found("shards/000.tar", "shards/002.tar", "shards/sub/000.tar") == ["000.tar", "002.tar", "sub/000.tar"]
    assert found("shards/{000,sub/000}.tar") == ["000.tar", "sub/000.tar"]


def test_a_glob_keeps_its_names_when_more_files_match(tmp_path: Path, make_shards) -> None:
    make_shards(1, name="all/a")
    pattern = str(tmp_path / "all" / "*" / "*.tar")
    assert [s.name for s in find_shards(pattern)] == ["a/000.tar"]
    make_shards(1, name="all/b")
    assert [s.name for s in find_shards(pattern)] == ["a/000.tar", "b/000.tar"]


def test_links_are_followed_and_hidden_folders_are_not(tmp_path: Path, make_shards) -> None:
    make_shards(1, name="elsewhere")
    make_shards(1, name="shards/.trash")
    (tmp_path / "shards" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "shards" / "loop").symlink_to(tmp_path / "shards")
    assert [s.name for s in find_shards(str(tmp_path / "shards"))] == ["linked/000.tar"]
    (tmp_path / "shards" / "gone.tar").symlink_to(tmp_path / "nowhere.tar")
    with raises(InputError, match="leads nowhere"):
        find_shards(str(tmp_path / "shards"))


def test_a_shard_that_cannot_be_read_is_reported_with_the_others(make_shards, monkeypatch) -> None:
    import maekit.checking as module

    directory = make_shards(2, 3)
    original = module.build_index

    def fail_on_first(path: Path, **options):
        if path.name == "000.tar":
            raise MaekitError(f"cannot read {path}: Input/output error")
        return original(path, **options)

    monkeypatch.setattr(module, "build_index", fail_on_first)
    report = check_shards(find_shards(str(directory)))
    assert report.samples == 3
    assert "Input/output error" in report.damaged[0].damage.reason


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nothing", "no such file"),
        ("empty", "no .tar file"),
        ("empty/*.tar", "no file matches"),
        ("empty/{0..1}.tar", "no such file"),
        ("empty/{0..1.tar", "braces"),
        ("pipe:cat x", "neither commands"),
        ("zip://x.tar::s3://bucket/x.zip", "nor chained"),
        ("nonsense://bucket/", "knows no protocol"),
    ],
)
def test_specs_that_name_nothing(tmp_path: Path, monkeypatch, spec: str, said: str) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with raises(InputError, match=said):
        find_shards(spec)


COUNTS = np.array([5, 0, 17, 3, 40, 1, 9, 28, 2], np.int64)


@pytest.mark.parametrize("window", [1, 3, 16])
def test_each_epoch_is_a_permutation(window: int) -> None:
    order = SampleOrder(COUNTS, seed=1, digest="ab" * 32, window=window)
    n = int(COUNTS.sum())
    everything = {(s, o) for s, count in enumerate(COUNTS) for o in range(count)}
    epochs = [order.slice(e * n, (e + 1) * n) for e in range(3)]
    for epoch in epochs:
        assert set(zip(epoch.shards.tolist(), epoch.ordinals.tolist(), strict=True)) == everything
    assert not np.array_equal(epochs[0].shards, epochs[1].shards)


@settings(max_examples=100, deadline=None)
@given(start=st.integers(0, 400), length=st.integers(1, 250), window=st.integers(1, 12), seed=st.integers(0, 3))
def test_order_reads_the_same_from_anywhere(start: int, length: int, window: int, seed: int) -> None:
    """A slice equals the same places of the whole row, across windows and epochs, whatever was read before."""
    whole = SampleOrder(COUNTS, seed=seed, digest="0" * 64, window=window).slice(0, 700)
    part = SampleOrder(COUNTS, seed=seed, digest="0" * 64, window=window).slice(start, start + length)
    for ours, theirs in zip(
        (part.epochs, part.positions, part.shards, part.ordinals),
        (whole.epochs, whole.positions, whole.shards, whole.ordinals),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs[start : start + length])


@pytest.mark.parametrize("window", [1, 2, 3, 4, 9, 20])
@pytest.mark.parametrize("shards", [9, 12])
def test_windows_name_the_shards_that_reading_comes_to(window: int, shards: int) -> None:
    """From any place, over epochs: what is fetched ahead is what is read."""
    order = SampleOrder(np.full(shards, 5, np.int64), seed=0, digest="0" * 64, window=window)
    read = order.slice(0, 3 * shards * 5)
    for start in range(0, 3 * shards * 5, 7):
        windows = order.windows(start)
        number, ahead = order.window_number(start), set(next(windows))
        for place in range(start, 3 * shards * 5):
            for _ in range(order.window_number(place) - number):
                ahead = set(next(windows))
            number = order.window_number(place)
            assert int(read.shards[place]) in ahead


def test_order_depends_on_seed_and_data() -> None:
    def places(**changes) -> list[int]:
        return SampleOrder(COUNTS, **{"seed": 0, "digest": "0" * 64, **changes}).slice(0, 105).ordinals.tolist()

    assert places() == places()
    assert places() != places(seed=1)
    assert places() != places(digest="1" * 64)


def test_order_stays_within_windows() -> None:
    """At most `window` shards are open at a time: reads stay mostly sequential."""
    counts = np.full(40, 25, np.int64)
    shards = SampleOrder(counts, seed=0, digest="0" * 64, window=8).slice(0, 1000).shards
    for window in range(5):
        assert len(set(shards[window * 200 : (window + 1) * 200].tolist())) == 8


def test_a_shard_that_goes_away_while_its_images_are_decoded(make_shards, monkeypatch) -> None:
    """It is reported, and the others are checked to the end."""
    import maekit.checking as module

    directory = make_shards(3, 4)
    original = module._chunks

    def lose(*arguments):
        for chunk in original(*arguments):
            (directory / "000.tar").unlink(missing_ok=True)
            yield chunk

    monkeypatch.setattr(module, "_chunks", lose)
    report = check_shards(find_shards(str(directory)), images=True)
    assert [shard.unreadable for shard in report.shards] == [True, False]
    assert report.images.decoded == 4


def test_check_counts_and_reports(make_shards) -> None:
    directory = make_shards(3, 2)
    write_shard(directory / "extra.tar", {"000000": {"jpg": jpeg(0)}, "text": {"txt": b""}})
    whole = (directory / "000.tar").read_bytes()
    (directory / "cut.tar").write_bytes(whole[:2000])
    report = check_shards(find_shards(str(directory)))
    summary = report.summary()
    assert {k: summary[k] for k in ("samples", "shards", "damaged", "duplicates", "without_image")} == {
        "samples": 7,
        "shards": 4,
        "damaged": 1,
        "duplicates": 1,
        "without_image": 1,
    }
    assert [d["shard"] for d in summary["damage"]] == ["cut.tar"]
    json.dumps(summary)


def test_open_shards_refuses_or_skips_damage(make_shards) -> None:
    directory = make_shards(3, 2)
    (directory / "bad.tar").write_bytes(b"nothing")
    found = find_shards(str(directory))
    with raises(InputError, match=r"1 of 3 shards damaged.*bad\.tar.*--skip-damaged"):
        open_shards(found)
    opened = open_shards(found, skip_damaged=True)
    assert opened.samples == 5
    assert [opened.locate(n) for n in range(5)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_digest_names_the_data_wherever_it_lies(make_shards) -> None:
    def digest(directory: Path) -> str:
        return open_shards(find_shards(str(directory))).digest

    assert digest(make_shards(3, 2, name="a")) == digest(make_shards(3, 2, name="b"))
    assert digest(make_shards(3, 2, name="a")) != digest(make_shards(2, 3, name="c"))
