"""Several processes on one machine, over gloo."""

import datetime
import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
from support.errors import raises
from support.processes import finish, read_trace, start, tiny_config

import maekit
from maekit.runs import RunDirectory
from maekit.system.errors import InputError, MaekitError
from maekit.training import distributed

pytestmark = pytest.mark.whole


def rows(run: Path) -> list[dict]:
    return RunDirectory(run).metrics()


def test_two_ranks_train_as_one_does(make_shards, tmp_path: Path) -> None:
    """Losses and gradients are those of one process: summed instead of averaged, or not shared, they would not be.

    With micro-batches, and more shards than samples for some of them; validation divides its images, too.
    """
    shards = make_shards(7, 0, 1, 6)
    changes = {"batch_size": 12, "steps": 8, "optimizer__lr": 5e-2, "data__val": [str(shards)]}
    config = tiny_config(shards, tmp_path / "two", run__micro_batch=3, **changes)
    assert finish(start(config, tmp_path / "log", world=2)) == [0, 0]
    assert maekit.pretrain(tiny_config(shards, tmp_path / "one", **changes)).steps == 8
    for ours, theirs in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert set(ours) == set(theirs)
        for name in {"loss", "grad_norm", "val_loss"} & set(ours):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3)
    assert "val_loss" in rows(tmp_path / "one")[-1]
    # And on in one process, from where two were.
    config = tiny_config(shards, tmp_path / "two", **changes)
    assert maekit.pretrain(config).already_finished


def test_two_ranks_go_on_with_a_fitted_target_and_several_masks(make_shards, tmp_path: Path) -> None:
    """One fits the basis, both use it; resumed, the main process alone knows from where, and both go on alike."""
    shards = make_shards(7, 6)
    model = {"model__target": "pca", "model__pca_components": 12, "model__decoder": "cross"}
    changes = {**model, "model__predict_ratio": 0.5, "model__masks_per_image": 2, "run__keep_every": 3}
    runs = {name: tmp_path / name for name in ("whole", "stopped", "one")}
    config = tiny_config(shards, runs["whole"], **changes)
    assert finish(start(config, tmp_path / "log", world=2)) == [0, 0]
    shutil.copytree(runs["whole"], runs["stopped"])
    (runs["stopped"] / "encoder.safetensors").unlink()
    for step in (6, 8):
        shutil.rmtree(RunDirectory(runs["stopped"]).checkpoint(step).path)
    config = tiny_config(shards, runs["stopped"], **changes)
    assert finish(start(config, tmp_path / "log", world=2)) == [0, 0]
    assert "after step 3 of 8" in (tmp_path / "log").read_text()
    weights = [(runs[name] / "encoder.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]
    maekit.pretrain(tiny_config(shards, runs["one"], **changes))
    for ours, theirs in zip(rows(runs["whole"]), rows(runs["one"]), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_stops_all_with_everything_saved(make_shards, tmp_path: Path, number) -> None:
    """Then one process goes on, then two again: the samples of every step are those of an undisturbed run."""
    shards = make_shards(9, 14, 5)
    config = tiny_config(shards, tmp_path / "run", steps=400, run__checkpoint_every=400)
    trace = tmp_path / "trace"
    processes = start(config, tmp_path / "log", world=2, trace=trace)
    wait_for_steps(trace, 6, processes)
    os.kill(processes[1].pid, number)
    assert finish(processes) == [75, 75]
    last = max(step for step, _ in read_trace(trace))
    assert RunDirectory(tmp_path / "run").newest_valid().step == last
    said = (tmp_path / "log").read_text()
    assert said.count("Stopped: stopped by") == 1
    assert f"after step {last} of 400, everything is saved" in said


def test_a_killed_rank_ends_the_others_in_one_line(make_shards, tmp_path: Path) -> None:
    config = tiny_config(make_shards(9, 14, 5), tmp_path / "run", steps=4000, run__checkpoint_every=4000)
    trace = tmp_path / "trace"
    processes = start(config, tmp_path / "log", world=2, trace=trace)
    wait_for_steps(trace, 6, processes)
    processes[1].kill()
    assert finish(processes) == [1, -9]
    assert "another process of this run is gone" in (tmp_path / "log").read_text()


def test_an_error_on_one_rank_is_told_by_it_and_ends_all(make_shards, tmp_path: Path) -> None:
    """Here: bad samples, which any rank may come across."""
    from support.shards import jpeg, write_shard

    samples = {f"{i:03d}": {"jpg": jpeg(i) if i % 5 else b"<html>"} for i in range(40)}
    write_shard(tmp_path / "shards/0.tar", samples)
    config = tiny_config(tmp_path / "shards", tmp_path / "run", steps=50)
    assert finish(start(config, tmp_path / "log", world=2)) == [1, 1]
    said = (tmp_path / "log").read_text()
    assert said.count(" samples cannot be used, more than --max-bad 0.01") == 1


def test_what_the_ranks_do_not_divide_is_refused_once(make_shards, tmp_path: Path) -> None:
    config = tiny_config(make_shards(9), tmp_path / "run", batch_size=5)
    assert finish(start(config, tmp_path / "log", world=2)) == [2, 2]
    said = (tmp_path / "log").read_text()
    assert said.count("2 processes do not divide a batch of 5; the nearest are 4 and 6") == 1
    assert not (tmp_path / "run").exists()


def test_half_an_environment_is_refused(make_shards, tmp_path: Path, monkeypatch) -> None:
    config = tiny_config(make_shards(9), tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with raises(InputError, match="RANK is ''; start with torchrun"):
        maekit.pretrain(config)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with raises(InputError, match="MASTER_ADDR is not"):
        maekit.pretrain(config)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with distributed.join("cpu") as world:
        assert (world.rank, world.size, world.sum([1.0, 2.0])) == (0, 1, [1.0, 2.0])


@pytest.mark.parametrize("rank", [0, 1])
def test_who_waits_for_others_tells(monkeypatch, rank: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, **there}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(distributed, "_MEETING", datetime.timedelta(seconds=1))
    monkeypatch.setattr(distributed, "_MEETING_NOTE_SECONDS", 0.4)
    notes: list[str] = []
    where = f"{1 - rank} of 2 .*127.0.0.1:{there['MASTER_PORT']}"
    with (
        raises(MaekitError, match=f"rank {rank} of 2 cannot reach the others: {where}"),
        distributed.join("cpu", notes.append),
    ):
        pass
    assert re.match(f"waiting for the other processes: {where}", notes[0])


def test_a_signal_while_starting_exits_75_at_once(make_shards, tmp_path: Path) -> None:
    """A scheduler that ends a job which is still indexing or downloading queues it again like any other."""
    config = tiny_config(make_shards(9), tmp_path / "run")
    sabotage = (slow_start, (tmp_path / "here",))
    processes = start(config, tmp_path / "log", sabotage=sabotage)
    until = time.monotonic() + 60
    while not (tmp_path / "here").exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert (tmp_path / "here").exists()
    os.kill(processes[0].pid, signal.SIGTERM)
    assert finish(processes, 5) == [75]
    assert "before the first step of this start" in (tmp_path / "log").read_text()


def slow_start(here: Path) -> None:
    from maekit.training import launch

    def never(*arguments) -> None:
        here.touch()
        time.sleep(600)

    launch.find_shards = never


def wait_for_steps(trace: Path, steps: int, processes) -> None:
    until = time.monotonic() + 60
    while not trace.exists() or trace.read_text().count("\n") < steps * len(processes):
        assert all(process.is_alive() for process in processes)
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize(("local_rank", "count", "gpu"), [(0, 1, 0), (3, 1, 0), (1, 2, 1), (0, 8, 0)])
def test_a_process_that_sees_one_gpu_takes_it(local_rank: int, count: int, gpu: int) -> None:
    """As under `srun --gpus-per-task=1`, where LOCAL_RANK counts on."""
    assert distributed._own_gpu(local_rank, count) == gpu
    with raises(InputError, match="LOCAL_RANK=2, and this process sees 2 CUDA devices; start one process per GPU"):
        distributed._own_gpu(2, 2)
