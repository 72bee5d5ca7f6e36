"""The configuration of pre-training: a dataclass per subject, composed into one.

Defaults are the published recipe (He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners", appendix A.1).
Values come, each over the one before: defaults, `--config FILE.toml`, options, `--set key=value`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from maekit.config.settings import load_settings
from maekit.system.errors import InputError

# Imports nothing but the standard library: `maekit --help` shows these defaults and must not wait for NumPy.
DEFAULT_EPOCHS, DEFAULT_FINETUNE_EPOCHS = 400.0, 100.0
WINDOW_SHARDS = 16
MASKINGS = ("random", "block", "grid")
_MOST_MASKS = 64
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _free(default: Any) -> Any:
    """Return a field that may change when a run is resumed: it does not touch what is trained."""
    return field(default=default, metadata={"free": True})


@dataclass
class ModelConfig:
    """The encoder (a timm VisionTransformer by its timm name), the decoder, and the task.

    Attributes:
        name: timm name of the encoder; taken from `init_from` where that names one.
        image_size: side of the square input in pixels, or [height, width].
        channels: 3 for RGB, or 1 for its luma, which of a grey image is the image itself.
        patch_size: side of a patch, in pixels; None is the named model's own.
        width: the encoder's width; None is the named model's own.
        depth: its number of blocks, likewise.
        heads: its number of attention heads, likewise.
        class_token: whether the encoder has one; None is the named model's own way.
        positions: the encoder's: `sincos` (fixed) or `learned`.
        masking: which patches are removed: `random`, `block` (BEiT's) or `grid`.
        mask_ratio: share of patches removed, in (0, 1).
        masks_per_image: so many masks of each image are trained on in the same step.
        mask_tokens: where they stand for the removed patches: in the `decoder`, or already in the `encoder`.
        decoder: `self`, blocks of self-attention, or `cross`, blocks of cross-attention to the encoder's (CrossMAE).
        decoder_width: width of the decoder.
        decoder_depth: its number of blocks.
        decoder_heads: its number of attention heads.
        predict_ratio: share of the removed patches that are predicted, in (0, 1].
        target: what is predicted: `norm_pixel` (pixels, normalised by each patch's own mean and variance), `pixel`,
            `pca` (coefficients) or `tokens`.
        pca_components: how many coefficients; their basis is fitted on the shards before the training.
        tokenizer: ONNX file that turns an image into a grid of whole numbers, one for each patch.
        tokenizer_sha256: its digest; found by itself.
        vocabulary: how many different numbers it gives.
        init_from: `timm:NAME`, a run, or a weights file to start the encoder from.
    """

    name: str | None = None
    image_size: int | tuple[int, int] = 224
    channels: int = 3
    patch_size: int | None = None
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    class_token: bool | None = None
    positions: str = "sincos"
    masking: str = "random"
    mask_ratio: float = 0.75
    masks_per_image: int = 1
    mask_tokens: str = "decoder"
    decoder: str = "self"
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    predict_ratio: float = 1.0
    target: str = "norm_pixel"
    pca_components: int = 96
    # The file may move; what is in it may not change.
    tokenizer: str | None = _free(None)
    tokenizer_sha256: str | None = None
    vocabulary: int | None = None
    init_from: str | None = None

    @property
    def size(self) -> tuple[int, int]:
        """The input's (height, width), in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    def validate(self) -> None:
        """Check what needs no model.

        Raises:
            InputError: names the first impossible value.
        """
        _check_choices(
            ("model.positions", self.positions, ("sincos", "learned")),
            ("model.masking", self.masking, MASKINGS),
            ("model.mask_tokens", self.mask_tokens, ("decoder", "encoder")),
            ("model.decoder", self.decoder, ("self", "cross")),
            ("model.target", self.target, ("norm_pixel", "pixel", "pca", "tokens")),
        )
        if self.channels not in (1, 3):
            raise InputError(f"model.channels = {self.channels}: must be 1 or 3")
        if not 0 < self.mask_ratio < 1:
            raise InputError(f"model.mask_ratio = {self.mask_ratio}: must lie between 0 and 1")
        if self.masks_per_image > _MOST_MASKS:
            raise InputError(f"model.masks_per_image = {self.masks_per_image}: must be at most {_MOST_MASKS}")
        if not 0 < self.predict_ratio <= 1:
            raise InputError(f"model.predict_ratio = {self.predict_ratio}: must be greater than 0, and at most 1")
        if self.mask_tokens == "encoder" and self.decoder == "cross":
            raise InputError("model.mask_tokens = 'encoder' leaves a decoder of cross-attention no patch to read from")
        if self.target == "tokens" and (self.tokenizer is None or self.vocabulary is None):
            raise InputError("model.target = 'tokens' needs --tokenizer FILE.onnx and --vocabulary COUNT")
        if self.target != "pca" and self.pca_components != ModelConfig.pca_components:
            raise InputError("--pca-components is for --target pca")
        if self.target != "tokens" and (self.tokenizer is not None or self.vocabulary is not None):
            raise InputError("--tokenizer and --vocabulary are for --target tokens")


@dataclass
class DataConfig:
    """How samples become training images.

    Attributes:
        augmentation: `random_resized_crop`; `fixed_crop`, of fixed size at a random place; or `none`, the evaluation's
            centre crop, never mirrored.
        crop_scale: bounds of a random resized crop's share of the image area.
        flip: mirror half of the images.
        color_jitter: brightness, contrast and saturation change by random factors within 1 ± this; 0 is not at all.
        mean: per channel, of values in [0, 1].
        std: per channel, of values in [0, 1].
        window: how many shards are mixed with each other in the order of samples.
        skip_damaged: leave damaged shards out.
        max_bad: largest share of samples without a readable image, of at least an epoch or 1,000, before the run stops.
        workers: processes that read and decode; None is one per CPU core, at most 16.
        prefetch: steps whose batches are kept ready, at least.
        cache: `ram` keeps the images of small sets decoded in memory, `off` decodes them anew each time.
        cache_gb: gigabytes of disk for shards fetched from remote.
        patience: seconds without any progress in reading after which the run stops.
        val: input specs of held-out images, for `val_loss`.
        val_images: at most so many of them, evenly spread.
    """

    augmentation: str = "random_resized_crop"
    crop_scale: tuple[float, float] = (0.2, 1.0)
    flip: bool = True
    color_jitter: float = 0.0
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    window: int = WINDOW_SHARDS
    skip_damaged: bool = False
    max_bad: float = _free(0.01)
    workers: int | None = _free(None)
    prefetch: int = _free(2)
    cache: str = _free("off")
    cache_gb: float = _free(50.0)
    patience: float = _free(600.0)
    val: tuple[str, ...] = _free(())
    val_images: int = _free(2000)


@dataclass
class OptimizerConfig:
    """AdamW and its schedule: linear warm-up, then half a cosine to `min_lr`, per step.

    Attributes:
        lr: base learning rate, per 256 images of batch.
        min_lr: learning rate at the end, absolute.
        warmup_epochs: length of the warm-up; never more than a tenth of the run.
        weight_decay: on every parameter of two or more dimensions.
        beta1: AdamW's β₁.
        beta2: AdamW's β₂.
        clip_grad: largest norm of the gradient; None leaves it as it is, as published.
    """

    lr: float = 1.5e-4
    min_lr: float = 0.0
    warmup_epochs: float = 40.0
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.95
    clip_grad: float | None = None


@dataclass
class RunConfig:
    """How the run goes about it; all of it may change on resuming.

    Attributes:
        device: `auto`, `cpu` or `cuda`.
        precision: `auto` (bf16 where the hardware has it), `fp32` or `bf16`.
        threads: CPU threads of the model; None is torch's own choice.
        compile: compile the step; None is on CUDA only.
        micro_batch: images that go through the model at a time; None is as many as memory allows.
        checkpoint_every: steps from one checkpoint to the next; None is ten of them, at most 1,000 steps apart.
        checkpoint_minutes: longest time from one checkpoint to the next.
        keep_checkpoints: how many of the newest are kept.
        keep_every: the checkpoints of steps that are multiples of it are made, and kept for ever; None is none.
        log_every: steps from one row of metrics to the next; None is a hundred rows, at most 50 steps apart.
        pictures_every: steps from one picture of reconstructions to the next; None is at every checkpoint, 0 is never.
        val_every: steps from one held-out loss to the next; None is at every checkpoint.
        max_time: as in `3h50m`: save and stop after it, as after a signal.
        skip_nonfinite: how many steps may be left out, over the whole run, because their gradient is not finite.
        tensorboard: write RUN/tensorboard.
    """

    device: str = _free("auto")
    precision: str = _free("auto")
    threads: int | None = _free(None)
    compile: bool | None = _free(None)
    micro_batch: int | None = _free(None)
    checkpoint_every: int | None = _free(None)
    checkpoint_minutes: float = _free(30.0)
    keep_checkpoints: int = _free(2)
    keep_every: int | None = _free(None)
    log_every: int | None = _free(None)
    pictures_every: int | None = _free(None)
    val_every: int | None = _free(None)
    max_time: str | None = _free(None)
    skip_nonfinite: int = _free(0)
    tensorboard: bool = _free(True)


class TrainingConfig(Protocol):
    """What every training run has; see `PretrainConfig`."""

    shards: tuple[str, ...]
    out: str
    epochs: float | None
    steps: int | None
    batch_size: int
    seed: int
    data: DataConfig
    run: RunConfig


@dataclass
class PretrainConfig:
    """A whole pre-training run.

    Attributes:
        shards: input specs: directories, tars, globs, brace patterns.
        out: the run directory.
        epochs: passes over the data; 400 where neither is given.
        steps: optimiser steps, instead of epochs.
        batch_size: images per optimiser step, over all devices.
        seed: of weights, order, crops, flips and masks.
    """

    # Where the shards lie may change on resuming; what is in them may not (the run keeps their digest).
    shards: tuple[str, ...] = _free(())
    out: str = _free("")
    epochs: float | None = None
    steps: int | None = None
    batch_size: int = 256
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def validate(self) -> None:
        """Check every value that needs no data and no model.

        Raises:
            InputError: names the first impossible value.
        """
        check_training(self)
        check_positive(
            {
                "model.image_size": min(self.model.size),
                "model.patch_size": self.model.patch_size,
                "model.depth": self.model.depth,
                "model.width": self.model.width,
                "model.heads": self.model.heads,
                "model.masks_per_image": self.model.masks_per_image,
                "model.pca_components": self.model.pca_components,
                "model.vocabulary": self.model.vocabulary,
                "model.decoder_width": self.model.decoder_width,
                "model.decoder_depth": self.model.decoder_depth,
                "model.decoder_heads": self.model.decoder_heads,
                "optimizer.lr": self.optimizer.lr,
                "optimizer.clip_grad": self.optimizer.clip_grad,
            }
        )
        check_not_negative(
            {
                "optimizer.min_lr": self.optimizer.min_lr,
                "optimizer.warmup_epochs": self.optimizer.warmup_epochs,
                "optimizer.weight_decay": self.optimizer.weight_decay,
            }
        )
        self.model.validate()
        for key, value in {"optimizer.beta1": self.optimizer.beta1, "optimizer.beta2": self.optimizer.beta2}.items():
            if not 0 <= value < 1:
                raise InputError(f"{key} = {value}: must lie in [0, 1)")


def check_training(config: TrainingConfig) -> None:
    """Check what every training run has.

    Raises:
        InputError: names the first impossible value.
    """
    if not config.shards:
        raise InputError("no shards were given")
    if not config.out:
        raise InputError("no run directory was given (--out RUN)")
    if config.epochs is not None and config.steps is not None:
        raise InputError(f"epochs = {config.epochs:g} and steps = {config.steps} were both given; give one of them")
    data, run = config.data, config.run
    check_positive(
        {
            "epochs": config.epochs,
            "steps": config.steps,
            "batch_size": config.batch_size,
            "data.window": data.window,
            "data.prefetch": data.prefetch,
            "data.cache_gb": data.cache_gb,
            "data.patience": data.patience,
            "data.val_images": data.val_images,
            "run.threads": run.threads,
            "run.micro_batch": run.micro_batch,
            "run.checkpoint_every": run.checkpoint_every,
            "run.checkpoint_minutes": run.checkpoint_minutes,
            "run.keep_every": run.keep_every,
            "run.val_every": run.val_every,
            "run.keep_checkpoints": run.keep_checkpoints,
            "run.log_every": run.log_every,
        }
    )
    check_not_negative(
        {
            "seed": config.seed,
            "data.workers": data.workers,
            "data.max_bad": data.max_bad,
            "run.pictures_every": run.pictures_every,
            "run.skip_nonfinite": run.skip_nonfinite,
        }
    )
    if data.max_bad > 1:
        raise InputError(f"data.max_bad = {data.max_bad}: must be a share, at most 1")
    if config.epochs is not None and not math.isfinite(config.epochs):
        raise InputError(f"epochs = {config.epochs}: must be finite")
    if config.seed >= 1 << 63:
        raise InputError(f"seed = {config.seed}: must be below 2^63")
    low, high = data.crop_scale
    if not 0 < low <= high <= 1:
        raise InputError(f"data.crop_scale = {[low, high]}: must be two numbers with 0 < low <= high <= 1")
    if data.augmentation != "random_resized_crop" and data.crop_scale != DataConfig.crop_scale:
        raise InputError(f"data.crop_scale is for random resized crops, not for {data.augmentation!r}")
    if any(not value > 0 for value in data.std):
        raise InputError(f"data.std = {list(data.std)}: must be greater than 0")
    if not 0 <= data.color_jitter <= 1:
        raise InputError(f"data.color_jitter = {data.color_jitter}: must lie in [0, 1]")
    _check_choices(
        ("data.augmentation", data.augmentation, ("random_resized_crop", "fixed_crop", "none")),
        ("run.device", run.device, ("auto", "cpu", "cuda")),
        ("run.precision", run.precision, ("auto", "fp32", "bf16")),
        ("data.cache", data.cache, ("off", "ram")),
    )
    if run.max_time is not None:
        parse_duration(run.max_time)


def total_steps(config: TrainingConfig, samples: int) -> int:
    """Return the optimiser steps of the run: as given, or ceil(epochs · N / batch)."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    return math.ceil(config.epochs * samples / config.batch_size)


def check_positive(settings: Mapping[str, float | None]) -> None:
    """Refuse a setting that is given and not greater than 0.

    Raises:
        InputError: names it.
    """
    for key, value in settings.items():
        if value is not None and not value > 0:
            raise InputError(f"{key} = {value}: must be greater than 0")


def check_not_negative(settings: Mapping[str, float | None]) -> None:
    """Refuse a setting that is given and negative.

    Raises:
        InputError: names it.
    """
    for key, value in settings.items():
        if value is not None and not value >= 0:
            raise InputError(f"{key} = {value}: must not be negative")


def _check_choices(*settings: tuple[str, str, tuple[str, ...]]) -> None:
    for key, choice, allowed in settings:
        if choice not in allowed:
            raise InputError(f"{key} = {choice!r}: must be one of {', '.join(allowed)}")


def parse_duration(text: str) -> float:
    """Return the seconds of a time span such as `3h50m`, `90s` or `1d12h`.

    Raises:
        InputError: it is none.
    """
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.strip())
    if not match or not any(match.groups()):
        raise InputError(f"run.max_time = {text!r}: must be a time span such as 3h50m, 90s or 1d12h")
    seconds = sum(int(part or 0) * unit for part, unit in zip(match.groups(), (86400, 3600, 60, 1), strict=True))
    if not seconds:
        raise InputError(f"run.max_time = {text!r}: must be greater than 0")
    return float(seconds)


def load_config(path: Path) -> PretrainConfig:
    """Return the config of a pre-training run that `dump_toml` wrote."""
    return load_settings(PretrainConfig(), path)
