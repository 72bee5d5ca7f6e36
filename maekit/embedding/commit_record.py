"""What is noted of an output: the options it was made with, and for each shard that it is done, or what has no row."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BOOKKEEPING = "_maekit"


@dataclass(frozen=True)
class OutputOptions:
    """What decides the bytes of the output; one directory has one set of them.

    Attributes:
        model: SHA-256 of the ONNX file.
        provider: where the model runs.
        provider_options: that were given for it.
        format: `parquet` or `npy`.
        dtype: `float32` or `float16`.
        keep: extensions of members that ride along.
        select: a glob of keys, or None.
        limit: how many samples of the input are embedded, or None.
        batch_size: images per run; sizes change the last bits of the arithmetic.
    """

    model: str
    provider: str
    provider_options: dict[str, str]
    format: str
    dtype: str
    keep: tuple[str, ...]
    select: str | None
    limit: int | None
    batch_size: int

    def to_json(self) -> dict[str, Any]:
        """Return the options as JSON values."""
        return {**asdict(self), "keep": list(self.keep)}


@dataclass(frozen=True)
class CommitRecord:
    """That a shard is done, from what, and into what.

    Attributes:
        shard: its name.
        input_digest: digest of its index.
        input_bytes: its size.
        input_content: CRC-32 over the CRC-32s of its images, then of the members kept.
        input_version: a mark that changes with the shard (size and time, or what a server gives), None where unknown.
        first: how many samples of it were within the limit of the run; None without one.
        options: how it was embedded; `batch_size` is the one that was used.
        providers: those of the session, first choice first.
        nodes: how many nodes of the model each provider took.
        keys: samples meant; rows + errors = keys.
        rows: keys with an embedding.
        errors: keys without.
        outputs: path below the output directory, SHA-256 and bytes of each file; none where there is no row.
    """

    shard: str
    input_digest: str
    input_bytes: int
    input_content: int
    input_version: str | None
    first: int | None
    options: dict[str, Any]
    providers: list[str]
    nodes: dict[str, int]
    keys: int
    rows: int
    errors: int
    outputs: list[dict[str, Any]]

    @classmethod
    def from_json(cls, raw: dict[str, Any] | None, name: str) -> "CommitRecord | None":
        """Return the record of a shard from what its file holds; None where it is none, or was edited into nonsense."""
        try:
            record = cls(**(raw or {}))
        except TypeError:
            return None
        texts = (record.shard, record.input_digest)
        numbers = (record.input_bytes, record.input_content, record.keys, record.rows, record.errors)
        is_sound = (
            record.shard == name
            and all(isinstance(text, str) for text in texts)
            and all(type(number) is int for number in numbers)
            and (record.input_version is None or isinstance(record.input_version, str))
            and (record.first is None or type(record.first) is int)
            and isinstance(record.options, dict)
            and isinstance(record.outputs, list)
            and all(_is_output(output) for output in record.outputs)
            and record.rows + record.errors == record.keys
        )
        return record if is_sound else None


@dataclass(frozen=True)
class ErrorRow:
    """A key that gets no embedding: its place in the shard, a reason code, and what was found."""

    ordinal: int
    key: str
    reason: str
    detail: str


def _is_output(output: Any) -> bool:
    return (
        isinstance(output, dict)
        and is_below(output.get("path"))
        and isinstance(output.get("sha256"), str)
        and type(output.get("bytes")) is int
    )


def is_below(path: Any) -> bool:
    """Whether a path that a record names lies in the output and not among the bookkeeping."""
    parts = Path(path).parts if isinstance(path, str) else ()
    return bool(parts) and ".." not in parts and parts[0] not in ("/", BOOKKEEPING)
