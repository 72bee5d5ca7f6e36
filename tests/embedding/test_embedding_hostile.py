"""Outputs in outputs, links, edited records, failing forks, signals at bad moments: none of them does harm."""

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.errors import raises
from support.models import embed_config
from support.processes import finish, start, warm_up
from support.rows import rows
from support.shards import jpeg, write_shard

import maekit.embedding.inputs as inputs
from maekit.config.embed import EmbedConfig
from maekit.embedding.embed import embed, raise_if_incomplete
from maekit.images import Preprocess
from maekit.system.errors import InputError, MaekitError
from maekit.system.locks import owned, still_owns


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for shard, name in enumerate(("a/0.tar", "b/0.tar")):
        write_shard(tmp_path / "in" / name, {f"{shard}{i}": {"jpg": jpeg(i + shard), "json": b"{}"} for i in range(20)})
    return tmp_path / "in"


def test_other_outputs_and_files_stay(trained: Path, shards: Path, tmp_path: Path) -> None:
    outer = embed_config(trained, tmp_path / "out", shards=(str(shards / "a"),))
    inner = embed_config(trained, tmp_path / "out" / "val", shards=(str(shards / "b"),))
    embed(outer)
    embed(inner)
    shutil.copy(tmp_path / "out" / "0.parquet", tmp_path / "out" / "mine.parquet")
    (tmp_path / "out" / "metadata").mkdir()
    (tmp_path / "out" / "metadata" / "metadata_00005.parquet").write_bytes(b"")
    embed(outer)
    outer.overwrite = True
    embed(outer)
    assert (tmp_path / "out" / "mine.parquet").exists()
    assert (tmp_path / "out" / "metadata" / "metadata_00005.parquet").exists()
    assert (embed(inner).skipped, len(rows(tmp_path / "out" / "val")["key"])) == (1, 20)


def test_shards_of_one_name_in_two_folders(trained: Path, shards: Path, tmp_path: Path) -> None:
    """Their records are written at the same time, by way of the same folder of unfinished files."""
    config = embed_config(trained, tmp_path / "out", shards=(str(shards),))
    embed(config)
    for _ in range(10):
        for name in ("a", "b"):
            os.utime(shards / name / "0.tar")
        result = embed(config)
        assert (result.rows, result.skipped) == (40, 2)
        for name in ("a/0.tar", "b/0.tar"):
            assert json.loads((tmp_path / "out" / "_maekit" / f"{name}.json").read_text())["shard"] == name


def test_a_member_kept_that_cannot_be_read(trained: Path, shards: Path, tmp_path: Path, monkeypatch) -> None:
    """Its shard is left out, and the others are done."""
    sidecar = inputs.TarImages.sidecar

    def failing(self, ordinal, extension):
        if self.name == "a/0.tar" and ordinal == 3:
            raise MaekitError("cannot read a/0.tar: Input/output error")
        return sidecar(self, ordinal, extension)

    monkeypatch.setattr(inputs.TarImages, "sidecar", failing)
    result = embed(embed_config(trained, tmp_path / "out", shards=(str(shards),), keep=("json",), batch_size=2))
    assert (result.rows, result.shards) == (20, 1)
    assert result.damaged == ["cannot read a/0.tar: Input/output error"]


@pytest.mark.parametrize("place", [".", ".tmp", ".locks", ".locks/shards", ".numbers", "errors"])
def test_a_link_among_the_bookkeeping(trained: Path, shards: Path, tmp_path: Path, place: str) -> None:
    victim = tmp_path / "victim"
    (victim / "all").mkdir(parents=True)
    (victim / "all" / "thesis").write_text("text")
    link = tmp_path / "out" / "_maekit" / place
    link.parent.mkdir(parents=True, exist_ok=True)
    if place == ".":
        link = tmp_path / "out" / "_maekit"
    link.symlink_to(victim)
    with raises(InputError, match="is a link"):
        embed(embed_config(trained, tmp_path / "out", shards=(str(shards),), overwrite=True))
    assert (victim / "all" / "thesis").read_text() == "text"


def test_a_lock_is_no_link(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("text")
    (tmp_path / "lock").symlink_to(tmp_path / "thesis")
    with raises(InputError, match="cannot write"), owned(tmp_path / "lock"):
        pass
    assert (tmp_path / "thesis").read_text() == "text"


@pytest.mark.parametrize(
    "edit",
    [
        {"shard": "../../PWNED", "input_version": "x"},
        {"outputs": 5},
        {"outputs": [{"path": 7, "sha256": "", "bytes": 1}]},
        {"outputs": [{"path": "../../victim", "sha256": "", "bytes": 4}]},
        {"outputs": [{"path": "/etc/hostname", "sha256": "", "bytes": 4}]},
        {"rows": "abc"},
        {"rows": 19},
        {"options": 3},
        {"input_version": 7},
        {"about_to_write": ["../victim", 3, "_maekit/.output.json"]},
    ],
    ids=str,
)
def test_an_edited_record(trained: Path, shards: Path, tmp_path: Path, edit: dict) -> None:
    """It does not count: the shard is done again, and nothing outside is read, written or deleted."""
    (tmp_path / "victim").write_text("text")
    config = embed_config(trained, tmp_path / "out", shards=(str(shards),), verify=True)
    embed(config)
    path = tmp_path / "out" / "_maekit" / "a" / "0.tar.json"
    for overwrite in (False, True):
        path.write_text(json.dumps({**json.loads(path.read_text()), **edit}))
        config.overwrite = overwrite
        result = embed(config)
        raise_if_incomplete(result)
        assert (result.rows, result.shards) == (40, 2 if overwrite else 1)
    assert (tmp_path / "victim").read_text() == "text"
    assert not list(tmp_path.glob("PWNED*"))


def test_damaged_numbers(trained: Path, shards: Path, tmp_path: Path) -> None:
    config = embed_config(trained, tmp_path / "out", shards=(str(shards),), format="npy")
    embed(config)
    for text in ("", "{}", '{"shards": [1]}'):
        (tmp_path / "out" / "_maekit" / ".numbers" / "00000.json").write_text(text)
        with raises(InputError, match=r"00000\.json is damaged"):
            embed(config)


def test_names_that_lead_out(trained: Path, shards: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "other" / "z.tar", {"z": {"jpg": jpeg(1)}})
    with raises(InputError, match="leads out of the output"):
        embed(embed_config(trained, tmp_path / "x" / "out", shards=(f"{shards}/*/../../other/*.tar",)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "other"]
    write_shard(tmp_path / "in" / ".c" / "0.tar", {"c": {"jpg": jpeg(1)}})
    with raises(InputError, match="a hidden name"):
        embed(embed_config(trained, tmp_path / "out", shards=(str(shards / ".c" / "0.tar"), str(shards / "a"))))


def test_a_folder_that_shrinks(trained: Path, tmp_path: Path, monkeypatch) -> None:
    """No image has two rows when parts have moved up."""
    monkeypatch.setattr(inputs, "IMAGES_PER_PART", 4)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(9):
        (folder / f"{i}.jpg").write_bytes(jpeg(i))
        (folder / f"{i}.json").write_text("{}")
    config = embed_config(trained, tmp_path / "out", shards=(str(folder),), verify=True, keep=("json",))
    embed(config)
    (folder / "2.jpg").unlink()
    raise_if_incomplete(embed(config))
    assert rows(tmp_path / "out")["key"] == [f"{i}.jpg" for i in (0, 1, 3, 4, 5, 6, 7, 8)]
    (folder / "4.json").write_text('{"new": 1}')  # the picture is the same, what rides along is not
    assert embed(config).shards == 1
    tables = [pq.read_table(path)["json"].to_pylist() for path in sorted((tmp_path / "out").glob("*.parquet"))]
    assert tables[0] == ["{}", "{}", "{}", '{"new": 1}']


def test_a_lock_taken_over_is_seen(tmp_path: Path) -> None:
    """Another machine writes into the same file; who slept must not publish, nor remove the new owner's lock."""
    with owned(tmp_path / "lock"):
        descriptor = os.open(tmp_path / "lock", os.O_WRONLY | os.O_TRUNC)
        os.write(descriptor, b"process 5 on elsewhere\n7\n")
        assert not still_owns(tmp_path / "lock")
    assert (tmp_path / "lock").read_text() == "process 5 on elsewhere\n7\n"


def test_clearing_up_is_waited_for(tmp_path: Path) -> None:
    """A run that sweeps behind dead ones holds their locks for a moment; that is no second run."""
    context = multiprocessing.get_context("fork")
    ready, go = context.Event(), context.Event()

    def in_another_process() -> None:
        with owned(tmp_path / "lock", sweeping=True):
            ready.set()
            go.wait(10)

    process = context.Process(target=in_another_process)
    process.start()
    assert ready.wait(10)
    threading.Timer(0.3, go.set).start()
    with owned(tmp_path / "lock"):
        assert still_owns(tmp_path / "lock")
    process.join()


@pytest.mark.parametrize("which", [0, 2])
def test_processes_that_cannot_be_started(trained: Path, shards: Path, tmp_path: Path, monkeypatch, which) -> None:
    """One line, and no process left waiting; at the start, and when a dead one is to be replaced."""
    from multiprocessing import popen_fork

    launch = popen_fork.Popen._launch
    started = 0

    def failing(self, process):
        nonlocal started
        started += 1
        if started > which:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return launch(self, process)

    monkeypatch.setattr(popen_fork.Popen, "_launch", failing)
    if which:
        monkeypatch.setattr(Preprocess, "__call__", lambda self, data: os._exit(1))
    with raises(MaekitError, match="choose fewer --workers"):
        embed(embed_config(trained, tmp_path / "out", shards=(str(shards),), workers=2))
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    names = [Path(f"/proc/{child}/cmdline").read_bytes() for child in children]
    assert not [name for name in names if b"maekit-decode" in name]


def _hang(seconds: float) -> None:
    """Sabotage: each image takes so long."""
    plain = Preprocess.__call__
    Preprocess.__call__ = lambda self, data: (time.sleep(seconds), plain(self, data))[1]


def _slow_verify() -> None:
    import maekit.embedding.verify as module

    problem = module._problem
    module._problem = lambda *arguments: (time.sleep(0.5), problem(*arguments))[1]


def _slow_reading() -> None:
    read = inputs.read_image
    inputs.read_image = lambda *arguments: (time.sleep(0.2), read(*arguments))[1]


def _slow_loading() -> None:
    import maekit.embedding.device_worker as module

    session = module.EncoderSession
    module.EncoderSession = lambda *a, **k: (time.sleep(1.5), session(*a, **k))[1]


@pytest.mark.parametrize("sabotage", [(_hang, (60,)), (_slow_verify, ()), (_slow_reading, ()), (_slow_loading, ())])
def test_a_signal_at_a_bad_moment(trained: Path, shards: Path, tmp_path: Path, sabotage) -> None:
    """While an image takes for ever, while all is verified, while a shard is read again, while the model loads: 75."""
    for name in "cdefgh":
        write_shard(shards / f"{name}.tar", {f"{name}{i}": {"jpg": jpeg(i)} for i in range(12)})
    config = embed_config(trained, tmp_path / "out", shards=(str(shards),), verify=True, workers=2)
    if sabotage[0] in (_slow_verify, _slow_reading):
        embed(config)
    if sabotage[0] is _slow_reading:
        for path in shards.rglob("*.tar"):
            os.utime(path)
    warm_up()
    (process,) = start(config, tmp_path / "log", sabotage=sabotage)
    process.join(1.0)
    os.kill(process.pid, signal.SIGTERM)
    before = time.monotonic()
    assert finish([process], 20) == [75], (tmp_path / "log").read_text()
    assert time.monotonic() - before < 6
    assert not list((tmp_path / "out" / "_maekit" / ".locks").rglob("*.tar"))


def _die_loading() -> None:
    import maekit.embedding.device_worker as module

    module.EncoderSession = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)


def test_a_device_that_dies_while_it_loads(trained: Path, shards: Path, tmp_path: Path) -> None:
    config = EmbedConfig(str(trained / "encoder.onnx"), (str(shards),), str(tmp_path / "out"), devices=("cpu", "cpu"))
    warm_up()
    assert finish(start(config, tmp_path / "log", sabotage=(_die_loading, ()))) == [1]
    assert "the process of cpu ended while it loaded the model (exit code -9" in (tmp_path / "log").read_text()


def test_a_failing_device_leaves_no_lock(trained: Path, shards: Path, tmp_path: Path, monkeypatch) -> None:
    import maekit.embedding.output_directory as output

    for name in "cdef":
        write_shard(shards / f"{name}.tar", {f"{name}{i}": {"jpg": jpeg(i)} for i in range(40)})

    def failing(self, name):
        if name == "d.tar":
            raise MaekitError("cannot write d")
        time.sleep(0.05)
        return begin(self, name)

    begin = output.OutputDirectory.begin
    monkeypatch.setattr(output.OutputDirectory, "begin", failing)
    config = EmbedConfig(str(trained / "encoder.onnx"), (str(shards),), str(tmp_path / "out"), devices=("cpu", "cpu"))
    with raises(MaekitError, match="cannot write d"):
        embed(config)
    left = [path for name in (".locks", ".tmp") for path in (tmp_path / "out" / "_maekit" / name).rglob("*")]
    assert not [path for path in left if path.is_file()]


def test_large_members_make_smaller_groups(trained: Path, shards: Path, tmp_path: Path, monkeypatch) -> None:
    """A group of rows ends at so many bytes of members, wherever batches end."""
    import maekit.embedding.formats as module

    monkeypatch.setattr(module, "_GROUP_BYTES", 30)
    write_shard(tmp_path / "big" / "0.tar", {f"{i}": {"jpg": jpeg(i), "txt": b"x" * 10} for i in range(8)})
    for size in (2, 8):
        config = embed_config(
            trained, tmp_path / f"{size}", shards=(str(tmp_path / "big"),), keep=("txt",), batch_size=size
        )
        embed(config)
        file = pq.ParquetFile(tmp_path / f"{size}" / "0.parquet")
        assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [3, 3, 2]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cache_gb": float("inf")}, "--cache-gb inf"),
        ({"keep": ("a/b",)}, "--keep 'a/b'"),
        ({"keep": ("embedding",)}, "--keep embedding"),
        ({"keep": ("",)}, "--keep ''"),
        ({"keep": ("json", "json")}, "given twice"),
        ({"format": "csv"}, "--format csv: must be one of parquet, npy"),
        ({"limit": 0}, "--limit 0"),
        ({"device": "cuda:x"}, "--device cuda:x"),
        ({"device": "auto", "devices": ("auto", "cpu")}, "name each of them"),
        ({"provider_options": {"device_id": "1"}}, "choose the GPU by --device"),
        ({"provider_options": {"use_tf32": "0"}}, "runs on the CPU here"),
        ({"limit": 5, "num_splits": 2, "split": 0}, "--limit with several splits"),
        ({"batch_size": 10**9}, "at most 1048576"),
    ],
    ids=str,
)
def test_refused_in_one_line(trained: Path, shards: Path, tmp_path: Path, changes: dict, said: str) -> None:
    with raises(MaekitError, match=said):
        embed(embed_config(trained, tmp_path / "out", shards=(str(shards),), **changes))
