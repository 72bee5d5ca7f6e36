"""Training of the masked autoencoder: the `Task` that `maekit pretrain` passes to the engine."""

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
from maekit.system import files
from maekit.training.crops import Augmentation, CropLoader, WorkerProgress
from maekit.training.data import BatchLayout, Uploader
from maekit.training.image_cache import DecodedSet
from maekit.training.launch import Launch
from maekit.training.optim import make_optimizer
from maekit.training.prepare import (
    open_set,
)
from maekit.training.step import MaskedObjective
from maekit.training.task import Task, changed_setting


class Pretraining(Task):
    """Pre-training of a masked autoencoder.

    Args:
        launch: the run.
        model: the autoencoder, on its device.
    """

    name = "pretrain"
    config: PretrainConfig
    objective: MaskedObjective

    def __init__(self, launch: Launch[PretrainConfig], model: MaskedAutoencoder) -> None:
        config, device = launch.config, launch.device
        self.config, self.model, self.size = config, model, config.model.size
        self._run, self._shards, self._order = launch.run, launch.shards, launch.order
        self._world, self._progress = launch.world, launch.progress
        normalizer = Normalizer(config.data.mean, config.data.std, device, channels=config.model.channels)
        self._masks = config.model.masks_per_image
        self.objective = MaskedObjective(model, normalizer, self._masks)
        self.forward = choose_kernels(model, device, launch.precision)
        self.optimizer = make_optimizer(model, config.optimizer)
        self._shape = MaskShape(config.model.masking, model.grid, config.model.mask_ratio)
        self._tokenizer = launch.world.together(lambda: self._open_tokenizer(device))
        self.upload = Uploader(device, self._tokenizer)
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

    def crops(self, watch: WorkerProgress, decoded: DecodedSet | None) -> CropLoader:
        """Return the loader that turns positions in the order into images."""
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
            masks=self._masks,
            watch=watch,
            decoded=decoded,
        )

    def open_validation(self, division: BatchLayout) -> Callable[[], dict[str, Any]] | None:
        """Return a function that measures the held-out loss, called on all ranks; None without `data.val`."""
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
        """Return a picture of reconstructions; None for tokens, which are not pixels."""
        if self._tokenizer is not None:
            return None
        return draw_samples(self.objective, self._shards, self._prepare, self._shape, seed=self.config.seed)

    def mismatch_message(self, key: str, before: Any, now: Any) -> str:
        """Return the message for a setting that differs from the one the run was started with."""
        if key == "model.tokenizer_sha256" and before and now:
            return (
                f"the tokenizer {self.config.model.tokenizer} is not the one that {self._run.path} was started with; "
                "go on with that one, or start another `out`"
            )
        return changed_setting(
            self._run.path,
            key,
            before,
            now,
            f"(`config={self._run.config_file}` has all of them), or start another `out` from these weights with "
            f"`init_from={self._run.path}`",
        )

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
