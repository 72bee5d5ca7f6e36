"""The settings of supervised training: `maekit evaluate finetune` and `probe`.

Three published schedules (He et al. 2021, appendix A.1, tables 9 to 11): fine-tuning, training from scratch, linear
probing.
"""

from dataclasses import dataclass

from maekit.config.fields import check, config_class, setting
from maekit.config.poolings import CHOICES, check_pool
from maekit.config.pretrain import DataConfig, OptimizerConfig, RunConfig, check_training
from maekit.system.errors import InputError

DEFAULT_FINETUNE_EPOCHS = 100.0
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"
_JUDGED, _IMAGES = "What is judged", "Labelled images"
_TRAINING, _AUGMENTED = "Training", "Augmentation and regularisation"


def parse_blocks(text: str) -> float | None:
    """Parse a number of blocks, or `all`, which is None.

    Raises:
        InputError: it is neither.
    """
    try:
        return None if text == "all" else float(text)
    except ValueError:
        raise InputError(f"`model.blocks` = {text}: must be all, 0, 0.5, or a whole number") from None


@config_class
@dataclass
class ClassifierConfig:
    """The model."""

    # The path of the weights may change on resuming; their contents may not.
    source: str = setting(
        "",
        "A run, a checkpoint, timm:NAME, a file of weights, or the `out` of another fine-tuning.",
        metavar="MODEL",
        free=True,
    )
    name: str | None = setting(
        None,
        "timm's name of the architecture, for a file of weights that does not tell.",
        panel=_JUDGED,
        flag="--model",
    )
    sha256: str | None = setting(None, "Names the weights; found by itself.", only_set=True)
    from_scratch: bool = setting(
        False,
        "For comparison: the same architecture, trained from nothing by its published schedule.",
        panel=_JUDGED,
    )
    pool: str = setting("avg", f"{CHOICES}.", panel=_JUDGED)
    blocks: float | None = setting(
        None,
        "Train the last N blocks only: all, 12, 4, 1, 0.5 (the MLP of the last), 0 (the head).",
        panel=_JUDGED,
        shown="all",
        parse=parse_blocks,
    )
    batch_norm: bool = setting(False, "Normalise features before the head, without affine parameters.", only_set=True)
    drop_path: float = setting(
        0.1,
        "Largest rate of stochastic depth; it grows with the layers from 0.",
        panel=_AUGMENTED,
        at_least=0,
        below=1,
    )


@config_class
@dataclass
class MixConfig:
    """Augmentation of labelled images besides cropping."""

    rand_augment: str = setting(RAND_AUGMENT, "RandAugment as timm writes it, or none.", panel=_AUGMENTED)
    mixup: float = setting(0.8, "α of mixup; 0 is none.", panel=_AUGMENTED, at_least=0)
    cutmix: float = setting(1.0, "α of cutmix; 0 is none.", panel=_AUGMENTED, at_least=0)
    label_smoothing: float = setting(
        0.1, "Share of each target that goes to all classes alike.", panel=_AUGMENTED, at_least=0, below=1
    )
    erase: float = setting(0.25, "Probability that a rectangle is erased.", panel=_AUGMENTED, at_least=0, at_most=1)


@config_class
@dataclass
class SupervisedOptimizer(OptimizerConfig):
    """The optimiser and its schedule."""

    lr: float = setting(1e-3, "Base learning rate, per 256 images.", panel=_TRAINING, shown="as published", above=0)
    min_lr: float = setting(1e-6, "Learning rate at the end, absolute.", only_set=True, at_least=0)
    warmup_epochs: float = setting(
        5.0, "Length of the warm-up; at most a tenth of the run.", panel=_TRAINING, shown="as published", at_least=0
    )
    weight_decay: float = setting(0.05, "On parameters of two or more dimensions.", panel=_TRAINING, at_least=0)
    beta2: float = setting(0.999, "AdamW's β₂.", only_set=True, at_least=0, below=1)
    kind: str = setting("adamw", "adamw or lars.", only_set=True)
    layer_decay: float = setting(
        0.75,
        "Each layer's learning rate is that of the next one times this (AdamW).",
        panel=_TRAINING,
        above=0,
        at_most=1,
    )
    momentum: float = setting(0.9, "Of LARS.", only_set=True, at_least=0, below=1)


@config_class
@dataclass
class FinetuneConfig:
    """A whole run of supervised training."""

    shards: tuple[str, ...] = setting(
        (), "With a .cls member each.", panel=_IMAGES, flag="--train", metavar="SHARDS", free=True
    )
    out: str = setting("", "The directory of this training.", free=True)
    test: tuple[str, ...] = setting((), "Likewise, held out.", panel=_IMAGES, metavar="SHARDS", free=True)
    test_images: int | None = setting(
        None, "At most this many, drawn at random.", panel=_IMAGES, shown="all", free=True, above=0
    )
    epochs: float | None = setting(
        None,
        "Passes over the training images.",
        panel=_TRAINING,
        shown="100; 300 from scratch; 90 to probe",
        above=0,
    )
    steps: int | None = setting(None, "Optimiser steps, instead of epochs.", panel=_TRAINING, above=0)
    batch_size: int = setting(
        1024, "Images per step, over all devices.", panel=_TRAINING, shown="as published", above=0
    )
    seed: int = setting(0, "Of the head, order, crops, and all that is mixed.", at_least=0, below=1 << 63)
    classes: int | None = setting(None, "Of the training set; found by itself.", only_set=True)
    labels_sha256: str | None = setting(
        None, "Names classes and labels of the training set; found by itself.", only_set=True
    )
    model: ClassifierConfig = setting(factory=ClassifierConfig)
    data: DataConfig = setting(factory=lambda: DataConfig(crop_scale=(0.08, 1.0)))
    mix: MixConfig = setting(factory=MixConfig)
    optimizer: SupervisedOptimizer = setting(factory=SupervisedOptimizer)
    run: RunConfig = setting(factory=RunConfig)

    def validate(self) -> None:
        """Check every value that needs no data and no model.

        Raises:
            InputError: names the first impossible value, or two that conflict.
        """
        blocks = self.model.blocks
        if blocks is not None and blocks != 0.5 and not (0 <= blocks < 1e6 and blocks == int(blocks)):
            raise InputError(f"`model.blocks` = {blocks:g}: must be all, 0, 0.5, or a whole number")
        check_training(self)
        if not self.test:
            raise InputError("no test set was given: `test`")
        if not self.model.source:
            raise InputError("no model was given")
        elsewhere = {"mean": "the model's own is taken", "std": "the model's own is taken", "val": "use `test`"}
        elsewhere["val_images"] = "use `test_images`"
        for name, instead in elsewhere.items():
            if getattr(self.data, name) != getattr(DataConfig, name):
                raise InputError(f"data.{name} is not for fine-tuning: {instead}")
        if self.model.from_scratch and blocks is not None:
            raise InputError("`model.from_scratch` trains all blocks; it does not go with `model.blocks`")
        check_pool("model.pool", self.model.pool)
        if self.optimizer.kind not in ("adamw", "lars"):
            raise InputError(f"optimizer.kind = {self.optimizer.kind!r}: must be one of adamw, lars")
        idle = {"adamw": ("momentum", SupervisedOptimizer.momentum), "lars": ("layer_decay", 1.0)}
        name, usual = idle[self.optimizer.kind]
        if getattr(self.optimizer, name) != usual:
            raise InputError(f"optimizer.{name} is not for {self.optimizer.kind}")
        if self.run.pictures_every is not None:
            raise InputError("run.pictures_every is not for fine-tuning: it draws nothing")
        check(self)


def finetuning() -> FinetuneConfig:
    """Return the published fine-tuning recipe of a ViT-B (table 9)."""
    return FinetuneConfig()


def training_from_scratch() -> FinetuneConfig:
    """Return the published recipe of training from scratch (table 11), without its moving average of weights."""
    config = FinetuneConfig(batch_size=4096, epochs=300.0)
    config.model.from_scratch = True
    config.optimizer = SupervisedOptimizer(
        lr=1e-4, min_lr=0.0, warmup_epochs=20.0, weight_decay=0.3, beta2=0.95, layer_decay=1.0
    )
    config.mix.erase = 0.0
    return config


def linear_probing() -> FinetuneConfig:
    """Return the published linear-probing recipe (table 10): LARS, non-affine BatchNorm, only random resized crops."""
    config = FinetuneConfig(batch_size=16384, epochs=90.0)
    config.model.blocks, config.model.batch_norm, config.model.pool, config.model.drop_path = 0, True, "cls", 0.0
    config.mix = MixConfig(rand_augment="none", mixup=0.0, cutmix=0.0, label_smoothing=0.0, erase=0.0)
    config.optimizer = SupervisedOptimizer(
        kind="lars", lr=0.1, min_lr=0.0, warmup_epochs=10.0, weight_decay=0.0, layer_decay=1.0
    )
    return config
