"""The settings of `maekit embed`."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

from maekit.config.fields import MOST_IMAGES, MOST_PROCESSES, Config, argument, check, count_or_auto, setting
from maekit.config.images import image_setting
from maekit.system.errors import ImageError, InputError

_COLUMNS = ("key", "shard", "index", "embedding")
_output = partial(setting, panel="Output")
_input = partial(setting, panel="Input")
_hardware = partial(setting, panel="Hardware")
_machines = partial(setting, panel="Many machines")


def parse_extensions(text: str) -> tuple[str, ...]:
    """Parse extensions such as `json,cls`."""
    return tuple(part.strip().lower().lstrip(".") for part in text.split(","))


def parse_split(text: str) -> int | str:
    """Parse the number of a split, or `auto`.

    Raises:
        ValueError: it is neither.
    """
    if text != "auto" and not text.isdecimal():
        raise ValueError("must be a whole number, or auto")
    return text if text == "auto" else int(text)


def parse_devices(text: str) -> tuple[str, ...]:
    """Parse a list of devices such as `0,1` or `cpu,cpu`."""
    names = [name.strip() for name in text.split(",")]
    return tuple(f"cuda:{name}" if name.isdecimal() else name for name in names)


def parse_provider_options(pairs: Sequence[str]) -> dict[str, str]:
    """Parse options of an execution provider, each KEY=VALUE.

    Raises:
        ValueError: an option has another form.
    """
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise ValueError(f"{pair}: must be KEY=VALUE")
        options[key] = value
    return options


class EmbedConfig(Config):
    """One embedding job."""

    model: str = argument(help="What `maekit export` wrote.", metavar="ENCODER.ONNX")
    shards: tuple[str, ...] = argument(
        help="Directories, .tar files, globs, brace patterns or URLs; or one directory of images."
    )
    out: str = _output(help="The output directory.")
    device: str = _hardware("auto", "auto, cpu, cuda or cuda:N. cuda means on CUDA, or exit 2 with the fix.")
    devices: tuple[str, ...] = _hardware(
        (), "Several GPUs (or cpu,cpu), one process each, which share the work.", metavar="0,1,…", parse=parse_devices
    )
    provider_options: Mapping[str, str] = _hardware(
        factory=dict,
        help="Of ONNX Runtime's CUDA provider, such as gpu_mem_limit=8000000000; may be repeated.",
        flag="--provider-option",
        metavar="KEY=VALUE",
        parse=parse_provider_options,
    )
    runtime: Literal["auto", "onnxruntime", "openvino"] = _hardware(
        "auto",
        "What runs the model on a CPU: onnxruntime, openvino or auto. auto: what `out` was made with; else OpenVINO if "
        "it is installed (the extra openvino) and the processor has AVX-512; else ONNX Runtime.",
    )
    precision: Literal["fp32", "bf16"] = _hardware(
        "fp32",
        "fp32 or bf16. fp32: as the file says, int8 included. bf16: everything up to the pooled vector in bf16, by "
        "OpenVINO, on processors that have it.",
    )
    format: Literal["parquet", "npy"] = _output(
        "parquet", "parquet: one file per shard. npy: img_emb/*.npy and metadata/*.parquet, as clip-retrieval writes."
    )
    dtype: Literal["float32", "float16"] = _output("float32", "Of the stored embeddings: float32 or float16.")
    keep: tuple[str, ...] = _output(
        (),
        "Members of each sample that become columns, such as json,cls.",
        metavar="EXTENSIONS",
        parse=parse_extensions,
    )
    image: str | None = image_setting(panel="Input")
    limit: int | None = _input(None, "Only the first N samples of the input.", at_least=1)
    select: str | None = _input(None, "Only samples whose key matches.", metavar="GLOB")
    batch_size: int | None = _hardware(
        None,
        "Images per run of the model. auto: what `out` has; else 8 on a CPU, where more only fall out of the caches, "
        "and as many pixels as 256 images of 224 x 224 on a GPU. Halved where memory is short.",
        metavar="N|auto",
        shown="auto",
        parse=count_or_auto,
        at_least=1,
        at_most=MOST_IMAGES,
    )
    workers: int | None = _hardware(
        None,
        "Decoding processes, over all devices. auto: one per core; on a CPU they only take the time that the model "
        "leaves.",
        metavar="N|auto",
        shown="auto",
        parse=count_or_auto,
        at_least=1,
        at_most=MOST_PROCESSES,
    )
    num_splits: int | None = _machines(
        None, "Divide the input among N runs on one `out`.", shown="as srun or torchrun says"
    )
    split: int | str | None = _machines(
        None,
        "Which of them this is, from 0; or auto: what a SLURM array, or RANK and WORLD_SIZE, say.",
        metavar="N|auto",
        parse=parse_split,
    )
    retry: tuple[str, ...] = _output(
        (),
        "Embed shards again whose errors have one of these reasons, such as unreadable,unsupported_format; whole "
        "shards, no others. May be repeated.",
        metavar="REASONS",
    )
    overwrite: bool = _output(False, "Delete what is in `out` and make it anew.")
    verify: bool = _output(
        False,
        "At the end, read everything again, input and output: bytes, digests, keys, lengths, values. Exit 1 if "
        "anything is wrong.",
    )
    cache_gb: float = _input(50.0, "Gigabytes that remote shards may take in $MAEKIT_CACHE.", above=0)

    @property
    def reasons_to_retry(self) -> tuple[str, ...]:
        """The reasons of `retry`, each of which may be a list with commas."""
        return tuple(reason.strip() for reasons in self.retry for reason in reasons.split(","))

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
        known = sorted({*ImageError.REASONS} - {"no_label"})  # that one is of trainings
        for reason in self.reasons_to_retry:
            if reason not in known:
                raise InputError(f"`retry` {reason}: must be one of {', '.join(known)}")
        if self.devices and self.device != "auto":
            raise InputError(f"`device` = {self.device} and `devices` = {','.join(self.devices)}: give one of them")
        if "auto" in self.devices:
            raise InputError("`devices`: name each of them, such as 0,1")
        if "device_id" in self.provider_options:
            raise InputError("`provider_options` device_id: choose the GPU by `device=cuda:N`")
        if "://" in self.model:
            raise InputError(f"{self.model}: the model is read from a local file; download it first")
        if "://" in self.out:
            raise InputError(
                f"`out` {self.out}: write to a local or mounted directory, then copy it (aws s3 sync, gsutil)"
            )
