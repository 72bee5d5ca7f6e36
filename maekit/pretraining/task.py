"""The masked autoencoder as what is trained: the `Task` that `maekit pretrain` hands to the engine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from maekit.config import PretrainConfig
from maekit.images import Pixels, Preprocess
from maekit.mae.autoencoder import MaskedAutoencoder
from maekit.mae.encoder import timm_arguments
from maekit.mae.kernels import choose_kernels
from maekit.mae.mask_shapes import MaskShape
from maekit.mae.normalize import Normalizer
from maekit.pretrained.files import encoder_bytes
from maekit.pretraining.pictures import draw_samples
from maekit.pretraining.tokenizer import Tokenizer
from maekit.pretraining.validation import Validation
from maekit.runs import RunDirectory
from maekit.shards.order import Order
from maekit.shards.read import ShardSet
from maekit.system import files
from maekit.system.progress import Progress
from maekit.training.crops import Augmentation, CropLoader, Watch
from maekit.training.data import Division, Uploader
from maekit.training.distributed import World
from maekit.training.image_cache import DecodedSet
from maekit.training.optim import Schedule, make_optimizer, make_schedule
from maekit.training.prepare import (
    open_set,
)
from maekit.training.step import MaskedObjective


class Pretraining:
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
        """Return the learning rate of a run of so many steps."""
        config = self.config
        samples = self._shards.samples
        return make_schedule(config.optimizer, batch_size=config.batch_size, samples=samples, steps=steps)

    def crops(self, watch: Watch, decoded: DecodedSet | None) -> CropLoader:
        """Return what makes images of places in the order."""
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
        """Whether so many images may go through the model at a time: any number."""
        return True

    def begin_step(self, done: int) -> None:
        """Do nothing: all random numbers come with the images."""

    def open_validation(self, division: Division) -> Callable[[], dict[str, Any]] | None:
        """Return what measures the loss on held-out images, on all ranks together; None without `data.val`."""
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
        """Return a picture of reconstructions."""
        return draw_samples(self.objective, self._shards, self._prepare, self._shape, seed=self.config.seed)

    @property
    def otherwise(self) -> str:
        """What to do where settings are not those that the run was started with."""
        return (
            f"(--config {self._run.config_file} has all of them), or start another --out from these weights with "
            f"--init-from {self._run.path}"
        )

    def difference(self, key: str, before: Any, now: Any) -> str | None:
        """Return what to say of another tokenizer."""
        if key != "model.tokenizer_sha256" or not before or not now:
            return None
        return (
            f"the tokenizer {self.config.model.tokenizer} is not the one that {self._run.path} was started with; go on "
            "with that one, or start another --out"
        )

    def read_config(self, run: RunDirectory) -> PretrainConfig:
        """Return the settings that a run was started with."""
        return run.config()

    def begin(self) -> None:
        """Write nothing: the settings say all."""

    def is_finished(self) -> bool:
        """Whether the encoder has been written."""
        return self._run.encoder_file.exists()

    def finish(self, steps: int) -> None:
        """Write the encoder."""
        description = {
            "model": self.config.model.name,
            "timm_arguments": timm_arguments(self.config.model),
            "preprocess": self._prepare.to_json(),
            "step": steps,
            "data_digest": self._shards.digest,
        }
        files.write_atomically(self._run.encoder_file, encoder_bytes(self.model.encoder, description))
