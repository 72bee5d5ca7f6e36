"""Embedding that is killed, starved of disk, robbed of its decoders or started twice ends as if nothing had been.

The same end means: every file of the output, commit records and lists of errors included, byte for byte. Shards of up
to 150 samples, some of them broken, and a tiny model, in processes forked from one that has imported ONNX Runtime.
"""

import hashlib
import os
import random
import re
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from support.models import embed_config
from support.processes import fill_disk, finish, kill_at_disk, segments, start, warm_up
from support.shards import jpeg, write_shard

from maekit.config.embed import EmbedConfig
from maekit.embedding.embed import embed

FORMATS = ("parquet", "npy")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return shards of several sizes, in folders, with broken samples among them."""
    folder = tmp_path_factory.mktemp("input")
    random_ = np.random.default_rng(0)
    pictures = [jpeg(number) for number in range(20)]
    for shard, count in enumerate((60, 3, 150, 1, 40, 16, 90, 33)):
        samples = {}
        for i in range(count):
            data = pictures[(i + shard) % len(pictures)]
            members = {"jpg": data[: int(random_.integers(0, 400))] if random_.random() < 0.05 else data}
            if random_.random() < 0.1:
                members = {"txt": b"no image"}
            samples[f"{shard}-{i:04d}"] = {**members, "json": b'{"n": %d}' % i}
        write_shard(folder / "ab"[shard % 2] / f"{shard:02d}.tar", samples)
    write_shard(folder / "b" / "none.tar", {"only": {"txt": b""}})
    return folder


def config_of(trained: Path, shards: Path, out: Path, **changes) -> EmbedConfig:
    settings = {"shards": (str(shards),), "keep": ("json",), "batch_size": 16, "workers": 2, **changes}
    return embed_config(trained, out, **settings)


def files_of(out: Path) -> dict[str, str]:
    """Return the digest of every file, by its path."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def assert_same_end(out: Path, whole: Path) -> None:
    """Nothing is missing, nothing differs, and nothing is left over: no lock, no unfinished file."""
    there, expected = files_of(out), files_of(whole)
    assert there.keys() == expected.keys()
    assert there == expected


def children_of(process) -> list[int]:
    try:
        return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    except OSError:
        return []


def assert_gone(pids: list[int], seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while alive := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < until, f"outlived their parent: {alive}"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def redone(trace: Path) -> list[int]:
    """Return, for each process that wrote, how many shards it had begun and not committed when it ended."""
    begun: dict[str, list[str]] = {}
    for line in trace.read_text().splitlines():
        what, pid, name = line.split()
        mine = begun.setdefault(pid, [])
        if what == "begin":
            mine.append(name)
        elif name in mine:
            mine.remove(name)
    return [len(names) for names in begun.values()]


@pytest.fixture(scope="module")
def whole(trained: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return undisturbed outputs by format."""
    folder = tmp_path_factory.mktemp("whole")
    for format_ in FORMATS:
        embed(config_of(trained, shards, folder / format_, format=format_))
    warm_up()
    return {format_: folder / format_ for format_ in FORMATS}


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_killed_at_any_moment(trained: Path, shards: Path, whole, tmp_path: Path, rounds, runtime: str) -> None:
    """SIGKILL at random moments: the run that finishes leaves the files of an undisturbed one."""
    random_ = random.Random(0)
    before_all = segments()
    if runtime == "openvino":
        pytest.importorskip("openvino")
        whole = {format_: tmp_path / f"whole-{format_}" for format_ in FORMATS}
        for format_, out in whole.items():
            assert finish(
                start(config_of(trained, shards, out, format=format_, runtime=runtime), tmp_path / "log")
            ) == [0]
    config = config_of(trained, shards, tmp_path / "timed", runtime=runtime)
    before = time.monotonic()
    assert finish(start(config, tmp_path / "log")) == [0]
    seconds = time.monotonic() - before
    kills = runs = 0
    while kills < (rounds(6, 300) if runtime == "onnxruntime" else rounds(3, 100)):
        runs += 1
        format_ = FORMATS[runs % 2]
        out, trace = tmp_path / f"out{runs}", tmp_path / f"trace{runs}"
        config = config_of(trained, shards, out, format=format_, workers=random_.choice((1, 2, 3)), runtime=runtime)
        while True:
            (process,) = start(config, tmp_path / "log", trace=trace)
            process.join(random_.uniform(0, 1.1 * seconds))
            if process.exitcode is not None:
                break
            children = children_of(process)
            process.kill()
            process.join()
            kills += 1
            assert_gone(children)
        assert process.exitcode == 0, (tmp_path / "log").read_text()[-2000:]
        assert_same_end(out, whole[format_])
        assert max(redone(trace), default=0) <= 1
    assert segments() == before_all
    print(f"\n{kills} SIGKILLs of embedding in {runs} runs of {runtime}")


def test_killed_at_each_thing_done_to_the_disk(trained: Path, shards: Path, whole, tmp_path: Path, rounds) -> None:
    kills = 0
    for number in range(1, rounds(9, 130), rounds(4, 1)):
        for after in (False, True):
            format_ = FORMATS[number % 2]
            out = tmp_path / f"out{number}{after}"
            config = config_of(trained, shards, out, format=format_)
            sabotage = (kill_at_disk, (out, number, after))
            (code,) = finish(start(config, tmp_path / "log", sabotage=sabotage))
            assert code == -signal.SIGKILL
            kills += 1
            assert finish(start(config, tmp_path / "log")) == [0], (tmp_path / "log").read_text()[-2000:]
            assert_same_end(out, whole[format_])
    print(f"\n{kills} SIGKILLs at something done to the disk")


def test_disk_full(trained: Path, shards: Path, whole, tmp_path: Path, rounds) -> None:
    """From the n-th write on: one line with the path, and the same end once there is room."""
    codes: Counter[int] = Counter()
    for number in range(1, rounds(14, 150), rounds(6, 1)):
        format_ = FORMATS[number % 2]
        out, log = tmp_path / f"out{number}", tmp_path / f"log{number}"
        config = config_of(trained, shards, out, format=format_)
        (code,) = finish(start(config, log, sabotage=(fill_disk, (out, number))))
        said = [line for line in log.read_text().splitlines() if line.startswith("maekit: ")]
        assert code in (1, 2)
        assert len(said) == 1
        assert str(out) in said[0]
        assert "No space left on device" in said[0]
        assert "Traceback" not in log.read_text()
        codes[code] += 1
        assert finish(start(config, log)) == [0]
        assert_same_end(out, whole[format_])
    print(f"\ndisk full from the n-th write on: exit codes {dict(codes)}")


def test_decoders_killed(trained: Path, shards: Path, whole, tmp_path: Path, rounds) -> None:
    """A decoding process that is killed is replaced, and nothing is lost, refused or written otherwise."""
    random_ = random.Random(1)
    kills = runs = 0
    while kills < rounds(4, 200):
        runs += 1
        out = tmp_path / f"out{runs}"
        (process,) = start(config_of(trained, shards, out), tmp_path / "log")
        while process.exitcode is None:
            process.join(random_.uniform(0, 0.06))
            if process.exitcode is None and (children := children_of(process)):
                try:
                    os.kill(random_.choice(children), signal.SIGKILL)
                    kills += 1
                except ProcessLookupError:
                    pass
                process.join(0.05)
        log = (tmp_path / "log").read_text()
        assert process.exitcode == 0, log[-2000:]
        if "crashed" in "".join(path.read_text() for path in out.rglob("*.jsonl")):
            continue  # one image was hit twice in a row: refused, and said so
        assert_same_end(out, whole["parquet"])
    print(f"\n{kills} SIGKILLs of decoding processes in {runs} runs")


def test_a_device_killed(trained: Path, shards: Path, whole, tmp_path: Path, rounds) -> None:
    """Two devices, one process of them killed: the other takes its shards over."""
    random_ = random.Random(2)
    kills = 0
    for number in range(rounds(2, 40)):
        out, log = tmp_path / f"out{number}", tmp_path / f"log{number}"
        config = config_of(trained, shards, out, device="auto", devices=("cpu", "cpu"))
        (process,) = start(config, log)
        while process.exitcode is None and not (out / "_maekit" / ".output.json").exists():
            process.join(0.01)
        process.join(random_.uniform(0, 0.3))
        children = children_of(process)
        if process.exitcode is None and len(children) == 2:
            grandchildren = [int(pid) for pid in _read(f"/proc/{children[0]}/task/{children[0]}/children").split()]
            os.kill(children[0], signal.SIGKILL)
            kills += 1
            assert_gone(grandchildren)
        assert finish([process]) == [0], log.read_text()[-2000:]
        assert_same_end(out, whole["parquet"])
    print(f"\n{kills} SIGKILLs of one of two devices' processes")


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def test_several_runs_on_one_output(trained: Path, shards: Path, whole, tmp_path: Path, rounds) -> None:
    """Of two equal runs, one works and the other is refused; splits share the work, killed or not."""
    random_ = random.Random(3)
    refused = killed = 0
    for number in range(rounds(2, 40)):
        out, log = tmp_path / f"out{number}", tmp_path / f"log{number}"
        config = config_of(trained, shards, out)
        pair = start(config, log) + start(config, log)
        codes = sorted(finish(pair))
        if codes == [0, 2]:
            refused += 1
            assert re.search(r"in use by (process \d+ on |another process)", log.read_text())
        else:
            assert codes == [0, 0], log.read_text()[-2000:]  # the first had ended before the second began
        assert_same_end(out, whole["parquet"])
        out = tmp_path / f"splits{number}"
        splits = [config_of(trained, shards, out, format="npy", num_splits=3, split=i) for i in range(3)]
        at_work = [start(split, log)[0] for split in splits]
        victim = random_.randrange(3)
        at_work[victim].join(random_.uniform(0, 0.5))
        at_work[victim].kill()
        codes = finish(at_work)
        killed += codes[victim] != 0
        assert [code for i, code in enumerate(codes) if i != victim] == [0, 0], log.read_text()[-2000:]
        assert finish(start(splits[victim], log)) == [0], log.read_text()[-2000:]
        assert_same_end(out, whole["npy"])
    print(f"\n{refused} second runs refused; {killed} of {rounds(2, 40)} runs of three splits with one killed")
