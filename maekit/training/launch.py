"""The entry to any training: join the other processes, index the shards, own the run directory, and train.

Each training command runs it as:

    with launched(config, run, progress, resolve) as launch:
        task = ...                          # built on launch.device, from launch.shards
        newest = launch.own()
        finished = launch.train(task, newest)
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from maekit.config import TrainingConfig
from maekit.mae.device import choose_device, device_errors
from maekit.runs import Checkpoint, RunDirectory
from maekit.shards.order import SampleOrder
from maekit.shards.read import ShardSet
from maekit.system import files, locks
from maekit.system.progress import Progress
from maekit.system.signals import stop_on_signal
from maekit.training import distributed
from maekit.training.distributed import DistributedContext
from maekit.training.engine import Engine, Finished
from maekit.training.prepare import (
    choose_precision,
    index_shards,
    newest_checkpoint,
    refuse_different_data,
    refuse_indivisible,
)
from maekit.training.stop import Stop
from maekit.training.task import Task

Config = TypeVar("Config", bound=TrainingConfig)


@dataclass
class Launch(Generic[Config]):
    """One process of a run, ready to train.

    Attributes:
        config: settings of the run, resolved, the same in all processes.
        run: the run directory.
        device: device that this process trains on.
        precision: `fp32` or `bf16`.
        shards: the training set.
        order: order of its samples.
        world: the processes of the run.
        stop: decides when to stop.
        progress: receives progress updates.
        stack: holds the lock of the run directory.
    """

    config: Config
    run: RunDirectory
    device: torch.device
    precision: str
    shards: ShardSet
    order: SampleOrder
    world: DistributedContext
    stop: Stop
    progress: Progress
    stack: ExitStack

    def own(self) -> Checkpoint | None:
        """Lock the run directory; return the newest valid checkpoint on the main process.

        Raises:
            InputError: another run holds the lock, or there are checkpoints and none is valid.
        """
        self.world.on_main(lambda: self.stack.enter_context(locks.sole_owner(self.run.path)))
        # Looked up under the lock: a previous process may just have saved its last checkpoint.
        return self.world.on_main(lambda: newest_checkpoint(self.run, self.progress))

    def train(self, task: Task, newest: Checkpoint | None) -> Finished:
        """Resume from a checkpoint, or start; see `Engine.go`."""
        engine = Engine(
            task=task,
            run=self.run,
            shards=self.shards,
            order=self.order,
            device=self.device,
            world=self.world,
            progress=self.progress,
            stop=self.stop,
        )
        return engine.go(newest)


@contextlib.contextmanager
def launched(
    config: Config, run: RunDirectory, progress: Progress, resolve: Callable[[], None]
) -> Iterator[Launch[Config]]:
    """Join the other processes and prepare what every training needs; inside the context, signals stop the run.

    Args:
        config: the settings, already validated.
        run: the run directory.
        progress: receives progress updates.
        resolve: called on the main process; fills in what the config leaves open, and refuses a directory that holds
            something else.

    Raises:
        InputError: the device does not exist, the data cannot be trained on, or the batch does not divide.
        Stopped: a signal came before there was anything to save.
        MaekitError: the other processes cannot be joined, or the device failed.
    """
    files.require_utf8(run.path)
    stop = Stop(config.run.max_time)
    kind = choose_device(config.run.device)
    with stop_on_signal(stop.heed) as stop.received_signal, device_errors(), distributed.join(kind) as world:
        device = torch.device(kind, world.local_rank) if kind == "cuda" else torch.device(kind)
        world.on_main(lambda: refuse_indivisible(config, world))
        world.on_main(resolve)
        config = world.share(config)
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        precision = choose_precision(config, device, world, progress)
        shards = world.in_turn(lambda: index_shards(config, world, progress))
        refuse_different_data(shards, world)
        order = SampleOrder(shards.counts, seed=config.seed, digest=shards.digest, window=config.data.window)
        with ExitStack() as stack:
            yield Launch(
                config=config,
                run=run,
                device=device,
                precision=precision,
                shards=shards,
                order=order,
                world=world,
                stop=stop,
                progress=progress,
                stack=stack,
            )
