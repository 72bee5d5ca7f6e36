"""`maekit inspect`: describes a run, a checkpoint, a fine-tuning, an ONNX file, embeddings or a set of shards."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maekit import runs
from maekit.checking import CheckReport, check_shards
from maekit.config.check import InspectConfig
from maekit.config.settings import fields_of, load_toml
from maekit.embedding.commit_record import BOOKKEEPING, read_record, record_path, recorded_shards
from maekit.embedding.stored import is_embeddings
from maekit.encoder_file import METADATA_KEY, check_external_data, load_graph
from maekit.runs import RunDirectory
from maekit.shards.spec import TAR, find_shards
from maekit.system.errors import InputError
from maekit.system.machine import cores

if TYPE_CHECKING:
    from maekit.providers import Opened


def inspect(config: InspectConfig) -> dict[str, Any]:
    """Describe the object at a path as JSON values; the key `kind` gives its type.

    Raises:
        InputError: the path does not exist, is of no known kind, or cannot be read.
    """
    thing, providers = config.thing, config.providers
    path = Path(thing)
    if path.suffix == ".onnx":
        return _inspect_onnx(path, providers=providers)
    if providers:
        raise InputError(f"`providers` is for .onnx files, and {thing} is none")
    if runs.is_run(path):
        return _inspect_run(RunDirectory(path))
    if runs.is_finetuned(path):
        return _inspect_finetuned(runs.FinetuneDirectory(path))
    if (path / runs.MANIFEST).is_file():
        run, checkpoint = runs.find_checkpoint(path)
        return {"kind": "checkpoint", "path": thing, "run": str(run.path), **checkpoint.state(), "valid": True}
    if is_embeddings(path):
        return _inspect_embeddings(path)
    if path.is_file() and not path.name.endswith(TAR):
        raise InputError(f"{thing} is none of the things maekit knows: a run, a checkpoint, an .onnx file, or shards")
    report: CheckReport = check_shards(find_shards(thing))
    return {"kind": "shards", "path": thing, **report.summary()}


def _inspect_embeddings(path: Path) -> dict[str, Any]:
    """Summarise the commit records of an output directory."""
    totals = {"shards": 0, "rows": 0, "errors": 0, "bytes": 0}
    damaged = []
    for shard in recorded_shards(path):
        record = read_record(path, shard)
        if record is None:
            damaged.append(str(record_path(path, shard)))
            continue
        totals["shards"] += 1
        totals["rows"] += record.rows
        totals["errors"] += record.errors
        totals["bytes"] += sum(output["bytes"] for output in record.outputs)
    options = _parsed((path / BOOKKEEPING / ".output.json").read_text(encoding="utf-8"))
    return {"kind": "embeddings", "path": str(path), **totals, "without_embeddings": damaged, "made_with": options}


def _inspect_onnx(path: Path, *, providers: bool) -> dict[str, Any]:
    external = check_external_data(path)
    proto = load_graph(path)
    counts: dict[str, int] = {}
    for node in proto.graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    metadata = {entry.key: entry.value for entry in proto.metadata_props}.get(METADATA_KEY)
    own = _parsed(metadata) if metadata else None
    if isinstance(own, dict):
        own.pop("probe", None)  # thousands of numbers, of use only to `export --verify`
    description = {
        "kind": "onnx",
        "path": str(path),
        "bytes": sum(file.stat().st_size for file in (path, *external)),
        **({"weights_in": [file.name for file in external]} if external else {}),
        "opset": {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import},
        "inputs": {value.name: _tensor_type(value) for value in proto.graph.input},
        "outputs": {value.name: _tensor_type(value) for value in proto.graph.output},
        "nodes": dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
        "maekit": own if isinstance(own, dict) or own is None else f"damaged: {str(own)[:60]!r}",
    }
    return {**description, "providers": _providers(path)} if providers else description


def _providers(path: Path) -> dict[str, Any]:
    """Return, per provider, the nodes of the optimised graph that it runs on this machine, or why it does not work."""
    from maekit.providers import CPU, CUDA, open_cpu, open_cuda

    threads = cores()
    cuda = open_cuda(path, "cuda", threads=threads)
    found: dict[str, Any] = {CPU: _by_provider(open_cpu(path, threads=threads))}
    problem = cuda.problem
    found[CUDA] = f"does not work here: {problem.what}; {problem.fix}" if problem else _by_provider(cuda)
    return found


def _by_provider(opened: "Opened") -> dict[str, dict[str, int]]:
    nodes: dict[str, dict[str, int]] = {}
    for part in opened.session.get_provider_graph_assignment_info():
        counts = nodes.setdefault(part.ep_name, {})
        for node in part.get_nodes():
            name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            counts[name] = counts.get(name, 0) + 1
    return {name: dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))) for name, counts in nodes.items()}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return f"damaged: {text[:60]!r}"


def _tensor_type(value: Any) -> str:
    import onnx

    tensor = value.type.tensor_type
    known = onnx.TensorProto.DataType.values()
    name = onnx.TensorProto.DataType.Name(tensor.elem_type).lower() if tensor.elem_type in known else "unknown"
    shape = [d.dim_param or str(d.dim_value) for d in tensor.shape.dim]
    return f"{name} [{', '.join(shape)}]"


def _last(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the newest metrics; a held-out loss has its own row, which is merged with the row before it."""
    merged: dict[str, Any] = {}
    for row in rows[-1:] if rows and "loss" in rows[-1] else rows[-2:]:
        merged |= row
    return merged or None


def _inspect_finetuned(run: runs.FinetuneDirectory) -> dict[str, Any]:
    tested = [row for row in run.metrics() if "accuracy" in row]
    return {
        "kind": "finetune",
        "path": str(run.path),
        "finished": run.encoder_file.is_file(),
        "settings": load_toml(run.config_file),
        "checkpoints": [{"step": c.step, "problem": c.problem()} for c in run.list_checkpoints()],
        "tested": {key: tested[-1][key] for key in ("step", "accuracy", "test_loss")} if tested else None,
    }


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
