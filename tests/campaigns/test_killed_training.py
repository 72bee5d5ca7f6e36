"""Training that is killed, stopped, starved of disk and fed damaged checkpoints ends as if nothing had been.

Runs of 40 steps of a tiny model on 64 x 64 pixels, in processes forked from one that has imported torch. What each step
is trained on is noted as it happens, and must be the same whenever a step is taken again.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from support.processes import fill_disk, finish, kill_in_checkpoint, read_trace, start, tiny_config, warm_up

from maekit.config import PretrainConfig
from maekit.runs import MODEL, OPTIMIZER, RunDirectory
from maekit.shards.order import SampleOrder
from maekit.training import data
from maekit.training.data import BatchLayout, ExactSource

STEPS = 40


@pytest.fixture
def undisturbed(make_shards, tmp_path: Path):
    """Return a function that gives a config, its undisturbed run's files, its trace, and how long it took."""
    shards = make_shards(9, 14, 5, size=(80, 72))

    def make(world: int = 1, **changes) -> tuple[PretrainConfig, dict[str, str], dict, float]:
        settings = {"model__image_size": 64, "steps": STEPS, "batch_size": 12, "run__checkpoint_every": 4, **changes}
        config = tiny_config(shards, tmp_path / "run", **settings)
        warm_up()
        before = time.monotonic()
        whole = tiny_config(shards, tmp_path / "whole", **settings)
        assert finish(start(whole, tmp_path / "log", world=world, trace=tmp_path / "whole.trace")) == [0] * world
        seconds = time.monotonic() - before
        return config, results(tmp_path / "whole"), read_trace(tmp_path / "whole.trace"), seconds

    return make


def results(run: Path) -> dict[str, str]:
    """Return digests of the last weights and moments, of the encoder, and the losses of all steps."""
    last = RunDirectory(run).checkpoint(STEPS).path
    digests = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (last / MODEL, last / OPTIMIZER, run / "encoder.safetensors")
    }
    losses = [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in RunDirectory(run).metrics()]
    return digests | {"losses": json.dumps(losses)}


def begin_again(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    (tmp_path / "trace").unlink(missing_ok=True)


def test_sigkill_at_any_moment(undisturbed, tmp_path: Path, rounds) -> None:
    config, expected, trace, seconds = undisturbed()
    chance, kills, runs, wanted = random.Random(1), 0, 0, rounds(4, 300)
    while kills < wanted:
        begin_again(tmp_path)
        while True:
            (process,) = start(config, tmp_path / "log", trace=tmp_path / "trace")
            process.join(chance.uniform(0, 1.2 * seconds))
            if process.exitcode is not None:
                assert process.exitcode == 0, (tmp_path / "log").read_text()[-2000:]
                break
            process.kill()
            process.join()
            kills += 1
        runs += 1
        assert results(tmp_path / "run") == expected
        assert read_trace(tmp_path / "trace") == trace
    print(f"\n{kills} kills of training in {runs} runs, all bit-equal")


def test_sigkill_within_a_checkpoint(undisturbed, tmp_path: Path, rounds) -> None:
    """Before, within and after each thing that is done to the disk: the newest whole checkpoint is gone on from."""
    config, expected, trace, _ = undisturbed()
    chance, kills, runs, wanted = random.Random(2), 0, 0, rounds(4, 200)
    while kills < wanted:
        begin_again(tmp_path)
        while True:
            sabotage = (
                kill_in_checkpoint,
                (chance.randrange(1, chance.choice((100, 1000, 4000))), chance.random() < 0.5),
            )
            assert_no_half(tmp_path / "run")
            (code,) = finish(start(config, tmp_path / "log", trace=tmp_path / "trace", sabotage=sabotage))
            if code == 0:
                break
            assert code == -signal.SIGKILL, (tmp_path / "log").read_text()[-2000:]
            kills += 1
        runs += 1
        assert results(tmp_path / "run") == expected
        assert read_trace(tmp_path / "trace") == trace
    print(f"\n{kills} kills within checkpoints in {runs} runs, all bit-equal")


def assert_no_half(run: Path) -> None:
    """Whatever bears the name of a checkpoint is one."""
    assert all(checkpoint.problem() is None for checkpoint in RunDirectory(run).list_checkpoints())


def test_full_disk_at_each_write(undisturbed, tmp_path: Path, rounds) -> None:
    config, expected, trace, _ = undisturbed()
    wanted = range(1, 201) if rounds(0, 1) else (1, 2, 60)
    stopped = 0
    for number in wanted:
        begin_again(tmp_path)
        (tmp_path / "log").write_text("")
        sabotage = (fill_disk, (tmp_path / "run", number))
        (code,) = finish(start(config, tmp_path / "log", trace=tmp_path / "trace", sabotage=sabotage))
        said = (tmp_path / "log").read_text()
        assert code in (1, 2), said[-2000:]
        assert f"{tmp_path / 'run'}" in said.splitlines()[-1]
        assert "No space left" in said.splitlines()[-1]
        assert_no_half(tmp_path / "run")
        stopped += 1
        assert finish(start(config, tmp_path / "log", trace=tmp_path / "trace")) == [0]
        assert results(tmp_path / "run") == expected
        assert read_trace(tmp_path / "trace") == trace
    print(f"\n{stopped} full disks, each named with the path; every run went on to the same end")


def test_bit_flips_in_checkpoints(undisturbed, tmp_path: Path, rounds) -> None:
    """The damaged one is named, and the one before it is the newest that is valid."""
    undisturbed()
    run = RunDirectory(tmp_path / "whole")
    newest, before = run.list_checkpoints()[:2]
    chance, harmless, flips = random.Random(3), 0, rounds(60, 1000)
    paths = sorted(newest.path.iterdir())
    for _ in range(flips):
        path = chance.choice(paths)
        good = path.read_bytes()
        flipped = bytearray(good)
        flipped[chance.randrange(len(good))] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        named: list[str] = []
        found = run.newest_valid(named.append)
        path.write_bytes(good)
        if found == newest:
            # Spaces between the digests of the manifest say nothing.
            assert path.name == "manifest.json"
            assert json.loads(flipped) == json.loads(good)
            harmless += 1
        else:
            assert found == before
            assert str(newest.path) in named[0]
    assert harmless < flips / 20
    print(f"\n{flips} bit flips: {flips - harmless} named, {harmless} changed nothing but white space")


def test_signals_to_any_rank_lose_no_step(undisturbed, tmp_path: Path, rounds) -> None:
    """SIGTERM to one rank at any time: all save at the same boundary, the last step that was taken."""
    chance, wanted = random.Random(4), rounds(2, 60)
    worlds = rounds(1, 3)
    for world in (2, 3, 4)[:worlds]:
        config, expected, trace, _ = undisturbed(world)
        signals = runs = 0
        while signals < wanted // worlds:
            begin_again(tmp_path)
            while True:
                processes = start(config, tmp_path / "log", world=world, trace=tmp_path / "trace")
                moment = count_lines(tmp_path / "trace") + chance.randrange(1, STEPS * world)
                while count_lines(tmp_path / "trace") < moment and all(process.is_alive() for process in processes):
                    time.sleep(0.001)
                victim = chance.choice(processes)
                if victim.is_alive():
                    os.kill(victim.pid, signal.SIGTERM)
                codes = finish(processes)
                if codes == [0] * world:
                    break
                if -signal.SIGTERM in codes:
                    # It came after the last step, while the processes took leave of each other.
                    assert RunDirectory(tmp_path / "run").newest_valid().step == STEPS
                    continue
                assert codes == [75] * world, (tmp_path / "log").read_text()[-2000:]
                signals += 1
                last = max(step for step, _ in read_trace(tmp_path / "trace"))
                assert RunDirectory(tmp_path / "run").newest_valid().step == last
            runs += 1
            if world == 2:
                assert results(tmp_path / "run") == expected
            # After a start DistributedDataParallel sorts the gradients anew, and three numbers in another order may
            # give another sum.
            losses = [np.array(json.loads(found["losses"])) for found in (results(tmp_path / "run"), expected)]
            np.testing.assert_allclose(*losses, rtol=1e-3)
            assert read_trace(tmp_path / "trace") == trace
            # No step was taken twice.
            assert count_lines(tmp_path / "trace") == STEPS * world == len(trace)
        shutil.rmtree(tmp_path / "whole")
        (tmp_path / "whole.trace").unlink()
        same = "all bit-equal" if world == 2 else "equal but for the order of sums"
        print(f"\n{signals} signals to {world} ranks in {runs} runs, no step lost or taken twice, {same}")


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize("counts", [(9, 14, 5), (5, 0, 1, 7), (3,), (100, 1, 1, 250, 40, 7, 7, 1)])
def test_worlds_and_workers_and_stops_keep_one_order(counts: tuple[int, ...], monkeypatch, rounds) -> None:
    """Uneven shards, fewer shards than ranks, sets smaller than a batch: each step has the same places, once each."""
    chance, batch, last, stops = random.Random(5), 24, 30, rounds(3, 200)
    order = SampleOrder(np.array(counts), seed=7, digest="cd" * 32, window=2)

    def places(first: int, world: int, workers: int) -> list[np.ndarray]:
        """Return, by step, what all ranks' workers hand over in turn: (epoch, place, shard, ordinal)."""
        steps: list[list[np.ndarray]] = [[] for _ in range(last - first)]
        for rank in range(world):
            # Chunks of a few images each, so that one step takes several workers.
            division = BatchLayout(batch, batch // world, rank, world, image_bytes=3 << 20)
            rows = []
            for worker in range(max(1, workers)):
                info = type("Info", (), {"id": worker, "num_workers": workers})() if workers else None
                monkeypatch.setattr(data, "get_worker_info", lambda info=info: info)
                rows.append(iter(list(ExactSource(order, division, first=first, last=last))))
            chunks = len(division.chunks())
            for number in range((last - first) * chunks):
                part = next(rows[number % max(1, workers)])
                columns = (part.epochs, part.positions, part.shards, part.ordinals)
                steps[number // chunks].append(np.stack(columns, 1))
            assert all(next(row, None) is None for row in rows)
        return [np.concatenate(step) for step in steps]

    expected = places(0, 1, 0)
    everything = np.concatenate(expected)
    assert len(everything) == last * batch
    for epoch in range(last * batch // sum(counts)):
        samples = everything[everything[:, 0] == epoch][:, 2:]
        assert len(np.unique(samples, axis=0)) == len(samples) == sum(counts)
    combinations = [(world, workers) for world in (1, 2, 3, 4, 6, 8) for workers in (0, 1, 2, 4)]
    for world, workers in combinations:
        for _ in range(stops):
            first = chance.randrange(last)
            got = places(first, world, workers)
            assert all(np.array_equal(a, b) for a, b in zip(got, expected[first:], strict=True))
    print(f"\n{len(combinations)} worlds x workers, {stops} stops each: one order over {counts}")
