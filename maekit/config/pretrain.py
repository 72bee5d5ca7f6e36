"""The settings of pre-training: a dataclass per subject, composed into one.

Defaults are the published recipe (He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners", appendix A.1).
Values come from, later ones overriding earlier ones: defaults, `--config FILE.toml`, options, `--set key=value`.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from maekit.config.fields import check, config_class, setting
from maekit.config.settings import load_settings
from maekit.system.errors import InputError

DEFAULT_EPOCHS = 400.0
WINDOW_SHARDS = 16
Masking = Literal["random", "block", "grid"]
Device = Literal["auto", "cpu", "cuda"]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_TRAINING, _MODEL, _MACHINE, _OUTPUT = "Training", "Encoder", "Machine", "Output"
_DECODER, _MASKING, _TARGET, _IMAGES = "Decoder", "Masking", "Target", "Images"


def parse_image_size(text: str) -> int | tuple[int, int]:
    """Parse a number of pixels, or HEIGHTxWIDTH.

    Raises:
        InputError: it is neither.
    """
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise InputError(f"`image_size` {text!r}: must be a number of pixels, or two as in 192x256 (height x width)")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def parse_micro_batch(text: str) -> int | None:
    """Parse a number of images, or `auto`, which is None.

    Raises:
        InputError: it is neither.
    """
    if text == "auto":
        return None
    if not text.isdecimal() or not int(text):
        raise InputError(f"`micro_batch` {text!r}: must be a whole number greater than 0, or auto")
    return int(text)


@config_class
@dataclass
class ModelConfig:
    """The encoder (a timm VisionTransformer by its timm name), the decoder, and the task.

    The name is taken from `init_from` if that names a model; a size of None means the named model's own size.
    """

    name: str | None = setting(
        None, "Encoder, by its timm name.", panel=_MODEL, flag="--model", shown="vit_base_patch16_224"
    )
    image_size: int | tuple[int, int] = setting(
        224, "Side of the input in pixels, or HEIGHTxWIDTH.", panel=_MODEL, parse=parse_image_size, above=0
    )
    channels: Literal[1, 3] = setting(3, "3 for RGB, 1 for grey (the luma).", panel=_MODEL)
    patch_size: int | None = setting(
        None, "Side of a patch, in pixels; the model's own by default.", panel=_MODEL, above=0
    )
    width: int | None = setting(None, "Width of the encoder.", only_set=True, above=0)
    depth: int | None = setting(None, "Number of its blocks.", only_set=True, above=0)
    heads: int | None = setting(None, "Number of its attention heads.", only_set=True, above=0)
    class_token: bool | None = setting(
        None, "Whether the encoder has a class token; the model's own way by default.", panel=_MODEL
    )
    positions: Literal["sincos", "learned"] = setting(
        "sincos", "Positions of the encoder: sincos (fixed) or learned.", panel=_MODEL
    )
    masking: Masking = setting("random", "Which patches are removed: random, block (BEiT's) or grid.", panel=_MASKING)
    mask_ratio: float = setting(0.75, "Share of patches removed.", panel=_MASKING, above=0, below=1)
    masks_per_image: int = setting(
        1, "Masks of each image in a step: one decoding serves them all.", panel=_MASKING, at_least=1, at_most=64
    )
    mask_tokens: Literal["decoder", "encoder"] = setting(
        "decoder",
        "Where they stand for removed patches: in the decoder, or already in the encoder (slow).",
        panel=_MASKING,
    )
    decoder: Literal["self", "cross"] = setting(
        "self",
        "self: blocks of self-attention; cross: of cross-attention to the encoder alone (CrossMAE).",
        panel=_DECODER,
    )
    decoder_width: int = setting(512, "Width.", panel=_DECODER, above=0)
    decoder_depth: int = setting(8, "Blocks.", panel=_DECODER, above=0)
    decoder_heads: int = setting(16, "Attention heads.", panel=_DECODER, above=0)
    predict_ratio: float = setting(
        1.0, "Share of the removed patches that are predicted.", panel=_DECODER, above=0, at_most=1
    )
    target: Literal["norm_pixel", "pixel", "pca", "tokens"] = setting(
        "norm_pixel",
        "What is predicted: norm_pixel (pixels, each patch normalised by its own mean and variance), pixel, pca "
        "(coefficients) or tokens.",
        panel=_TARGET,
    )
    pca_components: int = setting(
        96,
        "Coefficients of `target=pca`; their basis is fitted on the shards before the training.",
        panel=_TARGET,
        above=0,
    )
    # The path of the file may change on resuming; its contents may not.
    tokenizer: str | None = setting(
        None,
        "Of `target=tokens`: an ONNX file, images in, a whole number for each patch out.",
        panel=_TARGET,
        metavar="FILE.onnx",
        free=True,
    )
    tokenizer_sha256: str | None = setting(None, "Digest of the tokenizer; found by itself.", only_set=True)
    vocabulary: int | None = setting(None, "How many different tokens there are.", panel=_TARGET, above=0)
    init_from: str | None = setting(
        None,
        "Start from timm:NAME (published weights), a run, a file of weights, or transformers' ViTMAE directory.",
        panel=_MODEL,
    )

    @property
    def size(self) -> tuple[int, int]:
        """The input's (height, width), in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    def validate(self) -> None:
        """Check every value that needs no model.

        Raises:
            InputError: names the first impossible value, or two that conflict.
        """
        check(self, "model.")
        if self.mask_tokens == "encoder" and self.decoder == "cross":
            raise InputError("`model.mask_tokens` = encoder leaves a decoder of cross-attention no patch to read from")
        if self.target == "tokens" and (self.tokenizer is None or self.vocabulary is None):
            raise InputError("`model.target` = tokens needs `model.tokenizer` and `model.vocabulary`")
        if self.target != "pca" and self.pca_components != ModelConfig.pca_components:
            raise InputError("`model.pca_components` is for `model.target=pca`")
        if self.target != "tokens" and (self.tokenizer is not None or self.vocabulary is not None):
            raise InputError("`model.tokenizer` and `model.vocabulary` are for `model.target=tokens`")


@config_class
@dataclass
class DataConfig:
    """How samples become training images."""

    augmentation: Literal["random_resized_crop", "fixed_crop", "none"] = setting(
        "random_resized_crop",
        "random_resized_crop; fixed_crop, of fixed size at a random place; or none: the evaluation's centre crop, "
        "never mirrored.",
        panel=_IMAGES,
    )
    crop_scale: tuple[float, float] = setting(
        (0.2, 1.0), "Bounds of a random resized crop's share of the image area.", only_set=True
    )
    flip: bool = setting(True, "Mirror half of the images.", only_set=True)
    color_jitter: float = setting(
        0.0,
        "Change brightness, contrast and saturation by random factors within 1 ± this.",
        panel=_IMAGES,
        shown="0: not at all",
        at_least=0,
        at_most=1,
    )
    mean: tuple[float, float, float] = setting(IMAGENET_MEAN, "Per channel, of values in [0, 1].", only_set=True)
    std: tuple[float, float, float] = setting(IMAGENET_STD, "Per channel, of values in [0, 1].", only_set=True, above=0)
    window: int = setting(
        WINDOW_SHARDS, "How many shards are mixed with each other in the order of samples.", only_set=True, above=0
    )
    skip_damaged: bool = setting(False, "Leave damaged shards out.", panel=_IMAGES)
    max_bad: float = setting(
        0.01,
        "Stop when a larger share of samples, of at least an epoch or 1,000, has no readable image.",
        panel=_IMAGES,
        free=True,
        at_least=0,
        at_most=1,
    )
    workers: int | None = setting(
        None,
        "Processes that read and decode.",
        panel=_MACHINE,
        shown="on CUDA one per core, at most 16; on a CPU 1",
        free=True,
        at_least=0,
    )
    prefetch: int = setting(2, "Steps whose batches are kept ready, at least.", only_set=True, free=True, above=0)
    cache: Literal["off", "ram"] = setting(
        "off",
        "ram: keep the images of a small set decoded in memory; or off.",
        panel=_MACHINE,
        free=True,
    )
    cache_gb: float = setting(
        50.0, "Gigabytes that remote shards may take in $MAEKIT_CACHE.", panel=_MACHINE, free=True, above=0
    )
    patience: float = setting(
        600.0, "Seconds without any progress in reading after which the run stops.", only_set=True, free=True, above=0
    )
    val: tuple[str, ...] = setting(
        (),
        "Held-out shards: the loss on 2000 of their images at every checkpoint (data.val_images, run.val_every).",
        panel=_TRAINING,
        free=True,
    )
    val_images: int = setting(2000, "At most this many of them, evenly spread.", only_set=True, free=True, above=0)


@config_class
@dataclass
class OptimizerConfig:
    """AdamW and its schedule: linear warm-up, then half a cosine to `min_lr`, per step."""

    lr: float = setting(1.5e-4, "Base learning rate, per 256 images.", panel=_TRAINING, above=0)
    min_lr: float = setting(0.0, "Learning rate at the end, absolute.", only_set=True, at_least=0)
    warmup_epochs: float = setting(
        40.0, "Length of the warm-up; at most a tenth of the run.", panel=_TRAINING, at_least=0
    )
    weight_decay: float = setting(0.05, "On parameters of two or more dimensions.", only_set=True, at_least=0)
    beta1: float = setting(0.9, "AdamW's β₁.", only_set=True, at_least=0, below=1)
    beta2: float = setting(0.95, "AdamW's β₂.", only_set=True, at_least=0, below=1)
    clip_grad: float | None = setting(
        None, "Scale longer gradients down to this norm.", panel=_TRAINING, shown="none, as published", above=0
    )


@config_class
@dataclass
class RunConfig:
    """How a run is executed; every setting may change on resuming."""

    device: Device = setting("auto", "auto, cpu or cuda.", panel=_MACHINE, free=True)
    precision: Literal["auto", "fp32", "bf16"] = setting(
        "auto", "auto (bf16 where the hardware has it), fp32 or bf16.", panel=_MACHINE, free=True
    )
    threads: int | None = setting(
        None, "CPU threads of the model; torch's own choice by default.", only_set=True, free=True, above=0
    )
    compile: bool | None = setting(None, "Compile the step.", panel=_MACHINE, shown="on CUDA only", free=True)
    micro_batch: int | None = setting(
        None,
        "Images that go through the model at a time on each device, or auto.",
        panel=_MACHINE,
        shown="auto: as memory allows",
        parse=parse_micro_batch,
        free=True,
        above=0,
    )
    checkpoint_every: int | None = setting(
        None,
        "Steps between checkpoints.",
        panel=_OUTPUT,
        shown="a tenth of the run, at most 1000",
        free=True,
        above=0,
    )
    checkpoint_minutes: float = setting(30.0, "Longest time between checkpoints.", panel=_OUTPUT, free=True, above=0)
    keep_checkpoints: int = setting(2, "How many of the newest are kept.", panel=_OUTPUT, free=True, above=0)
    keep_every: int | None = setting(
        None, "Also write a checkpoint every N steps, and never delete it.", panel=_OUTPUT, free=True, above=0
    )
    log_every: int | None = setting(
        None, "Steps between rows of metrics.", panel=_OUTPUT, shown="a hundredth, at most 50", free=True, above=0
    )
    pictures_every: int | None = setting(
        None,
        "Steps between pictures of reconstructions; at every checkpoint by default, 0 is never.",
        only_set=True,
        free=True,
        at_least=0,
    )
    val_every: int | None = setting(
        None, "Steps between held-out losses; at every checkpoint by default.", only_set=True, free=True, above=0
    )
    max_time: str | None = setting(
        None,
        "Save and exit with 75 after a time such as 3h50m; the same command goes on.",
        panel=_OUTPUT,
        free=True,
    )
    skip_nonfinite: int = setting(
        0,
        "Leave out up to this many steps, over the whole run, whose gradient is not finite.",
        panel=_TRAINING,
        shown="0: stop",
        free=True,
        at_least=0,
    )
    tensorboard: bool = setting(True, "Write RUN/tensorboard.", panel=_OUTPUT, free=True)


class TrainingConfig(Protocol):
    """Settings common to all training runs; see `PretrainConfig`."""

    shards: tuple[str, ...]
    out: str
    epochs: float | None
    steps: int | None
    batch_size: int
    seed: int
    data: DataConfig
    run: RunConfig

    @property
    def optimizer(self) -> OptimizerConfig:
        """The optimiser's settings; a subclass may have more."""


@config_class
@dataclass
class PretrainConfig:
    """A whole pre-training run."""

    # The paths of the shards may change on resuming; their contents may not (the run stores their digest).
    shards: tuple[str, ...] = setting((), "Directories, .tar files, globs, brace patterns or URLs.", free=True)
    out: str = setting("", "The run directory.", panel=_OUTPUT, free=True)
    epochs: float | None = setting(None, "Passes over the data.", panel=_TRAINING, shown=f"{DEFAULT_EPOCHS:g}", above=0)
    steps: int | None = setting(None, "Optimiser steps, instead of epochs.", panel=_TRAINING, above=0)
    batch_size: int = setting(256, "Images per step, over all devices.", panel=_TRAINING, above=0)
    seed: int = setting(0, "Of weights, order, crops, flips and masks.", panel=_TRAINING, at_least=0, below=1 << 63)
    model: ModelConfig = setting(factory=ModelConfig)
    data: DataConfig = setting(factory=DataConfig)
    optimizer: OptimizerConfig = setting(factory=OptimizerConfig)
    run: RunConfig = setting(factory=RunConfig)

    def validate(self) -> None:
        """Check every value that needs no data and no model.

        Raises:
            InputError: names the first impossible value.
        """
        check_training(self)
        self.model.validate()


def check_training(config: TrainingConfig) -> None:
    """Check the settings common to all training runs.

    Raises:
        InputError: names the first impossible value, or two that conflict.
    """
    if not config.shards:
        raise InputError("no shards were given")
    if not config.out:
        raise InputError("no run directory was given: `out`")
    if config.epochs is not None and config.steps is not None:
        raise InputError(f"`epochs` = {config.epochs:g} and `steps` = {config.steps} were both given; give one of them")
    check(config)
    data = config.data
    low, high = data.crop_scale
    if not 0 < low <= high <= 1:
        raise InputError(f"`data.crop_scale` = {[low, high]}: must be two numbers with 0 < low <= high <= 1")
    if data.augmentation != "random_resized_crop" and data.crop_scale != DataConfig.crop_scale:
        raise InputError(f"`data.crop_scale` is for random resized crops, not for {data.augmentation!r}")
    if config.run.max_time is not None:
        parse_duration(config.run.max_time)


def total_steps(config: TrainingConfig, samples: int) -> int:
    """Return the number of optimiser steps of the run: as given, or ceil(epochs · N / batch)."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    return math.ceil(config.epochs * samples / config.batch_size)


def parse_duration(text: str) -> float:
    """Parse a time span such as `3h50m`, `90s` or `1d12h` into seconds.

    Raises:
        InputError: the text is not a time span.
    """
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.strip())
    if not match or not any(match.groups()):
        raise InputError(f"`run.max_time` = {text}: must be a time span such as 3h50m, 90s or 1d12h")
    seconds = sum(int(part or 0) * unit for part, unit in zip(match.groups(), (86400, 3600, 60, 1), strict=True))
    if not seconds:
        raise InputError(f"`run.max_time` = {text}: must be greater than 0")
    return float(seconds)


def load_config(path: Path) -> PretrainConfig:
    """Return the config of a pre-training run that `dump_toml` wrote."""
    return load_settings(PretrainConfig(), path)
