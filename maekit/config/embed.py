"""The settings of `maekit embed`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from maekit.config.fields import check, config_class, setting
from maekit.system.errors import InputError

_OUTPUT, _INPUT, _HARDWARE, _MACHINES = "Output", "Input", "Hardware", "Many machines"
_COLUMNS = ("key", "shard", "index", "embedding")


def parse_count(text: str) -> int | None:
    """Parse a number, or `auto`, which is None.

    Raises:
        InputError: it is neither.
    """
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{text}: must be a number or auto") from None


def parse_extensions(text: str) -> tuple[str, ...]:
    """Parse extensions such as `json,cls`."""
    return tuple(part.strip().lower().lstrip(".") for part in text.split(","))


def parse_devices(text: str) -> tuple[str, ...]:
    """Parse a list of devices such as `0,1` or `cpu,cpu`."""
    names = [name.strip() for name in text.split(",")]
    return tuple(f"cuda:{name}" if name.isdecimal() else name for name in names)


def parse_provider_options(pairs: Sequence[str]) -> dict[str, str]:
    """Parse options of an execution provider, each KEY=VALUE.

    Raises:
        InputError: an option has another form.
    """
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise InputError(f"`provider_options` {pair}: must be KEY=VALUE")
        options[key] = value
    return options


@config_class
@dataclass
class EmbedConfig:
    """One embedding job."""

    model: str = setting(help="What `maekit export` wrote.", metavar="ENCODER.ONNX")
    shards: tuple[str, ...] = setting(
        help="Directories, .tar files, globs, brace patterns or URLs; or one directory of images."
    )
    out: str = setting(help="The output directory.", panel=_OUTPUT)
    device: str = setting(
        "auto", "auto, cpu, cuda or cuda:N. cuda means on CUDA, or exit 2 with the fix.", panel=_HARDWARE
    )
    devices: tuple[str, ...] = setting(
        (),
        "Several GPUs (or cpu,cpu), one process each, which share the work.",
        panel=_HARDWARE,
        metavar="0,1,…",
        parse=parse_devices,
    )
    provider_options: Mapping[str, str] = setting(
        factory=dict,
        help="Of ONNX Runtime's CUDA provider, such as gpu_mem_limit=8000000000; may be repeated.",
        panel=_HARDWARE,
        flag="--provider-option",
        metavar="KEY=VALUE",
        parse=parse_provider_options,
    )
    format: Literal["parquet", "npy"] = setting(
        "parquet",
        "parquet: one file per shard. npy: img_emb/*.npy and metadata/*.parquet, as clip-retrieval writes.",
        panel=_OUTPUT,
    )
    dtype: Literal["float32", "float16"] = setting(
        "float32", "Of the stored embeddings: float32 or float16.", panel=_OUTPUT
    )
    keep: tuple[str, ...] = setting(
        (),
        "Members of each sample that become columns, such as json,cls.",
        panel=_OUTPUT,
        metavar="EXTENSIONS",
        parse=parse_extensions,
    )
    limit: int | None = setting(None, "Only the first N samples of the input.", panel=_INPUT, at_least=1)
    select: str | None = setting(None, "Only samples whose key matches.", panel=_INPUT, metavar="GLOB")
    batch_size: int | None = setting(
        None,
        "Images per run of the model. auto: what `out` has; else 8 on a CPU, where more only fall out of the caches, "
        "and as many pixels as 256 images of 224 x 224 on a GPU. Halved where memory is short.",
        panel=_HARDWARE,
        metavar="N|auto",
        shown="auto",
        parse=parse_count,
        at_least=1,
    )
    workers: int | None = setting(
        None,
        "Decoding processes, over all devices. auto: one per core; on a CPU they only take the time that the model "
        "leaves.",
        panel=_HARDWARE,
        metavar="N|auto",
        shown="auto",
        parse=parse_count,
        at_least=1,
    )
    num_splits: int | None = setting(
        None,
        "Divide the input among N runs on one `out`.",
        panel=_MACHINES,
        shown="as SLURM or torchrun says",
    )
    split: int | None = setting(None, "Which of them this is, from 0.", panel=_MACHINES)
    overwrite: bool = setting(False, "Delete what is in `out` and make it anew.", panel=_OUTPUT)
    verify: bool = setting(
        False,
        "At the end, read everything again: digests, keys, lengths, values. Exit 1 if anything is wrong.",
        panel=_OUTPUT,
    )
    cache_gb: float = setting(50.0, "Gigabytes that remote shards may take in $MAEKIT_CACHE.", panel=_INPUT, above=0)

    def validate(self) -> None:
        """Check every value that needs neither the model nor the input.

        Raises:
            InputError: names the first impossible value, or two that conflict.
        """
        check(self)
        for extension in self.keep:
            if not extension or extension in _COLUMNS:
                raise InputError(
                    f"`keep` {extension or repr(extension)}: must be the extension of a member, such as json"
                )
            if "/" in extension or "\0" in extension:
                raise InputError(f"`keep` {extension!r}: no member has such an extension")
            if self.keep.count(extension) > 1:
                raise InputError(f"`keep` {extension}: given twice")
        if self.devices and self.device != "auto":
            raise InputError(f"`device` = {self.device} and `devices` = {','.join(self.devices)}: give one of them")
        if "auto" in self.devices:
            raise InputError("`devices`: name each of them, such as 0,1")
        if not self.cache_gb < math.inf:
            raise InputError(f"`cache_gb` = {self.cache_gb:g}: must be a number greater than 0")
        if "device_id" in self.provider_options:
            raise InputError("`provider_options` device_id: choose the GPU by `device=cuda:N`")
        if "://" in self.model:
            raise InputError(f"{self.model}: the model is read from a local file; download it first")
        if "://" in self.out:
            raise InputError(
                f"`out` {self.out}: write to a local or mounted directory, then copy it (aws s3 sync, gsutil)"
            )
