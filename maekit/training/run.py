"""`maekit pretrain`: from a config to a run directory, and on from where it was killed.

The order of things: check the config -> join the other processes -> resolve the model -> index the shards -> build the
model -> own the directory -> find what to resume, or start from weights -> the engine, which compares with what is
there, writes the config, loops, and has the encoder written.
"""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from maekit import files
from maekit.config import DEFAULT_EPOCHS, PretrainConfig
from maekit.images import Pixels, Preprocess
from maekit.mae.autoencoder import MaskedAutoencoder, build_autoencoder
from maekit.mae.encoder import timm_arguments
from maekit.mae.mask_shapes import MaskShape
from maekit.mae.normalize import Normalizer
from maekit.mae.weights import encoder_bytes
from maekit.progress import Progress, Silent
from maekit.runs import RunDirectory
from maekit.shards.order import Order
from maekit.shards.read import ShardSet
from maekit.training.crops import Augmentation, CropLoader, Watch
from maekit.training.data import Division, Uploader
from maekit.training.distributed import World
from maekit.training.engine import Engine, Finished
from maekit.training.kernels import choose_kernels
from maekit.training.optim import Schedule, make_optimizer, make_schedule
from maekit.training.pictures import draw_samples
from maekit.training.prepare import (
    choose_precision,
    index_shards,
    newest_checkpoint,
    open_set,
    refuse_different_data,
    refuse_indivisible,
    resolve,
    start_from,
)
from maekit.training.process import started
from maekit.training.ram import DecodedSet
from maekit.training.step import MaskedObjective
from maekit.training.tokenizer import Tokenizer
from maekit.training.validation import Validation


@dataclass(frozen=True)
class PretrainResult:
    """What a finished run amounts to; `--json` prints it.

    Attributes:
        out: the run directory.
        steps: optimiser steps done.
        samples: images trained on, repeats counted.
        loss: mean loss over the last logged steps; None where no row of metrics is left.
        val_loss: the last loss on held-out images; None without `--val`.
        images_per_second: over this process's part of the run, on all ranks together.
        data_wait: share of this process's time spent waiting for data.
        bad: samples replaced, over the whole run.
        skipped: steps left out because their gradient was not finite, over the whole run.
        resumed_from: the step that this process went on from; 0 for a fresh start.
        already_finished: whether there was nothing left to do.
    """

    out: str
    steps: int
    samples: int
    loss: float | None
    val_loss: float | None
    images_per_second: float
    data_wait: float
    bad: int
    skipped: int
    resumed_from: int
    already_finished: bool = False


def pretrain(config: PretrainConfig, progress: Progress | None = None) -> PretrainResult:
    """Pre-train a masked autoencoder; called again with the same config, go on or say that it is finished.

    In several processes (`torchrun`), each calls this with the same config and all return the same.

    Raises:
        InputError: bad usage, damaged or missing data, or a directory of another run; found before any step.
        Stopped: SIGTERM or SIGINT came to any of the processes, or the time is over; everything is saved.
        ElsewhereError: another process of the run failed or was stopped, and raises the error itself.
        MaekitError: failed while working.
    """
    progress = progress or Silent()
    config = copy.deepcopy(config)
    if config.epochs is None and config.steps is None:
        config.epochs = DEFAULT_EPOCHS
    config.validate()
    run = RunDirectory(Path(config.out))
    files.require_utf8(run.path)
    with started(config) as process, ExitStack() as stack:
        world, device = process.world, process.device
        world.on_main(lambda: refuse_indivisible(config, world))
        world.on_main(lambda: resolve(config, run))
        config = world.share(config)
        precision = choose_precision(config, device, world, progress)
        shards = world.in_turn(lambda: index_shards(config, world, progress))
        refuse_different_data(shards, world)
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        model = world.together(lambda: build_autoencoder(config.model, seed=config.seed))
        world.on_main(lambda: stack.enter_context(files.sole_owner(run.path)))

        # Asked inside the lock: a former process may just have saved its last checkpoint.
        newest = world.on_main(lambda: newest_checkpoint(run, progress))
        # Of a checkpoint the main process alone knows, and all must come to the same exchanges.
        world.on_main(lambda: None if newest else start_from(config, model, shards, progress))
        order = Order(shards.counts, seed=config.seed, digest=shards.digest, window=config.data.window)
        task = _Pretraining(config, run, shards, order, model.to(device), precision, world, progress)
        finished = Engine(task, run, shards, order, device, world, progress, process.stop).go(newest)
        result: PretrainResult = world.share(_result(config, finished))
        return result


class _Pretraining:
    """The masked autoencoder as what is trained; see `maekit.training.engine.Task`."""

    name = "pretrain"

    def __init__(
        self,
        config: PretrainConfig,
        run: RunDirectory,
        shards: ShardSet,
        order: Order,
        model: MaskedAutoencoder,
        precision: str,
        world: World,
        progress: Progress,
    ) -> None:
        self.config, self.model, self.size = config, model, config.model.size
        self._run, self._shards, self._order, self._world, self._progress = run, shards, order, world, progress
        device = next(model.parameters()).device
        normalizer = Normalizer(config.data.mean, config.data.std, device, channels=config.model.channels)
        self.objective = MaskedObjective(model, normalizer)
        self.forward = choose_kernels(model, device, precision)
        self.optimizer: torch.optim.Optimizer = make_optimizer(model, config.optimizer)
        self.masks, self.clip_grad = config.model.masks_per_image, config.optimizer.clip_grad
        self._shape = MaskShape(config.model.masking, model.grid, config.model.mask_ratio)
        self._tokenizer = world.together(lambda: self._open_tokenizer(device))
        self.upload = Uploader(device, self._tokenizer)
        self.pictures = self._tokenizer is None  # tokens are no pixels
        self._prepare = Preprocess.for_size(self.size, config.data.mean, config.data.std)

    def _open_tokenizer(self, device: torch.device) -> Tokenizer | None:
        model = self.config.model
        if model.tokenizer is None or model.vocabulary is None:
            return None
        return Tokenizer(
            Path(model.tokenizer),
            size=self.size,
            grid=self.model.grid,
            vocabulary=model.vocabulary,
            device=device,
            threads=torch.get_num_threads(),
        )

    def schedule(self, steps: int) -> Schedule:
        config = self.config
        samples = self._shards.samples
        return make_schedule(config.optimizer, batch_size=config.batch_size, samples=samples, steps=steps)

    def crops(self, watch: Watch, decoded: DecodedSet | None) -> CropLoader:
        data = self.config.data
        return CropLoader(
            self._shards,
            self._order,
            Augmentation(
                self.size,
                self._prepare.resize,
                self.config.seed,
                data.augmentation,
                data.crop_scale,
                data.flip,
                data.color_jitter,
            ),
            self._shape,
            masks=self.masks,
            watch=watch,
            decoded=decoded,
        )

    def fits(self, count: int) -> bool:
        return True

    def begin_step(self, done: int) -> None:
        pass  # all random numbers come with the images

    def open_validation(self, division: Division) -> Callable[[], dict[str, Any]] | None:
        data = self.config.data
        if not data.val:
            return None
        shards = self._world.in_turn(lambda: open_set(self.config, data.val, self._progress, "index held-out shards"))
        validation = Validation(
            shards,
            images=data.val_images,
            prepare=self._prepare,
            batch_size=min(division.micro_batch, 64),
            threads=self._world.cores,
            seed=self.config.seed,
            world=self._world,
            shape=self._shape,
            tokenizer=self._tokenizer,
        )
        return lambda: validation.measure(self.model, self.objective.normalizer, self.forward)

    def draw(self) -> Pixels | None:
        return draw_samples(self.objective, self._shards, self._prepare, self._shape, seed=self.config.seed)

    @property
    def otherwise(self) -> str:
        return (
            f"(--config {self._run.config_file} has all of them), or start another --out from these weights with "
            f"--init-from {self._run.path}"
        )

    def difference(self, key: str, before: Any, now: Any) -> str | None:
        if key != "model.tokenizer_sha256" or not before or not now:
            return None
        return (
            f"the tokenizer {self.config.model.tokenizer} is not the one that {self._run.path} was started with; go on "
            "with that one, or start another --out"
        )

    def read_config(self, run: RunDirectory) -> PretrainConfig:
        return run.config()

    def begin(self) -> None:
        pass  # the settings say all

    def is_finished(self) -> bool:
        return self._run.encoder_file.exists()

    def finish(self, steps: int) -> None:
        description = {
            "model": self.config.model.name,
            "timm_arguments": timm_arguments(self.config.model),
            "preprocess": self._prepare.to_json(),
            "step": steps,
            "data_digest": self._shards.digest,
        }
        files.write_atomically(self._run.encoder_file, encoder_bytes(self.model.encoder, description))


def _result(config: PretrainConfig, finished: Finished) -> PretrainResult:
    held_out = [row["val_loss"] for row in finished.rows if "val_loss" in row]
    done, first, tally = finished.steps, finished.resumed_from, finished.tally
    return PretrainResult(
        out=str(Path(config.out)),
        steps=done,
        samples=done * config.batch_size,
        loss=next((row["loss"] for row in reversed(finished.rows) if "loss" in row), None),
        val_loss=held_out[-1] if held_out else None,
        images_per_second=finished.images_per_second(config.batch_size),
        data_wait=round(tally.wait / tally.seconds, 4) if tally.seconds else 0.0,
        bad=tally.bad,
        skipped=tally.skipped,
        resumed_from=first,
        already_finished=finished.already_finished,
    )
