"""Training from end to end against its own limit: the loader alone, the step alone, and the run, in one go.

    python bench/pretrain.py SHARDS [--model vit_small_patch16_224] [--batch-size 64] [--steps 12] [--json FILE]
                             [--set model.image_size=64 ...] [--device cpu|cuda] [--seconds 8]

On a CPU, loader and step share the cores, so the limit is 1 / (1/loader + 1/step), the loader on all cores; on a GPU
it is the slower of the two. Also: what a checkpoint and a row of metrics cost the loop, and from start to the loop.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from maekit.config import PretrainConfig
from maekit.config.settings import parse_setting, set_value
from maekit.pretraining import pretrain as training
from maekit.runs import RunDirectory
from maekit.system.machine import cores
from maekit.system.progress import Silent
from maekit.training.engine import Engine
from maekit.training.loop import Loop
from maekit.training.step import Step


class Clock:
    """Notes when each step of a run began and ended, and each checkpoint."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []
        self.saves: list[float] = []
        self.logs: list[float] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards")
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--seconds", type=float, default=8.0, help="of the loader alone (default: %(default)s)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = PretrainConfig((options.shards,), str(Path(folder) / "run"), steps=options.steps)
        config.batch_size, config.model.name = options.batch_size, options.model
        config.run.device, config.run.precision = options.device, options.precision
        # Each row waits for the device.
        config.run.pictures_every, config.run.log_every = 0, 1 if options.device == "cpu" else options.steps
        config.run.checkpoint_every = max(1, options.steps // 2)
        for text in options.settings:
            set_value(config, *parse_setting(text))
        clock, limits = Clock(), {}
        _measure(clock, limits, options.seconds)
        began = time.perf_counter()
        training.pretrain(config, Silent())
        rows = RunDirectory(Path(config.out)).metrics()
    first = limits["ready"] - began
    # The first steps warm up; the steps between two rows are timed from the end of one to the end of the next.
    ends = [end for _, end in clock.steps][2:]
    whole = (len(ends) - 1) * config.batch_size / (ends[-1] - ends[0])
    on_cpu = limits["device"] == "cpu"
    loader, step = limits["loader"], limits["step"]
    limit = 1 / (1 / loader + 1 / step) if on_cpu else min(loader, step)
    figures = {
        "loader_alone": loader,
        "step_alone": step,
        "limit": limit,
        "end_to_end": whole,
        "share": whole / limit,
        "data_wait": sum(row["data_wait"] for row in rows) / len(rows),
        "checkpoint_seconds": max(clock.saves),
        "copy_seconds": limits["copy"],
        "row_seconds": sorted(clock.logs)[len(clock.logs) // 2],
        "start_to_loop_seconds": first,
        "cores": cores(),
        "batch_size": config.batch_size,
        "model": config.model.name,
        "device": limits["device"],
    }
    for name, value in figures.items():
        print(f"{name:<28} {value:12.4g}" if isinstance(value, float) else f"{name:<28} {value:>12}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def _measure(clock: Clock, limits: dict, seconds: float) -> None:
    """Watch the run from within: time its steps, and before its loop measure its own loader and step alone."""
    take, run, save, log = Step.__call__, Loop.run, Engine._save, Engine._log

    def timed_step(self, micro_batches, done):
        before = time.perf_counter()
        result = take(self, micro_batches, done)  # on CUDA up to two steps ahead of the device, as always
        clock.steps.append((before, time.perf_counter()))
        return result

    def timed_run(self, first, last):
        limits["device"], limits["ready"] = self.device.type, time.perf_counter()
        _measure_alone(self, limits, seconds)
        Step.__call__ = timed_step
        yield from run(self, first, last)

    def timed(function, seconds):
        def called(*arguments):
            before = time.perf_counter()
            function(*arguments)
            seconds.append(time.perf_counter() - before)

        return called

    Loop.run, Engine._save, Engine._log = timed_run, timed(save, clock.saves), timed(log, clock.logs)


def _measure_alone(loop: Loop, limits: dict, seconds: float) -> None:
    """Measure the loader with nothing beside it, and the step on one batch over and over."""
    from loader import maekit_batches

    batches = loop.batches
    kept = batches.next()
    batches._ready = [chunk for chunks in kept for chunk in chunks]  # given back: the run begins with it
    side = kept[0][0].images.shape[2]
    with torch.no_grad():
        weights = {name: value.clone() for name, value in loop.step._wrapped.state_dict().items()}
    rates = []
    on_cuda = loop.device.type == "cuda"
    steps = 8 if on_cuda else 1  # queued one behind the other, as the run queues them
    for _ in range(4):
        before = time.perf_counter()
        for _ in range(steps):
            loop.step(kept, 0)  # the first step's learning rate is 0
        if on_cuda:
            torch.cuda.synchronize()
        rates.append(steps * loop.batch_size / (time.perf_counter() - before))
    limits["step"] = sorted(rates[1:])[1]
    before = time.perf_counter()
    {name: value.detach().to("cpu", copy=True) for name, value in loop.step._wrapped.state_dict().items()}
    # Weights and both moments.
    limits["copy"] = 3 * (time.perf_counter() - before)
    loop.step._wrapped.load_state_dict(weights)
    loop.step._optimizer.state.clear()
    loader = maekit_batches(batches._shards, side, cores())
    next(loader)
    count, before = 0, time.perf_counter()
    while time.perf_counter() - before < seconds:
        next(loader)
        count += 64
    limits["loader"] = count / (time.perf_counter() - before)
    loader.close()


if __name__ == "__main__":
    main()
