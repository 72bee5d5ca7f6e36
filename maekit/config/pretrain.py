"""The settings of pre-training: a dataclass per subject, composed into one.

Defaults are the published recipe (He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners", appendix A.1).
Values come from, later ones overriding earlier ones: defaults, `--config FILE.toml`, options, `--set key=value`.
"""

import math
import re
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

from maekit.config.fields import MOST_IMAGES, MOST_PROCESSES, Config, argument, check, count_or_auto, setting, unlisted
from maekit.config.images import MOST_PIXELS, image_setting, parse_image_size
from maekit.config.settings import load_settings
from maekit.system.errors import InputError

DEFAULT_EPOCHS = 400.0
WINDOW_SHARDS = 16
MOST_STEPS = 10**9
MOST_EPOCHS = 1e6
MOST_WIDTH = 1 << 16
MOST_BLOCKS = 1000
Masking = Literal["random", "block", "grid"]
Device = Literal["auto", "cpu", "cuda"]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_training = partial(setting, panel="Training")
_encoder = partial(setting, panel="Encoder")
_decoder = partial(setting, panel="Decoder")
_masking = partial(setting, panel="Masking")
_target = partial(setting, panel="Target")
_images = partial(setting, panel="Images")
_machine = partial(setting, panel="Machine", free=True)
_output = partial(setting, panel="Output", free=True)


class ModelConfig(Config):
    """The encoder (a timm VisionTransformer by its timm name), the decoder, and the task.

    The name is taken from `init_from` if that names a model; a size of None means the named model's own size.
    """

    name: str | None = _encoder(None, "Encoder, by its timm name.", flag="--model", shown="vit_base_patch16_224")
    image_size: int | tuple[int, int] = _encoder(
        224, "Side of the input in pixels, or HEIGHTxWIDTH.", parse=parse_image_size, above=0, at_most=MOST_PIXELS
    )
    channels: Literal[1, 3] = _encoder(3, "3 for RGB, 1 for grey (the luma).")
    patch_size: int | None = _encoder(
        None, "Side of a patch, in pixels; the model's own by default.", above=0, at_most=MOST_PIXELS
    )
    width: int | None = unlisted(None, "Width of the encoder.", above=0, at_most=MOST_WIDTH)
    depth: int | None = unlisted(None, "Number of its blocks.", above=0, at_most=MOST_BLOCKS)
    heads: int | None = unlisted(None, "Number of its attention heads.", above=0, at_most=MOST_WIDTH)
    class_token: bool | None = _encoder(None, "Whether the encoder has a class token; the model's own way by default.")
    positions: Literal["sincos", "learned"] = _encoder("sincos", "Positions of the encoder: sincos (fixed) or learned.")
    masking: Masking = _masking("random", "Which patches are removed: random, block (BEiT's) or grid.")
    mask_ratio: float = _masking(0.75, "Share of patches removed.", above=0, below=1)
    masks_per_image: int = _masking(
        1, "Masks of each image in a step: one decoding serves them all.", at_least=1, at_most=64
    )
    mask_tokens: Literal["decoder", "encoder"] = _masking(
        "decoder", "Where they stand for removed patches: in the decoder, or already in the encoder (slow)."
    )
    decoder: Literal["self", "cross"] = _decoder(
        "self", "self: blocks of self-attention; cross: of cross-attention to the encoder alone (CrossMAE)."
    )
    decoder_width: int = _decoder(512, "Width.", above=0, at_most=MOST_WIDTH)
    decoder_depth: int = _decoder(8, "Blocks.", above=0, at_most=MOST_BLOCKS)
    decoder_heads: int = _decoder(16, "Attention heads.", above=0, at_most=MOST_WIDTH)
    predict_ratio: float = _decoder(1.0, "Share of the removed patches that are predicted.", above=0, at_most=1)
    target: Literal["norm_pixel", "pixel", "pca", "tokens"] = _target(
        "norm_pixel",
        "What is predicted: norm_pixel (pixels, each patch normalised by its own mean and variance), pixel, pca "
        "(coefficients) or tokens.",
    )
    pca_components: int = _target(
        96, "Coefficients of `target=pca`; their basis is fitted on the shards before the training.", above=0
    )
    # The path of the file may change on resuming; its contents may not.
    tokenizer: str | None = _target(
        None,
        "Of `target=tokens`: an ONNX file, images in, a whole number for each patch out.",
        metavar="FILE.onnx",
        free=True,
    )
    tokenizer_sha256: str | None = unlisted(None, "Digest of the tokenizer; found by itself.")
    vocabulary: int | None = _target(None, "How many different tokens there are.", above=0, at_most=1 << 24)
    init_from: str | None = _encoder(
        None, "Start from timm:NAME (published weights), a run, a file of weights, or transformers' ViTMAE directory."
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


class DataConfig(Config):
    """How samples become training images."""

    image: str | None = image_setting(panel="Images")
    augmentation: Literal["random_resized_crop", "fixed_crop", "none"] = _images(
        "random_resized_crop",
        "random_resized_crop; fixed_crop, of fixed size at a random place; or none: the evaluation's centre crop, "
        "never mirrored.",
    )
    crop_scale: tuple[float, float] = unlisted((0.2, 1.0), "Bounds of a random resized crop's share of the image area.")
    flip: bool = unlisted(True, "Mirror half of the images.")
    color_jitter: float = _images(
        0.0,
        "Change brightness, contrast and saturation by random factors within 1 ± this.",
        shown="0: not at all",
        at_least=0,
        at_most=1,
    )
    mean: tuple[float, float, float] = unlisted(IMAGENET_MEAN, "Per channel, of values in [0, 1].")
    std: tuple[float, float, float] = unlisted(IMAGENET_STD, "Per channel, of values in [0, 1].", above=0)
    window: int = unlisted(WINDOW_SHARDS, "How many shards are mixed with each other in the order of samples.", above=0)
    skip_damaged: bool = _images(False, "Leave damaged shards out.")
    max_bad: float = _images(
        0.01,
        "Stop when a larger share of samples, of at least an epoch or 1,000, has no readable image.",
        free=True,
        at_least=0,
        at_most=1,
    )
    workers: int | None = _machine(
        None,
        "Processes that read and decode.",
        shown="on CUDA one per core, at most 16; on a CPU 1",
        at_least=0,
        at_most=MOST_PROCESSES,
    )
    prefetch: int = unlisted(2, "Steps whose batches are kept ready, at least.", free=True, above=0, at_most=1000)
    cache: Literal["off", "ram"] = _machine("off", "ram: keep the images of a small set decoded in memory; or off.")
    cache_gb: float = _machine(50.0, "Gigabytes that remote shards may take in $MAEKIT_CACHE.", above=0)
    patience: float = unlisted(
        600.0, "Seconds without any progress in reading after which the run stops.", free=True, above=0
    )
    val: tuple[str, ...] = _training(
        (),
        "Held-out shards: at every checkpoint the loss on 2000 of their images, the effective rank of embeddings, and, "
        "where there are .cls members, kNN (data.val_images, run.val_every).",
        free=True,
    )
    val_images: int = unlisted(2000, "At most this many of them, evenly spread.", free=True, above=0)


class OptimizerConfig(Config):
    """AdamW and its schedule: linear warm-up, then half a cosine to `min_lr`, per step."""

    lr: float = _training(1.5e-4, "Base learning rate, per 256 images.", above=0, at_most=1e38)
    min_lr: float = unlisted(0.0, "Learning rate at the end, absolute.", at_least=0)
    warmup_epochs: float = _training(40.0, "Length of the warm-up; at most a tenth of the run.", at_least=0)
    weight_decay: float = unlisted(0.05, "On parameters of two or more dimensions.", at_least=0)
    beta1: float = unlisted(0.9, "AdamW's β₁.", at_least=0, below=1)
    beta2: float = unlisted(0.95, "AdamW's β₂.", at_least=0, below=1)
    clip_grad: float | None = _training(
        None, "Scale longer gradients down to this norm.", shown="none, as published", above=0
    )


class RunConfig(Config):
    """How a run is executed; every setting may change on resuming."""

    device: Device = _machine("auto", "auto, cpu or cuda.")
    precision: Literal["auto", "fp32", "bf16"] = _machine(
        "auto", "auto (bf16 where the hardware has it), fp32 or bf16."
    )
    threads: int | None = unlisted(
        None, "CPU threads of the model; torch's own choice by default.", free=True, above=0, at_most=MOST_PROCESSES
    )
    compile: bool | None = _machine(None, "Compile the step.", shown="on CUDA only")
    micro_batch: int | None = _machine(
        None,
        "Images that go through the model at a time on each device, or auto.",
        shown="auto: as memory allows",
        parse=count_or_auto,
        above=0,
        at_most=MOST_IMAGES,
    )
    checkpoint_every: int | None = _output(
        None, "Steps between checkpoints.", shown="a tenth of the run, at most 1000", above=0
    )
    checkpoint_minutes: float = _output(30.0, "Longest time between checkpoints.", above=0)
    keep_checkpoints: int = _output(2, "How many of the newest are kept.", above=0)
    keep_every: int | None = _output(None, "Also write a checkpoint every N steps, and never delete it.", above=0)
    log_every: int | None = _output(None, "Steps between rows of metrics.", shown="a hundredth, at most 50", above=0)
    pictures_every: int | None = unlisted(
        None,
        "Steps between pictures of reconstructions; at every checkpoint by default, 0 is never.",
        free=True,
        at_least=0,
    )
    val_every: int | None = unlisted(
        None, "Steps between validations; at every checkpoint by default.", free=True, above=0
    )
    max_time: str | None = _output(None, "Save and exit with 75 after a time such as 3h50m; the same command goes on.")
    skip_nonfinite: int = _training(
        0,
        "Leave out up to this many steps, over the whole run, whose gradient is not finite.",
        shown="0: stop",
        free=True,
        at_least=0,
    )
    tensorboard: bool = _output(True, "Write RUN/tensorboard.")


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


class PretrainConfig(Config):
    """A whole pre-training run."""

    # The paths of the shards may change on resuming; their contents may not (the run stores their digest).
    shards: tuple[str, ...] = argument((), "Directories, .tar files, globs, brace patterns or URLs.", free=True)
    out: str = _output("", "The run directory.")
    epochs: float | None = _training(
        None, "Passes over the data.", shown=f"{DEFAULT_EPOCHS:g}", above=0, at_most=MOST_EPOCHS
    )
    steps: int | None = _training(None, "Optimiser steps, instead of epochs.", above=0, at_most=MOST_STEPS)
    batch_size: int = _training(256, "Images per step, over all devices.", above=0, at_most=MOST_IMAGES)
    seed: int = _training(0, "Of weights, order, crops, flips and masks.", at_least=0, below=1 << 63)
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
