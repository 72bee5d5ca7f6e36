"""The settings of the commands that draw pages: `maekit reconstruct`, `report` and `neighbours`."""

from typing import Literal

from maekit.config.fields import Config, argument, check, setting
from maekit.config.pretrain import Device, Masking
from maekit.system.errors import InputError

ENDINGS = (".png", ".html")
_MOST_ROWS = 1000
_MOST_SAMPLES = 5000
_SHARDS = "Directories, .tar files, globs, brace patterns or URLs."


class ReconstructConfig(Config):
    """Which samples to draw, and under which masks."""

    source: str = argument(
        help="A run, a checkpoint, or others' weights with a decoder: a .pth of the reference implementation, a "
        "directory of transformers' ViTMAE."
    )
    shards: tuple[str, ...] = argument(help=_SHARDS)
    out: str = setting("reconstruction.png", "The picture: .png, or .html with keys and losses as well.")
    keys: tuple[str, ...] = setting(
        (), "A sample, KEY or SHARD:KEY; may be repeated. Without it, a random set.", flag="--key"
    )
    count: int = setting(8, "How many samples are drawn at random.", at_least=1, at_most=_MOST_ROWS)
    seed: int = setting(0, "Of the samples and the masks.", at_least=0, below=1 << 63)
    mask_ratio: float | None = setting(None, "Share of patches removed.", shown="as trained", above=0, below=1)
    masking: Masking | None = setting(None, "random, block or grid.", shown="as trained")
    target: Literal["norm_pixel", "pixel"] | None = setting(
        None, "norm_pixel or pixel, for a file of weights that does not tell what it predicts."
    )
    overlay_visible: bool = setting(False, "Show kept patches as they are, and not as they are predicted.")
    device: Device = setting("auto", "auto, cpu or cuda.")

    def validate(self) -> None:
        """Check every value that needs no model.

        Raises:
            InputError: names the first impossible value.
        """
        check(self)
        if len(self.keys) > _MOST_ROWS:
            raise InputError(f"{len(self.keys)} keys: at most {_MOST_ROWS} fit into a picture")


class ReportConfig(Config):
    """The subject of a run's report."""

    run: str = argument(help="What `maekit pretrain` wrote, finished or not.", metavar="RUN")
    out: str | None = setting(None, "The page.", shown="RUN/report.html")
    shards: tuple[str, ...] = setting((), "Whose images are shown; may be repeated.", shown="those of the training")
    samples: int = setting(
        600, "How many are embedded for the neighbours and the map, evenly spread.", at_least=2, at_most=_MOST_SAMPLES
    )
    device: Device = setting("auto", "auto, cpu or cuda.")


class NeighboursConfig(Config):
    """Whose neighbours to find, and how to show them."""

    embeddings: str = argument(help="What `maekit embed` wrote: its `out`.", metavar="EMBEDDINGS")
    queries: tuple[str, ...] = setting(
        help="KEY or SHARD:KEY of a row, or an image file; may be repeated.", flag="--query", metavar="KEY|IMAGE"
    )
    out: str = setting("neighbours.html", "The page.")
    k: int = setting(10, "Neighbours of each query.", flag="--k/-k", at_least=1, at_most=_MOST_ROWS)
    shards: tuple[str, ...] = setting((), "What was embedded, for the pictures; may be repeated.")
    model: str | None = setting(
        None, "The file that made the embeddings, for queries that are images.", metavar="ENCODER.ONNX"
    )
