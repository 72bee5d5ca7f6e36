"""The settings of `maekit check` and `maekit inspect`."""

from maekit.config.fields import MOST_PROCESSES, Config, argument, check, setting, unlisted
from maekit.config.images import image_setting
from maekit.system.errors import InputError


class CheckConfig(Config):
    """How to scan shards."""

    shards: tuple[str, ...] = argument(help="Directories, .tar files, globs, brace patterns or URLs.")
    write_index: bool = setting(False, "Write NAME.tar.index beside each sound shard.")
    crc: bool = setting(False, "Put the CRC-32 of every member into it.")
    image: str | None = image_setting()
    images: bool = setting(False, "Decode every image: formats, modes, sizes, failures by reason.")
    stats: bool = setting(False, "Mean and standard deviation of each channel, over all images.")
    workers: int | None = setting(None, "Processes.", shown="one per core", at_least=1, at_most=MOST_PROCESSES)
    cache_gb: float = setting(50.0, "Gigabytes that remote shards may take in $MAEKIT_CACHE.", above=0)

    def validate(self) -> None:
        """Check every value.

        Raises:
            InputError: names the first impossible value, or two that conflict.
        """
        if self.crc and not self.write_index:
            raise InputError("`crc` puts CRC-32s into the index that `write_index` writes; give both")
        check(self)


class InspectConfig(Config):
    """What to inspect."""

    thing: str = argument(help="A run, a checkpoint, an .onnx file, or shards.")
    providers: bool = setting(False, "Of an .onnx file: which provider takes which nodes on this machine.")


class DoctorConfig(Config):
    """What to measure on this machine besides listing its properties."""

    model: str | None = argument(
        None, "Measure this model on this machine; what `maekit export` wrote.", metavar="ENCODER.ONNX"
    )
    shards: tuple[str, ...] = argument(
        (), "Measure decoding on images of these shards, too; the model's input size decides.", metavar="SHARDS"
    )
    seconds: float = unlisted(5.0, "About how long to measure.", above=0)

    def validate(self) -> None:
        """Check every value.

        Raises:
            InputError: names the first impossible value.
        """
        check(self)
        if self.model == "":
            raise InputError("`model` is empty; it must name the file that `maekit export` wrote")
        if self.shards and self.model is None:
            raise InputError("decoding is measured for a model: name the file that `maekit export` wrote first")
