"""The settings of supervised training: `maekit evaluate finetune` and `probe`.

Three published schedules (He et al. 2021, appendix A.1, tables 9 to 11): fine-tuning, training from scratch, linear
probing.
"""

from functools import partial

from maekit.config.evaluate import judged, labelled
from maekit.config.fields import MOST_IMAGES, Config, argument, check, setting, unlisted
from maekit.config.poolings import CHOICES, check_pool
from maekit.config.pretrain import MOST_EPOCHS, MOST_STEPS, DataConfig, OptimizerConfig, RunConfig, check_training
from maekit.system.errors import InputError

DEFAULT_FINETUNE_EPOCHS = 100.0
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"
_training = partial(setting, panel="Training")
_augmented = partial(setting, panel="Augmentation and regularisation")


def parse_blocks(text: str) -> float | None:
    """Parse a number of blocks, or `all`, which is None.

    Raises:
        ValueError: it is neither.
    """
    try:
        return None if text == "all" else float(text)
    except ValueError:
        raise ValueError(f"{text}: must be all, 0, 0.5, or a whole number") from None


class ClassifierConfig(Config):
    """The model."""

    # The path of the weights may change on resuming; their contents may not.
    source: str = argument(
        "",
        "A run, a checkpoint, timm:NAME, a file of weights, or the `out` of another fine-tuning.",
        metavar="MODEL",
        free=True,
    )
    name: str | None = judged(
        None, "timm's name of the architecture, for a file of weights that does not tell.", flag="--model"
    )
    sha256: str | None = unlisted(None, "Names the weights; found by itself.")
    from_scratch: bool = judged(
        False, "For comparison: the same architecture, trained from nothing by its published schedule."
    )
    pool: str = judged("avg", f"{CHOICES}.")
    blocks: float | None = judged(
        None,
        "Train the last N blocks only: all, 12, 4, 1, 0.5 (the MLP of the last), 0 (the head).",
        shown="all",
        parse=parse_blocks,
        at_least=0,
    )
    batch_norm: bool = unlisted(False, "Normalise features before the head, without affine parameters.")
    drop_path: float = _augmented(
        0.1, "Largest rate of stochastic depth; it grows with the layers from 0.", at_least=0, below=1
    )


class MixConfig(Config):
    """Augmentation of labelled images besides cropping."""

    rand_augment: str = _augmented(RAND_AUGMENT, "RandAugment as timm writes it, or none.")
    mixup: float = _augmented(0.8, "α of mixup; 0 is none.", at_least=0)
    cutmix: float = _augmented(1.0, "α of cutmix; 0 is none.", at_least=0)
    label_smoothing: float = _augmented(
        0.1, "Share of each target that goes to all classes alike.", at_least=0, below=1
    )
    erase: float = _augmented(0.25, "Probability that a rectangle is erased.", at_least=0, at_most=1)


class SupervisedOptimizer(OptimizerConfig):
    """The optimiser and its schedule."""

    lr: float = _training(1e-3, "Base learning rate, per 256 images.", shown="as published", above=0)
    min_lr: float = unlisted(1e-6, "Learning rate at the end, absolute.", at_least=0)
    warmup_epochs: float = _training(
        5.0, "Length of the warm-up; at most a tenth of the run.", shown="as published", at_least=0
    )
    weight_decay: float = _training(0.05, "On parameters of two or more dimensions.", at_least=0)
    beta2: float = unlisted(0.999, "AdamW's β₂.", at_least=0, below=1)
    kind: str = unlisted("adamw", "adamw or lars.")
    layer_decay: float = _training(
        0.75, "Each layer's learning rate is that of the next one times this (AdamW).", above=0, at_most=1
    )
    momentum: float = unlisted(0.9, "Of LARS.", at_least=0, below=1)


class FinetuneConfig(Config):
    """A whole run of supervised training."""

    shards: tuple[str, ...] = labelled((), "With a .cls member each.", flag="--train", metavar="SHARDS", free=True)
    out: str = setting("", "The directory of this training.", free=True)
    test: tuple[str, ...] = labelled((), "Likewise, held out.", metavar="SHARDS", free=True)
    test_images: int | None = labelled(None, "At most this many, drawn at random.", shown="all", free=True, above=0)
    epochs: float | None = _training(
        None,
        "Passes over the training images.",
        shown="100; 300 from scratch; 90 to probe",
        above=0,
        at_most=MOST_EPOCHS,
    )
    steps: int | None = _training(None, "Optimiser steps, instead of epochs.", above=0, at_most=MOST_STEPS)
    batch_size: int = _training(
        1024, "Images per step, over all devices.", shown="as published", above=0, at_most=MOST_IMAGES
    )
    seed: int = setting(0, "Of the head, order, crops, and all that is mixed.", at_least=0, below=1 << 63)
    classes: int | None = unlisted(None, "Of the training set; found by itself.", above=0)
    labels_sha256: str | None = unlisted(None, "Names classes and labels of the training set; found by itself.")
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
