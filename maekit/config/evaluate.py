"""The settings of `maekit evaluate knn`, `linear` and `retrieval`."""

from dataclasses import dataclass
from typing import Any, Literal

from maekit.config.fields import check, config_class, setting
from maekit.config.poolings import CHOICES, check_pool
from maekit.config.pretrain import Device
from maekit.system.errors import InputError

_JUDGED, _IMAGES = "What is judged", "Labelled images"


@config_class
@dataclass
class EvaluateConfig:
    """How embeddings are evaluated, and on which labelled images."""

    task: Literal["knn", "linear", "retrieval"] = setting(help="knn, linear or retrieval.", only_set=True)
    model: str = setting(
        help="A run, a checkpoint, timm:NAME, a file of weights, an exported .onnx, or a directory of embeddings.",
        metavar="MODEL",
    )
    train: tuple[str, ...] = setting(help="With a .cls member each.", panel=_IMAGES, metavar="SHARDS")
    test: tuple[str, ...] = setting(
        (),
        "Likewise, held out. In a retrieval these are the queries; without them, each image of `train` searches for "
        "the others of its class.",
        panel=_IMAGES,
        metavar="SHARDS",
    )
    k: int = setting(20, "Neighbours that vote.", above=0)
    temperature: float = setting(0.07, "Each votes with exp(cosine / temperature).", above=0)
    pool: tuple[str, ...] = setting(
        (), f"{CHOICES}; may be repeated.", panel=_JUDGED, shown="all of avg and cls that the model has"
    )
    whiten: bool = setting(True, "Also whitened by a PCA, fitted without labels on the training images.", panel=_JUDGED)
    whiten_dims: tuple[int, ...] = setting(
        (),
        "Length of a whitened embedding; may be repeated.",
        panel=_JUDGED,
        flag="--whiten-dim",
        shown="all directions; 64 for raw pixels",
        above=0,
    )
    precisions: tuple[Literal["fp32", "fp16", "int8"], ...] = setting(
        ("fp32",),
        "fp32, fp16 or int8, the last two as exported; may be repeated.",
        panel=_JUDGED,
        flag="--precision",
    )
    architecture: str | None = setting(
        None,
        "timm's name of the architecture, for a file of weights that does not tell.",
        panel=_JUDGED,
        flag="--model",
    )
    baselines: bool = setting(True, "Beside it, raw pixels and the encoder as initialised.", panel=_JUDGED)
    train_images: int | None = setting(None, "At most this many, drawn at random.", panel=_IMAGES, shown="all", above=0)
    test_images: int | None = setting(None, "At most this many, drawn at random.", panel=_IMAGES, shown="all", above=0)
    ks: tuple[int, ...] = setting(
        (1, 5, 10, 20, 50, 100, 200), "Other numbers of neighbours to report.", only_set=True, above=0
    )
    recalls: tuple[int, ...] = setting((1, 5, 10), "The k of recall@k.", only_set=True, above=0)
    seed: int = setting(0, "Of the untrained encoder, and of the part held out.", at_least=0, below=1 << 63)
    device: Device = setting("auto", "auto, cpu or cuda.")

    def validate(self) -> None:
        """Check every value that needs no model.

        Raises:
            InputError: names the first impossible value, or two that conflict.
        """
        for pool in self.pool:
            check_pool("pool", pool)
        check(self)
        if not self.precisions:
            raise InputError("`precisions`: at least one is needed")
        if not self.whiten and self.whiten_dims:
            raise InputError(f"`whiten_dims` = {self.whiten_dims[0]} does not go with `whiten=false`")

    def options(self) -> dict[str, Any]:
        """Return the settings that affect the results besides model and images, as JSON values stored with them."""
        return {
            "pool": self.pool,
            "whiten": self.whiten,
            "whiten_dims": self.whiten_dims,
            "baselines": self.baselines,
            "train_images": self.train_images,
            "test_images": self.test_images,
            "precisions": self.precisions,
            "k": self.k,
            "ks": self.ks,
            "temperature": self.temperature,
            "recalls": self.recalls,
            "model": self.architecture,
            "seed": self.seed,
            "device": self.device,
        }
