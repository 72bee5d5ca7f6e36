"""What embedding writes: one parquet file per shard, its errors, and the commit record that makes both count.

OUT/a/000.parquet                   rows of shard a/000.tar, in tar order
OUT/_maekit/.output.json            which model and options this directory belongs to
OUT/_maekit/a/000.tar.json          commit record of a shard, written last
OUT/_maekit/errors/a/000.tar.jsonl  every key that has no row, with the reason
OUT/_maekit/.tmp/                   unfinished files (a shard lies in no hidden folder)
"""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from maekit import files
from maekit.embedding.pipeline import ShardResult
from maekit.embedding.session import ModelDescription
from maekit.errors import InputError
from maekit.shards.index import ShardIndex
from maekit.shards.spec import TAR, ShardFile

DTYPES = {"float32": pa.float32(), "float16": pa.float16()}
BOOKKEEPING = "_maekit"
_OUTPUT = ".output.json"
_SCRATCH = ".tmp"


@dataclass(frozen=True)
class OutputOptions:
    """What decides the bytes of the output; one directory has one set of them.

    Attributes:
        model: SHA-256 of the ONNX file.
        dtype: `float32` or `float16`.
        batch_size: images per run; sizes change the last bits of the arithmetic.
        provider: where the model runs, likewise.
    """

    model: str
    dtype: str
    batch_size: int
    provider: str


@dataclass(frozen=True)
class CommitRecord:
    """That a shard is done, from what, and into what.

    Attributes:
        shard: its name.
        input_digest: digest of its index.
        input_bytes: its size.
        input_content: CRC-32 over the CRC-32s of its images.
        input_version: a mark that changes with the shard (size and time, or what a server gives), None where unknown.
        options: how it was embedded.
        rows: keys with an embedding.
        errors: keys without; rows + errors = keys.
        output: the file's path below the output directory; None where there is no row.
        output_sha256: the file's digest.
        output_bytes: its size.
    """

    shard: str
    input_digest: str
    input_bytes: int
    input_content: int
    input_version: str | None
    options: dict[str, Any]
    rows: int
    errors: int
    output: str | None
    output_sha256: str | None
    output_bytes: int


class OutputDirectory:
    """A directory of embeddings.

    Args:
        path: the directory, new or of an earlier run.
        model: the encoder.
        options: what decides its bytes.
    """

    def __init__(self, path: Path, model: ModelDescription, options: OutputOptions) -> None:
        self.path, self._model, self._options = path, model, options
        self.bookkeeping = path / BOOKKEEPING

    def claim(self, *, overwrite: bool) -> None:
        """Make the directory this model's, or see that it already is.

        Raises:
            InputError: it belongs to another model or other options, or holds foreign files.
        """
        mark = self.bookkeeping / _OUTPUT
        wanted = asdict(self._options)
        if mark.is_file():
            there = _read_json(mark) or {}
            differing = [key for key in wanted if there.get(key) != wanted[key]]
            if differing and not overwrite:
                key = differing[0]
                raise InputError(
                    f"{self.path} was made with {key} = {there.get(key)}, and {wanted[key]} is asked for now; "
                    "choose another --out, or --overwrite to delete what is there"
                )
            if overwrite:
                self._clear()
        shutil.rmtree(self._scratch, ignore_errors=True)
        files.write_atomically(mark, json.dumps(wanted, indent=1).encode(), scratch=self._scratch)

    def refuse_foreign(self) -> None:
        """See that the directory is new, empty, or an output of embedding.

        Raises:
            InputError: it is something else.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file; --out names a directory")
        if self.path.is_dir() and not self.bookkeeping.is_dir():
            names = sorted(p.name for p in self.path.iterdir())
            if names:
                raise InputError(f"{self.path} holds {names[0]} and is no output of `maekit embed`; choose a new --out")

    def committed(self, shard: ShardFile) -> CommitRecord | None:
        """Return a shard's commit record if model and options are still the same and its file is there."""
        try:
            record = CommitRecord(**(_read_json(self._record(shard)) or {}))
        except TypeError:
            return None
        if record.options != asdict(self._options):
            return None
        if record.output is not None:
            file = self.path / record.output
            if not file.is_file() or file.stat().st_size != record.output_bytes:
                return None
        return record

    def renew(self, record: CommitRecord, version: str | None) -> None:
        """Note that a shard looks different now and holds the same: the next run need not read it.

        Raises:
            MaekitError: the record cannot be written.
        """
        self._write_record(dataclasses.replace(record, input_version=version))

    def write(
        self, shard: ShardFile, index: ShardIndex, result: ShardResult, version: str | None = None
    ) -> CommitRecord:
        """Write rows, then errors, then the record; a kill in between leaves the shard to be done again.

        Raises:
            MaekitError: the disk is full or the place is not writable; names the path.
        """
        target = self.path / _output_name(shard)
        errors_file = self.bookkeeping / "errors" / f"{shard.name}.jsonl"
        if result.ordinals:
            with files.atomic_file(target, scratch=self._scratch) as file:
                pq.write_table(
                    self._table(shard, index, result),
                    file,
                    compression={"key": "zstd", "shard": "zstd", "index": "zstd", "embedding.list.element": "none"},
                    use_dictionary=["shard"],
                    column_encoding={"index": "DELTA_BINARY_PACKED"},
                )
        else:
            target.unlink(missing_ok=True)
        lines = [
            {"key": row.key, "index": row.ordinal, "reason": row.reason, "detail": row.detail} for row in result.errors
        ]
        if lines:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            files.write_atomically(errors_file, text.encode(), scratch=self._scratch)
        else:
            errors_file.unlink(missing_ok=True)
        written = bool(result.ordinals)
        record = CommitRecord(
            shard=shard.name,
            input_digest=index.digest,
            input_bytes=index.size,
            input_content=result.content,
            input_version=version,
            options=asdict(self._options),
            rows=len(result.ordinals),
            errors=len(result.errors),
            output=_output_name(shard) if written else None,
            output_sha256=files.sha256_file(target) if written else None,
            output_bytes=target.stat().st_size if written else 0,
        )
        self._write_record(record)
        return record

    def _write_record(self, record: CommitRecord) -> None:
        path = self.bookkeeping / f"{record.shard}.json"
        files.write_atomically(path, json.dumps(asdict(record), indent=1).encode(), scratch=self._scratch)

    def write_damage(self, shard: ShardFile, reason: str) -> None:
        """Record that a shard that was never embedded cannot be; it is judged again by the next run.

        Raises:
            MaekitError: the record cannot be written.
        """
        text = json.dumps({"shard": shard.name, "damaged": reason}, indent=1)
        files.write_atomically(self._record(shard), text.encode(), scratch=self._scratch)

    def orphans(self, shards: Sequence[ShardFile]) -> list[CommitRecord]:
        """Return the records of committed shards that the input does not hold."""
        names = {shard.name for shard in shards}
        orphans = []
        for path in sorted(self.bookkeeping.rglob("*.json")):
            name = path.relative_to(self.bookkeeping).as_posix().removesuffix(".json")
            if path.name != _OUTPUT and name not in names:
                record = self.committed(ShardFile(name, path))
                if record is not None:
                    orphans.append(record)
        return orphans

    def _table(self, shard: ShardFile, index: ShardIndex, result: ShardResult) -> pa.Table:
        values = result.embeddings.astype(self._options.dtype, copy=False)
        element = DTYPES[self._options.dtype]
        embeddings = pa.FixedSizeListArray.from_arrays(
            pa.array(np.ascontiguousarray(values).ravel(), element), values.shape[1]
        )
        footer = {
            "model_sha256": self._model.sha256,
            "pool": self._model.pool,
            "normalize": self._model.normalize,
            "preprocess": self._model.preprocess.to_json(),
        }
        schema = pa.schema(
            [
                pa.field("key", pa.string(), nullable=False),
                pa.field("shard", pa.string(), nullable=False),
                pa.field("index", pa.int32(), nullable=False),
                pa.field("embedding", pa.list_(element, values.shape[1]), nullable=False),
            ],
            metadata={"maekit": json.dumps(footer)},
        )
        columns = [
            pa.array([index.key(ordinal) for ordinal in result.ordinals], pa.string()),
            pa.array([shard.name] * len(result.ordinals), pa.string()),
            pa.array(result.ordinals, pa.int32()),
            embeddings,
        ]
        return pa.Table.from_arrays(columns, schema=schema)

    def _clear(self) -> None:
        """Delete what embedding wrote here, and nothing else."""
        for path in sorted(self.bookkeeping.rglob("*.json")):
            output = (_read_json(path) or {}).get("output")
            if isinstance(output, str) and ".." not in Path(output).parts and not Path(output).is_absolute():
                (self.path / output).unlink(missing_ok=True)
        for child in self.bookkeeping.iterdir():
            if child.is_dir():
                shutil.rmtree(child)
            elif child.name != ".lock":
                child.unlink()

    @property
    def _scratch(self) -> Path:
        return self.bookkeeping / _SCRATCH

    def _record(self, shard: ShardFile) -> Path:
        return self.bookkeeping / f"{shard.name}.json"


def check_output_names(shards: Sequence[ShardFile]) -> None:
    """Refuse two shards that would write one file, such as `x` and `x.tar`.

    Raises:
        InputError: names both.
    """
    owners: dict[str, ShardFile] = {}
    for shard in shards:
        owner = owners.setdefault(_output_name(shard), shard)
        if owner is not shard:
            raise InputError(
                f"{owner.path} and {shard.path} would both write {_output_name(shard)}; rename one of them"
            )


def _output_name(shard: ShardFile) -> str:
    return f"{shard.name.removesuffix(TAR)}.parquet"


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return loaded if isinstance(loaded, dict) else None
