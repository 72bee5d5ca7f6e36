"""`maekit inspect`: what a run, a checkpoint, an ONNX file or a set of shards is."""

import json
from pathlib import Path
from typing import Any

from maekit import runs
from maekit.check import CheckReport, check_shards
from maekit.config import fields_of
from maekit.embedding.records import BOOKKEEPING, CommitRecord
from maekit.errors import InputError
from maekit.runs import RunDirectory
from maekit.shards.spec import TAR, find_shards


def inspect(thing: str) -> dict[str, Any]:
    """Describe what a path names, as JSON values; the key `kind` says what it is.

    Raises:
        InputError: there is no such thing, or it cannot be read.
    """
    path = Path(thing)
    if path.suffix == ".onnx":
        return _inspect_onnx(path)
    if runs.is_run(path):
        return _inspect_run(RunDirectory(path))
    if (path / runs.MANIFEST).is_file():
        run, checkpoint = runs.find_checkpoint(path)
        return {"kind": "checkpoint", "path": thing, "run": str(run.path), **checkpoint.state(), "valid": True}
    if (path / BOOKKEEPING / ".output.json").is_file():
        return _inspect_embeddings(path)
    if path.is_file() and not path.name.endswith(TAR):
        raise InputError(f"{thing} is none of the things maekit knows: a run, a checkpoint, an .onnx file, or shards")
    report: CheckReport = check_shards(find_shards(thing))
    return {"kind": "shards", "path": thing, **report.summary()}


def _inspect_embeddings(path: Path) -> dict[str, Any]:
    """Sum up the commit records of an output directory."""
    totals = {"shards": 0, "rows": 0, "errors": 0, "bytes": 0}
    damaged = []
    folder = path / BOOKKEEPING
    for file in sorted(folder.rglob("*.json")):
        name = file.relative_to(folder)
        if any(part.startswith(".") for part in name.parts):
            continue
        there = _parsed(file.read_text(encoding="utf-8"))
        shard = name.as_posix().removesuffix(".json")
        record = CommitRecord.from_json(there if isinstance(there, dict) else None, shard)
        if record is None:
            damaged.append(str(file))
            continue
        totals["shards"] += 1
        totals["rows"] += record.rows
        totals["errors"] += record.errors
        totals["bytes"] += sum(output["bytes"] for output in record.outputs)
    options = _parsed((folder / ".output.json").read_text(encoding="utf-8"))
    return {"kind": "embeddings", "path": str(path), **totals, "without_embeddings": damaged, "made_with": options}


def _inspect_onnx(path: Path) -> dict[str, Any]:
    import onnx

    try:
        proto = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # protobuf's decode error has no public name
        raise InputError(f"{path} is no ONNX file: {str(error).splitlines()[0]}") from error
    if not proto.graph.node:
        raise InputError(f"{path} is no ONNX file: it holds no graph")
    counts: dict[str, int] = {}
    for node in proto.graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    own = {entry.key: entry.value for entry in proto.metadata_props}.get("maekit")
    return {
        "kind": "onnx",
        "path": str(path),
        "bytes": path.stat().st_size,
        "opset": {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import},
        "inputs": {value.name: _tensor_type(value) for value in proto.graph.input},
        "outputs": {value.name: _tensor_type(value) for value in proto.graph.output},
        "nodes": dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
        "maekit": _parsed(own) if own else None,
    }


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return f"damaged: {text[:60]!r}"


def _tensor_type(value: Any) -> str:
    import onnx

    tensor = value.type.tensor_type
    name = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    shape = [d.dim_param or str(d.dim_value) for d in tensor.shape.dim]
    return f"{name} [{', '.join(shape)}]"


def _last(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the newest value of each kind; a held-out loss has rows of its own."""
    merged: dict[str, Any] = {}
    for row in rows[-1:] if rows and "loss" in rows[-1] else rows[-2:]:
        merged |= row
    return merged or None


def _inspect_run(run: RunDirectory) -> dict[str, Any]:
    checkpoints = [{"step": checkpoint.step, "problem": checkpoint.problem()} for checkpoint in run.list_checkpoints()]
    rows = run.metrics()
    return {
        "kind": "run",
        "path": str(run.path),
        "finished": run.encoder_file.is_file(),
        "config": {key: value for key, value, _ in fields_of(run.config()) if value is not None},
        "checkpoints": checkpoints,
        "last": _last(rows),
    }
