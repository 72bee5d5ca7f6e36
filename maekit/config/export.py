"""The settings of `maekit export`."""

from functools import partial
from typing import Literal

from maekit.config.fields import Config, argument, check, setting, settings_of
from maekit.config.images import MOST_PIXELS, image_setting, parse_image_size
from maekit.config.poolings import UNPOOLED, at_layer, check_pool
from maekit.config.pretrain import MOST_BLOCKS
from maekit.system.errors import InputError

OPSET_WITH_ATTENTION = 23  # the first that has the operator
_computes = partial(setting, panel="What it computes")
proves = partial(setting, panel="What it is held against")


class ExportConfig(Config):
    """One export: what the file computes, and what it is compared with."""

    source: str = argument(
        help="A run, one of its checkpoints, timm:NAME, a file of weights (under timm's names, or the reference "
        "implementation's .pth), or a directory of transformers' ViTMAE."
    )
    out: str = setting(help="The ONNX file.")
    pool: str = _computes(
        "avg",
        "avg: mean of the patch tokens; cls: the class token; std: standard deviation of the patch tokens; avg2x2: "
        "mean of each quarter of the image; several joined by +; or tokens: all patch tokens.",
    )
    layer: int | None = _computes(
        None,
        "Pool the output of this block, counted from 1, and end the graph there; by default the last. Parts of `pool` "
        "may name their own, as in avg@8+avg@12.",
        at_least=1,
        at_most=MOST_BLOCKS,
    )
    pre_norm: bool = _computes(False, "Pool before the final norm.")
    whiten: tuple[str, ...] = _computes(
        (), "Fit a whitening on images of these shards and bake it in: recommended for cosine search.", metavar="SHARDS"
    )
    whiten_dim: int | None = _computes(
        None, "Length of a whitened embedding; by default as many as the images vary in.", at_least=1
    )
    whiten_images: int = _computes(5000, "Images to fit the whitening on, evenly spread.", at_least=2)
    image_size: int | tuple[int, int] | None = _computes(
        None,
        "Side of the input in pixels, or HEIGHTxWIDTH, of another size than the encoder was trained at: its positions "
        "are resized.",
        parse=parse_image_size,
        above=0,
        at_most=MOST_PIXELS,
    )
    image: str | None = image_setting(panel="What it computes", shown="as in the training")
    normalize: bool = _computes(True, "Divide each embedding by its L2 norm.")
    precision: Literal["fp32", "fp16", "int8"] = _computes("fp32", "fp32; fp16, for CUDA; int8, for CPUs.")
    opset: Literal[18, 19, 20, 21, 22, 23] = _computes(
        23, "Of ONNX, 18 to 23; below 23 attention is written in older operators, for older runtimes."
    )
    format: Literal["onnx", "timm"] = _computes(
        "onnx", "onnx; or timm: a directory that timm.create_model('local-dir:DIR') loads, the encoder alone."
    )
    model: str | None = _computes(
        None,
        "timm's name of the architecture, for a file of weights that does not tell; with a tag "
        "(vit_base_patch16_224.mae), also its normalisation.",
    )
    parity: tuple[str, ...] = proves(
        (), "Images to compare on, and to calibrate int8 on; those of the training by default.", metavar="SHARDS"
    )
    force: bool = proves(False, "Keep a file that differs too much.")

    def changed(self) -> list[str]:
        """Return the names of the settings that differ from their default."""
        return [key for key, _, _, default in settings_of(type(self)) if getattr(self, key) != default]

    @property
    def pooling(self) -> str:
        """The pooling with its layers, as in `avg@8:pre`; it stands in the file's metadata."""
        return self.pool if self.pool == UNPOOLED else at_layer(self.pool, self.layer, is_normed=not self.pre_norm)

    def validate(self) -> None:
        """Check every value that needs no model.

        Raises:
            InputError: names the first impossible value, or two that conflict.
        """
        check_pool("pool", self.pool, also=(UNPOOLED,), layers=True)
        check(self)
        if self.pool == UNPOOLED and (self.layer or self.pre_norm):
            name = "layer" if self.layer else "pre_norm"
            raise InputError(f"`{name}` is for embeddings; `pool=tokens` gives those of the last layer")
        if not self.whiten:
            for name, what in (("whiten_dim", "to fit the whitening on"), ("whiten_images", "to take them from")):
                if name in self.changed():
                    raise InputError(f"`{name}` = {getattr(self, name)}: needs `whiten`, shards {what}")
        if self.image is not None and not (self.whiten or self.parity):
            raise InputError(f"`image` = {self.image}: needs `whiten` or `parity`, shards to take images from")
        if self.whiten and self.pool == UNPOOLED:
            raise InputError("`whiten` is for embeddings; `pool=tokens` gives tokens")
        if self.format == "timm":
            for name in self.changed():
                if name not in ("source", "out", "format", "model", "parity", "image", "image_size"):
                    raise InputError(f"`{name}` is not for `format=timm`, which writes the encoder alone in fp32")
