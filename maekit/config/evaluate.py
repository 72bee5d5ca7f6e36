"""The settings of `maekit evaluate knn`, `linear` and `retrieval`."""

import re
from functools import partial
from typing import Any, Literal

from maekit.config.fields import Config, argument, check, setting, unlisted
from maekit.config.images import image_setting
from maekit.config.poolings import CHOICES, check_pool
from maekit.config.pretrain import MOST_BLOCKS, Device
from maekit.system.errors import InputError

ALL_LAYERS = "all"
_NUMBER = re.compile("[1-9][0-9]{0,3}")
judged = partial(setting, panel="What is judged")
labelled = partial(setting, panel="Labelled images")


class EvaluateConfig(Config):
    """How embeddings are evaluated, and on which labelled images."""

    task: Literal["knn", "linear", "retrieval"] = unlisted(help="knn, linear or retrieval.")
    model: str = argument(
        help="A run, a checkpoint, timm:NAME, a file of weights, an exported .onnx, or a directory of embeddings.",
        metavar="MODEL",
    )
    train: tuple[str, ...] = labelled(help="With a .cls member each.", metavar="SHARDS")
    test: tuple[str, ...] = labelled(
        (),
        "Likewise, held out. In a retrieval these are the queries; without them, each image of `train` searches for "
        "the others of its class.",
        metavar="SHARDS",
    )
    image: str | None = image_setting(panel="Labelled images")
    # From here on, the order is part of the digest that names the file of an evaluation in a run: see `options`.
    pool: tuple[str, ...] = judged((), f"{CHOICES}; may be repeated.", shown="all of avg and cls that the model has")
    layers: tuple[str, ...] = judged(
        (),
        "Pool the output of this block, counted from 1, with and without the final norm; or all. May be repeated.",
        flag="--layer",
        metavar="N",
        shown="the last",
    )
    whiten: bool = judged(True, "Also whitened by a PCA, fitted without labels on the training images.")
    whiten_dims: tuple[int, ...] = judged(
        (),
        "Length of a whitened embedding; may be repeated.",
        flag="--whiten-dim",
        shown="all directions; 64 for raw pixels",
        above=0,
    )
    baselines: bool = judged(True, "Beside it, raw pixels and the encoder as initialised.")
    train_images: int | None = labelled(None, "At most this many, drawn at random.", shown="all", above=0)
    test_images: int | None = labelled(None, "At most this many, drawn at random.", shown="all", above=0)
    precisions: tuple[Literal["fp32", "fp16", "int8"], ...] = judged(
        ("fp32",), "fp32, fp16 or int8, the last two as exported; may be repeated.", flag="--precision"
    )
    k: int = setting(20, "Neighbours that vote.", above=0)
    ks: tuple[int, ...] = unlisted((1, 5, 10, 20, 50, 100, 200), "Other numbers of neighbours to report.", above=0)
    temperature: float = setting(0.07, "Each votes with exp(cosine / temperature).", above=0)
    recalls: tuple[int, ...] = unlisted((1, 5, 10), "The k of recall@k.", above=0)
    architecture: str | None = judged(
        None, "timm's name of the architecture, for a file of weights that does not tell.", flag="--model"
    )
    seed: int = setting(0, "Of the untrained encoder, and of the part held out.", at_least=0, below=1 << 63)
    device: Device = setting("auto", "auto, cpu or cuda.")

    def validate(self) -> None:
        """Check every value that needs no model.

        Raises:
            InputError: names the first impossible value, or two that conflict.
        """
        for pool in self.pool:
            check_pool("pool", pool, layers=True)
        check(self)
        for layer in self.layers:
            if layer != ALL_LAYERS and not (_NUMBER.fullmatch(layer) and int(layer) <= MOST_BLOCKS):
                raise InputError(f"`layers` = {layer}: must be the number of a block, counted from 1, or all")
        if self.layers and self.precisions != ("fp32",):
            raise InputError(f"`layers` = {self.layers[0]}: they are judged in fp32; `maekit export` takes one")
        if not self.precisions:
            raise InputError("`precisions`: at least one is needed")
        if not self.whiten and self.whiten_dims:
            raise InputError(f"`whiten_dims` = {self.whiten_dims[0]} does not go with `whiten=false`")

    def options(self) -> dict[str, Any]:
        """Return the settings that affect the results besides model and images, as JSON values stored with them."""
        unset = [name for name in ("image", "layers") if not getattr(self, name)]  # as before they were there
        others = ("task", "model", "train", "test", *unset)
        options = {key: value for key, value in vars(self).items() if key not in others}
        return {"model" if key == "architecture" else key: value for key, value in options.items()}
