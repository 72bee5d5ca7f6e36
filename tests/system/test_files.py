"""Files are whole or absent, whatever happens while they are written; walks leave nothing out in silence."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.errors import raises

from maekit.system import files
from maekit.system.errors import InputError, MaekitError


def test_a_file_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    files.write_atomically(path, b"old")

    def write(error: BaseException) -> None:
        with files.atomic_file(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(KeyboardInterrupt):
        write(KeyboardInterrupt())
    with raises(MaekitError, match="cannot write .*file: No space left.* is intact"):
        write(OSError(28, "No space left on device"))
    assert path.read_bytes() == b"old"
    assert [child.name for child in path.parent.iterdir()] == ["file"]


def test_equal_names_in_one_scratch_folder(tmp_path: Path) -> None:
    """Threads that write files of one name through one folder do not take each other's unfinished file."""
    paths = [tmp_path / str(number) / "part" for number in range(40)]

    def write(path: Path) -> None:
        files.write_atomically(path, path.parent.name.encode(), scratch=tmp_path / "scratch")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, paths))
    assert all(path.read_text() == path.parent.name for path in paths)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_one_of_many_creates_a_file(tmp_path: Path) -> None:
    path = tmp_path / "record"

    def create(number: int) -> bool:
        return files.create_whole(path, str(number).encode(), scratch=tmp_path)

    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(create, range(24)))
    assert sum(created) == 1
    assert path.read_text() == str(created.index(True))
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert files.create_whole(tmp_path / "record", b"1", scratch=tmp_path)
    assert (tmp_path / "record").read_bytes() == b"1"
    with raises(MaekitError, match="cannot write .*Operation not permitted"):
        files.create_whole(tmp_path / "record", b"2", scratch=tmp_path)
    assert (tmp_path / "record").read_bytes() == b"1"


def test_a_walk_is_sorted_by_folder_and_follows_links_once(tmp_path: Path) -> None:
    for name in ("a.b/x", "a/x", "a/.hidden", ".git/x", "b"):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).touch()
    (tmp_path / "tree" / "a" / "up").symlink_to(tmp_path / "tree")
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "y").touch()
    (tmp_path / "tree" / "link").symlink_to(tmp_path / "far")
    found = [str(path.relative_to(tmp_path / "tree")) for path in files.walk_files(tmp_path / "tree")]
    assert found == ["a/x", "a.b/x", "b", "link/y"]
    (tmp_path / "tree" / "gone").symlink_to(tmp_path / "nowhere")
    with raises(InputError, match="gone is a link that leads nowhere"):
        list(files.walk_files(tmp_path / "tree"))


def test_a_failed_read_names_the_file_and_the_reason(tmp_path: Path) -> None:
    with raises(InputError, match=r"^cannot read .*nowhere: No such file or directory$"):  # noqa: SIM117
        with files.reading(tmp_path / "nowhere", InputError):
            (tmp_path / "nowhere").read_bytes()
    with raises(MaekitError, match=r"^cannot read x: without a number$"), files.reading("x"):
        raise OSError("without a number")
