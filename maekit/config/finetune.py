"""What can be asked of supervised training. Imports nothing heavy: the command's `--help` shows these defaults.

Three published schedules (He et al. 2021, appendix A.1, tables 9 to 11): fine-tuning, training from scratch, linear
probing.
"""

from dataclasses import dataclass, field

from maekit.config import DataConfig, OptimizerConfig, RunConfig, check_not_negative, check_positive, check_training
from maekit.config.poolings import check_pool
from maekit.system.errors import InputError

RAND_AUGMENT = "rand-m9-mstd0.5-inc1"


@dataclass
class ClassifierConfig:
    """The model.

    Attributes:
        source: whose encoder it starts from: a run, a checkpoint, `timm:NAME`, or a file (`maekit.pretrained.sources`).
        name: timm's name of the architecture, for a file of weights that does not tell.
        sha256: names its weights; found by itself.
        from_scratch: forget its weights, and start from the published initialisation.
        pool: `avg`, `cls`, `std`, `avg2x2`, or several joined by `+`.
        blocks: how many of the last blocks are trained; 0.5 is the MLP of the last one, 0 the head alone, None is all.
        batch_norm: normalise features before the head, without affine parameters.
        drop_path: largest rate of stochastic depth; it grows with the layers from 0.
    """

    # The weights may move; they may not change.
    source: str = field(default="", metadata={"free": True})
    name: str | None = None
    sha256: str | None = None
    from_scratch: bool = False
    pool: str = "avg"
    blocks: float | None = None
    batch_norm: bool = False
    drop_path: float = 0.1


@dataclass
class MixConfig:
    """What is done to labelled images besides cropping.

    Attributes:
        rand_augment: RandAugment as timm writes it, such as `rand-m9-mstd0.5-inc1`, or `none`.
        mixup: α of mixup; 0 is none.
        cutmix: α of cutmix; 0 is none.
        label_smoothing: share of each target that goes to all classes alike.
        erase: probability that a rectangle is erased.
    """

    rand_augment: str = RAND_AUGMENT
    mixup: float = 0.8
    cutmix: float = 1.0
    label_smoothing: float = 0.1
    erase: float = 0.25


@dataclass
class SupervisedOptimizer(OptimizerConfig):
    """The optimiser and its schedule.

    Attributes:
        kind: `adamw` or `lars`.
        layer_decay: each layer's learning rate is that of the next one times this (AdamW).
        momentum: of LARS.
    """

    lr: float = 1e-3
    min_lr: float = 1e-6
    warmup_epochs: float = 5.0
    beta2: float = 0.999
    kind: str = "adamw"
    layer_decay: float = 0.75
    momentum: float = 0.9


@dataclass
class FinetuneConfig:
    """A whole run of supervised training.

    Attributes:
        shards: input specs of the training set, with labels.
        out: the directory of the run.
        test: input specs of the test set.
        test_images: at most so many of it, drawn at random; None is all.
        epochs: passes over the training set; 100 where neither is given.
        steps: optimiser steps, instead of epochs.
        batch_size: images per optimiser step, over all devices.
        seed: of the head, order, crops, flips and all that is mixed.
        classes: of the training set; found by itself.
        labels_sha256: names classes and labels of the training set; found by itself.
    """

    shards: tuple[str, ...] = field(default=(), metadata={"free": True})
    out: str = field(default="", metadata={"free": True})
    test: tuple[str, ...] = field(default=(), metadata={"free": True})
    test_images: int | None = field(default=None, metadata={"free": True})
    epochs: float | None = None
    steps: int | None = None
    batch_size: int = 1024
    seed: int = 0
    classes: int | None = None
    labels_sha256: str | None = None
    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(crop_scale=(0.08, 1.0)))
    mix: MixConfig = field(default_factory=MixConfig)
    optimizer: SupervisedOptimizer = field(default_factory=SupervisedOptimizer)
    run: RunConfig = field(default_factory=RunConfig)

    def validate(self) -> None:
        """Check every value that needs no data and no model.

        Raises:
            InputError: names the first impossible value.
        """
        check_training(self)
        if not self.test:
            raise InputError("no test set was given (--test SHARDS)")
        if not self.model.source:
            raise InputError("no model was given")
        check_positive(
            {
                "test_images": self.test_images,
                "optimizer.lr": self.optimizer.lr,
                "optimizer.clip_grad": self.optimizer.clip_grad,
            }
        )
        check_not_negative(
            {
                "optimizer.min_lr": self.optimizer.min_lr,
                "optimizer.warmup_epochs": self.optimizer.warmup_epochs,
                "optimizer.weight_decay": self.optimizer.weight_decay,
                "mix.mixup": self.mix.mixup,
                "mix.cutmix": self.mix.cutmix,
            }
        )
        for key, value in {
            "model.drop_path": self.model.drop_path,
            "mix.label_smoothing": self.mix.label_smoothing,
            "optimizer.beta1": self.optimizer.beta1,
            "optimizer.beta2": self.optimizer.beta2,
            "optimizer.momentum": self.optimizer.momentum,
        }.items():
            if not 0 <= value < 1:
                raise InputError(f"{key} = {value}: must lie in [0, 1)")
        if not 0 < self.optimizer.layer_decay <= 1:
            raise InputError(f"optimizer.layer_decay = {self.optimizer.layer_decay}: must lie in (0, 1]")
        if not 0 <= self.mix.erase <= 1:
            raise InputError(f"mix.erase = {self.mix.erase}: must lie in [0, 1]")
        elsewhere = {"mean": "the model's own is taken", "std": "the model's own is taken", "val": "use --test"}
        elsewhere["val_images"] = "use --test-images"
        for name, instead in elsewhere.items():
            if getattr(self.data, name) != getattr(DataConfig, name):
                raise InputError(f"data.{name} is not for fine-tuning: {instead}")
        blocks = self.model.blocks
        if blocks is not None and blocks != 0.5 and not (0 <= blocks < 1e6 and blocks == int(blocks)):
            raise InputError(f"--blocks {blocks:g}: must be all, 0, 0.5, or a whole number")
        if self.model.from_scratch and blocks is not None:
            raise InputError("--from-scratch trains all blocks; it does not go with --blocks")
        check_pool("--pool", self.model.pool)
        if self.optimizer.kind not in ("adamw", "lars"):
            raise InputError(f"optimizer.kind = {self.optimizer.kind!r}: must be one of adamw, lars")
        idle = {"adamw": ("momentum", SupervisedOptimizer.momentum), "lars": ("layer_decay", 1.0)}
        name, usual = idle[self.optimizer.kind]
        if getattr(self.optimizer, name) != usual:
            raise InputError(f"optimizer.{name} is not for {self.optimizer.kind}")
        if self.run.pictures_every is not None:
            raise InputError("run.pictures_every is not for fine-tuning: it draws nothing")


def finetuning() -> FinetuneConfig:
    """Return the published fine-tuning of a ViT-B (table 9)."""
    return FinetuneConfig()


def training_from_scratch() -> FinetuneConfig:
    """Return the published supervised training from scratch (table 11), without its moving average of weights."""
    config = FinetuneConfig(batch_size=4096, epochs=300.0)
    config.model.from_scratch = True
    config.optimizer = SupervisedOptimizer(
        lr=1e-4, min_lr=0.0, warmup_epochs=20.0, weight_decay=0.3, beta2=0.95, layer_decay=1.0
    )
    config.mix.erase = 0.0
    return config


def linear_probing() -> FinetuneConfig:
    """Return the published linear probing (table 10): LARS, BatchNorm without affine, random resized crops alone."""
    config = FinetuneConfig(batch_size=16384, epochs=90.0)
    config.model.blocks, config.model.batch_norm, config.model.pool, config.model.drop_path = 0, True, "cls", 0.0
    config.mix = MixConfig(rand_augment="none", mixup=0.0, cutmix=0.0, label_smoothing=0.0, erase=0.0)
    config.optimizer = SupervisedOptimizer(
        kind="lars", lr=0.1, min_lr=0.0, warmup_epochs=10.0, weight_decay=0.0, layer_decay=1.0
    )
    return config
