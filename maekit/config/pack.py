"""The settings of `maekit pack`."""

from functools import partial
from typing import Literal

from maekit.config.fields import MOST_PROCESSES, Config, argument, setting

_table = partial(setting, panel="Table")


class PackConfig(Config):
    """How a folder of images, or shards, are packed."""

    images: str = argument(help="A folder of images, searched to any depth; or shards, which are written anew.")
    out: str = argument(help="A folder for the shards: new or empty.", metavar="SHARDS")
    samples_per_shard: int = setting(1000, "Images in each shard at most.", at_least=1)
    shard_mb: float | None = setting(
        None, "Megabytes in each shard at most; one image larger than that has a shard to itself.", above=0
    )
    classes: bool = setting(True, "Take the first folder of each path for the class, where all images lie in folders.")
    key_by: Literal["sample", "name"] = setting(
        "sample",
        "Of shards: sample, WebDataset's key, up to the first dot; or name: each image is a sample of its own, named "
        "after it, dots and all.",
    )
    table: str | None = _table(
        None, "A CSV, TSV or parquet file that says which images, in what order, and with what label."
    )
    path_column: str | None = _table(None, "Its column of paths.", shown="one named path, file, filename or image")
    label_column: str | None = _table(
        None,
        "Its column of labels, whole numbers or text; an empty one gives no .cls.",
        shown="one named label, cls, class or target",
    )
    workers: int | None = setting(None, "Processes.", shown="one per core", at_least=1, at_most=MOST_PROCESSES)
