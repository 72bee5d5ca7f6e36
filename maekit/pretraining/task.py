"""Training of the masked autoencoder: the `Task` that `maekit pretrain` passes to the engine."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from maekit.config import PretrainConfig
from maekit.images import Pixels, Preprocess
from maekit.mae.autoencoder import MaskedAutoencoder
from maekit.mae.encoder import timm_arguments
from maekit.mae.kernels import choose_kernels
from maekit.mae.mask_shapes import MaskShape
from maekit.mae.normalize import Normalizer
from maekit.mae.pooling import pooled, tokens_by_layer
from maekit.mae.reconstruction import images_of, reconstruct
from maekit.pretrained.files import encoder_bytes
from maekit.pretraining.tokenizer import Tokenizer
from maekit.pretraining.validation import Validation
from maekit.sheet import sheet
from maekit.system import files
from maekit.system.draws import Purpose, uniform_rows, uniforms
from maekit.system.errors import ImageError
from maekit.training.crops import Augmentation, CropLoader
from maekit.training.data import Uploader
from maekit.training.launch import Launch, open_set
from maekit.training.optim import make_optimizer
from maekit.training.step import MaskedObjective
from maekit.training.task import Task, changed_setting

_PICTURED = 8  # images
_VALIDATION_BATCH = 64  # images per forward pass, at most
_POOL = "avg"  # of held-out embeddings


class Pretraining(Task):
    """Pre-training of a masked autoencoder.

    Args:
        launch: the run.
        model: the autoencoder, on its device.
    """

    name = "pretrain"

    def __init__(self, launch: Launch[PretrainConfig], model: MaskedAutoencoder) -> None:
        config, device, masks = launch.config, launch.device, launch.config.model.masks_per_image
        mean, std = config.data.mean, config.data.std
        self.config, self.model, self._launch, self._shards = config, model, launch, launch.shards
        self._normalizer = Normalizer(mean, std, device, channels=config.model.channels)
        self._shape = MaskShape(config.model.masking, model.grid, config.model.mask_ratio)
        self._prepare = Preprocess.for_size(config.model.size, mean, std)
        self._tokenizer = launch.world.together(self._open_tokenizer)
        self.objective = MaskedObjective(model, self._normalizer, masks)
        self.forward = choose_kernels(model, device, launch.precision)
        self.optimizer = make_optimizer(model, config.optimizer)
        augmentation = Augmentation.of(config, self._prepare)
        self.crops = CropLoader(launch.shards, launch.order, augmentation, self._shape, masks=masks)
        self.upload = Uploader(device, self._tokenizer)

    def _open_tokenizer(self) -> Tokenizer | None:
        model = self.config.model
        if model.tokenizer is None or model.vocabulary is None:
            return None
        return Tokenizer(
            Path(model.tokenizer),
            size=model.size,
            grid=self.model.grid,
            vocabulary=model.vocabulary,
            device=self._launch.device,
            threads=torch.get_num_threads(),
            sha256=model.tokenizer_sha256,
        )

    def open_validation(self, micro_batch: int) -> Callable[[int], dict[str, Any]] | None:
        """Return what measures held-out loss and embeddings, called on all ranks; None without `data.val`."""
        config, launch = self.config, self._launch
        if not config.data.val:
            return None
        shards = launch.world.in_turn(
            lambda: open_set(config, config.data.val, launch.progress, "index held-out shards")
        )
        return Validation(
            launch,
            shards,
            prepare=self._prepare,
            loss=self._held_out_loss,
            embed=self._embed,
            batch_size=min(micro_batch, _VALIDATION_BATCH),
        )

    def _held_out_loss(self, pixels: torch.Tensor, positions: Sequence[int]) -> float:
        """Return the mean loss of images, uint8 `[B, 3, H, W]`; those at the same position have the same mask."""
        draws, seed = self._shape.draws, self.config.seed
        rows = [uniform_rows(1, draws, Purpose.VALIDATION, seed=seed, position=position)[0] for position in positions]
        tokens = None
        if self._tokenizer is not None:
            tokens = self._tokenizer(pixels, torch.zeros(len(pixels), dtype=torch.bool)).to(self._launch.device)
        with torch.no_grad(), self.forward():
            normalized = self._normalizer(pixels.to(self._launch.device))
            return float(self.model(normalized, self._noise(rows), tokens).loss)

    def _embed(self, pixels: torch.Tensor) -> NDArray[np.float32]:
        """Embed images, uint8 `[B, 3, H, W]`, by the mean of their patch tokens: -> `[B, D]`."""
        encoder = self.model.encoder
        with torch.no_grad(), self.forward():
            tokens = tokens_by_layer(encoder, self._normalizer(pixels.to(self._launch.device)), [_POOL])
            return pooled(encoder, tokens, _POOL).float().cpu().numpy()

    def draw(self) -> Pixels | None:
        """Draw masked | reconstruction | original for eight evenly spaced samples, under the same masks every time.

        None for tokens, which are not pixels, and if none of the samples can be read.
        """
        if self._tokenizer is not None:
            return None
        # The picture leaves out unreadable images; training counts them as bad.
        found = self._shards.images(self._shards.spread(_PICTURED), self._prepare)
        images = [image for image in found if not isinstance(image, ImageError)]
        if not images:
            return None
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(self._launch.device)
        originals, seed = self._normalizer(pixels), self.config.seed
        rows = [uniforms(self._shape.draws, Purpose.PICTURE, seed=seed, position=i) for i in range(len(images))]
        self.model.eval()
        shown = reconstruct(self.model, originals, self._noise(rows))
        self.model.train()
        return sheet([images_of(self._normalizer.to_pixels(x)) for x in (shown.masked, shown.overlaid, originals)])

    def _noise(self, rows: list[NDArray[np.float64]]) -> torch.Tensor:
        """Return the noise that selects masks, float32 `[B, N]` on the device, for the numbers drawn for each image."""
        return torch.from_numpy(self._shape.noise(np.stack(rows))).to(self._launch.device)

    def mismatch_message(self, key: str, before: Any, now: Any) -> str:
        """Return the message for a setting that differs from the one the run was started with."""
        run = self._launch.run
        if key == "model.tokenizer_sha256" and before and now:
            return (
                f"the tokenizer {self.config.model.tokenizer} is not the one that {run.path} was started with; "
                "go on with that one, or start another `out`"
            )
        remedy = (
            f"(`config={run.config_file}` has all of them), or start another `out` from these weights with "
            f"`init_from={run.path}`"
        )
        return changed_setting(run.path, key, before, now, remedy)

    def finish(self, steps: int) -> None:
        """Write the encoder."""
        description = {
            "model": self.config.model.name,
            "timm_arguments": timm_arguments(self.config.model),
            "preprocess": self._prepare.to_json(),
            "step": steps,
            "data_digest": self._shards.digest,
        }
        files.write_atomically(self._launch.run.encoder_file, encoder_bytes(self.model.encoder, description))
