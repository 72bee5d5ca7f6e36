"""Records kept with an output: the options that made it, and a commit record per shard."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

BOOKKEEPING = "_maekit"


@dataclass(frozen=True)
class OutputOptions:
    """The options that determine the output's bytes; a directory has exactly one set.

    Attributes:
        model: SHA-256 of the ONNX file.
        provider: execution provider that runs the model.
        provider_options: the options given for that provider.
        format: `parquet` or `npy`.
        dtype: `float32` or `float16`.
        keep: extensions of the sidecars to store.
        select: a glob that keys must match, or None.
        limit: embed only the first N samples of the input, or None.
        batch_size: images per run of the model; it changes the last bits of the arithmetic.
        image: which member of a sample is its image; None for the only one.
        precision: `bf16`, or None for what the file says.
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
    image: str | None = None
    precision: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the options as JSON values; `image` and `precision`, which came later, only where set."""
        options = {**asdict(self), "keep": list(self.keep)}
        return {key: value for key, value in options.items() if value or key not in ("image", "precision")}


@dataclass(frozen=True)
class CommitRecord:
    """Proof that a shard is done: its input, its options and its output files.

    Attributes:
        shard: name of the shard.
        input_digest: digest of the shard's index.
        input_bytes: size of the shard.
        input_content: CRC-32 over the CRC-32s of its images, followed by those of the stored sidecars.
        input_version: changes with the shard: size and mtime, or the server's version; None if unknown.
        first: only the first N selected samples were embedded, because of the run's limit; None for all.
        options: the output options; `batch_size` is the one that was really used.
        providers: the session's providers, first choice first.
        nodes: number of the model's nodes on each provider.
        keys: selected samples; rows + errors = keys.
        rows: keys with an embedding.
        errors: keys without one.
        outputs: path below the output directory, SHA-256 and bytes of each file; empty if there is no row.
        unused: number of images, or of files in a folder, that are the image of no sample, by kind.
        runtime: name and version of what ran the model; empty in records of earlier versions.
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
    unused: dict[str, int] = field(default_factory=dict)
    runtime: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values; `unused` is left out where nothing is unused."""
        return {key: value for key, value in asdict(self).items() if value or key not in ("unused", "runtime")}

    @classmethod
    def from_json(cls, raw: dict[str, Any] | None, name: str) -> "CommitRecord | None":
        """Return a shard's record from the JSON of its file; None if that is no valid record of this shard."""
        try:
            record = cls(**(raw or {}))
        except TypeError:
            return None
        is_sound = (
            record.shard == name
            and all(_is_a(f.type, getattr(record, f.name)) for f in fields(cls))
            and all(_is_output(output) for output in record.outputs)
            and record.rows + record.errors == record.keys
        )
        return record if is_sound else None


def _is_a(kind: Any, value: Any) -> bool:
    """Whether a value read from JSON has the type of a record's field; true and false are no numbers."""
    return isinstance(value, getattr(kind, "__origin__", kind)) and not isinstance(value, bool)


def _is_output(output: Any) -> bool:
    if not isinstance(output, dict) or not is_below(output.get("path")):
        return False
    return _is_a(str, output.get("sha256")) and _is_a(int, output.get("bytes"))


def is_below(path: Any) -> bool:
    """Whether a path in a record lies inside the output directory and outside its bookkeeping folder."""
    parts = Path(path).parts if isinstance(path, str) else ()
    return bool(parts) and ".." not in parts and parts[0] not in ("/", BOOKKEEPING)


def recorded_shards(out: Path) -> list[str]:
    """Return the names of all shards that have a record in an output directory, sorted; damaged ones included."""
    folder = out / BOOKKEEPING
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*.json"))]
    return [n.as_posix().removesuffix(".json") for n in names if not any(part.startswith(".") for part in n.parts)]


def record_path(out: Path, name: str) -> Path:
    """Return where the record of a shard lies in an output directory."""
    return out / BOOKKEEPING / f"{name}.json"


def read_record(out: Path, name: str) -> CommitRecord | None:
    """Return the record of a shard; None if there is none, or if it is damaged."""
    return CommitRecord.from_json(read_json(record_path(out, name)), name)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file; None if it cannot be read or holds something else."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return loaded if isinstance(loaded, dict) else None
