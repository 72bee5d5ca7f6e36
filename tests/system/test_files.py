"""Files are whole or absent, whatever happens while they are written; walks leave nothing out in silence."""

import contextlib
import errno
import os
import stat
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.errors import raises

from maekit.system import files
from maekit.system.errors import InputError, MachineWarning, MaekitError


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
    """One of many creates a file all the same, also after one that was killed while it did."""
    monkeypatch.setattr(os, "link", failing(errno.EMLINK))
    monkeypatch.setattr(files, "_CLAIM_SECONDS", 0.2)
    (tmp_path / ".record.claim").touch()
    test_one_of_many_creates_a_file(tmp_path)


def failing(number: int):
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF, errno.EIO])
def test_names_that_cannot_be_made_durable(tmp_path: Path, monkeypatch, number: int) -> None:
    """What a mount lacks is forgiven, a disk that fails never."""
    real, fail = os.fsync, failing(number)
    monkeypatch.setattr(os, "fsync", lambda fd: fail() if stat.S_ISDIR(os.fstat(fd).st_mode) else real(fd))
    with raises(MaekitError, match="Input/output") if number == errno.EIO else contextlib.nullcontext():
        files.write_atomically(tmp_path / "a", b"1")
    monkeypatch.undo()
    real_open = os.open
    monkeypatch.setattr(
        os, "open", lambda path, flags, *mode: fail() if flags & os.O_DIRECTORY else real_open(path, flags, *mode)
    )
    with raises(MaekitError, match="Input/output") if number == errno.EIO else contextlib.nullcontext():
        files.write_atomically(tmp_path / "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"2"


def test_content_that_cannot_be_made_durable_is_said_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(files, "_told", set())
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSYS))
    with pytest.warns(MachineWarning, match="does not write through"):
        files.write_atomically(tmp_path / "a", b"1")
    with warnings.catch_warnings(action="error"):
        files.write_atomically(tmp_path / "b", b"1")
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with raises(MaekitError, match="Input/output"):
        files.write_atomically(tmp_path / "c", b"1")


def test_a_mount_without_rename_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "replace", failing(errno.ENOSYS))
    with raises(MaekitError, match=r"cannot write .*a: its file system does not rename .*; write to a local disk"):
        files.write_atomically(tmp_path / "a", b"1")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os, "replace", failing(errno.ENOSPC))
    with raises(MaekitError, match="cannot write .*a: No space left"):
        files.write_atomically(tmp_path / "a", b"1")


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
