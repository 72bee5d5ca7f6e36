"""`maekit inspect`: describes a run, a checkpoint, a fine-tuning, an ONNX file, embeddings or a set of shards."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maekit import runs
from maekit.checking import check_shards
from maekit.config.check import InspectConfig
from maekit.config.settings import fields_of, load_toml
from maekit.embedding.commit_record import BOOKKEEPING, read_record, record_path, recorded_shards
from maekit.embedding.stored import is_embeddings
from maekit.encoder_file import METADATA_KEY, check_external_data, load_graph
from maekit.runs import FinetuneDirectory, RunDirectory
from maekit.shards.folder import TAR
from maekit.shards.spec import find_shards
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
        return _inspect_finetuned(FinetuneDirectory(path))
    if (path / runs.MANIFEST).is_file():
        run, checkpoint = runs.find_checkpoint(path)
        return {"kind": "checkpoint", "path": thing, "run": str(run.path), **checkpoint.state(), "valid": True}
    if is_embeddings(path):
        return _inspect_embeddings(path)
    if path.is_file() and not path.name.endswith(TAR):
        raise InputError(f"{thing} is none of the things maekit knows: a run, a checkpoint, an .onnx file, or shards")
    return {"kind": "shards", "path": thing, **check_shards(find_shards(thing)).summary()}


def _inspect_embeddings(path: Path) -> dict[str, Any]:
    """Summarise the commit records of an output directory."""
    found = {shard: read_record(path, shard) for shard in recorded_shards(path)}
    records = [record for record in found.values() if record is not None]
    return {
        "kind": "embeddings",
        "path": str(path),
        "shards": len(records),
        "rows": sum(record.rows for record in records),
        "errors": sum(record.errors for record in records),
        "bytes": sum(output["bytes"] for record in records for output in record.outputs),
        "without_embeddings": [str(record_path(path, shard)) for shard, record in found.items() if record is None],
        "made_with": _parsed((path / BOOKKEEPING / ".output.json").read_text(encoding="utf-8")),
    }


def _inspect_onnx(path: Path, *, providers: bool) -> dict[str, Any]:
    external = check_external_data(path)
    proto = load_graph(path)
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
        "nodes": _most_common(node.op_type for node in proto.graph.node),
        "maekit": own if isinstance(own, dict) or own is None else f"damaged: {str(own)[:60]!r}",
    }
    return {**description, "providers": _providers(path)} if providers else description


def _providers(path: Path) -> dict[str, Any]:
    """Return, per provider, the nodes of the optimised graph that it runs on this machine, or why it does not work.

    For OpenVINO, a runtime of its own, what it computes natively.
    """
    from maekit import openvino_runtime
    from maekit.providers import CPU, CUDA, OPENVINO, open_cpu, open_cuda

    cpu = open_cpu(path, threads=cores())
    cuda = open_cuda(path, "cuda", threads=cores())
    problem = cuda.problem
    said = f"does not work here: {problem.what}; {problem.fix}" if problem else _by_provider(cuda)
    absent = openvino_runtime.problem()
    openvino = f"does not work here: {absent.what}; {absent.fix}" if absent else openvino_runtime.capabilities()
    return {CPU: _by_provider(cpu), CUDA: said, OPENVINO: openvino}


def _by_provider(opened: "Opened") -> dict[str, dict[str, int]]:
    nodes: dict[str, list[str]] = {}
    for subgraph in opened.session.get_provider_graph_assignment_info():
        names = (".".join(filter(None, [node.domain, node.op_type])) for node in subgraph.get_nodes())
        nodes.setdefault(subgraph.ep_name, []).extend(names)
    return {provider: _most_common(names) for provider, names in nodes.items()}


def _most_common(names: Iterable[str]) -> dict[str, int]:
    """Return how often each name occurs, the most frequent first."""
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return f"damaged: {text[:60]!r}"


def _tensor_type(value: Any) -> str:
    import onnx

    tensor = value.type.tensor_type
    names = {number: name.lower() for name, number in onnx.TensorProto.DataType.items()}
    shape = ", ".join(d.dim_param or str(d.dim_value) for d in tensor.shape.dim)
    return f"{names.get(tensor.elem_type, 'unknown')} [{shape}]"


def _last(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the newest metrics; a validation has its own row, which is merged with the row before it."""
    *before, newest = rows or [{}]
    merged = newest if "loss" in newest or not before else before[-1] | newest
    return merged or None


def _inspect_finetuned(run: FinetuneDirectory) -> dict[str, Any]:
    tested = [row for row in run.metrics() if "accuracy" in row]
    found = {key: tested[-1][key] for key in ("step", "accuracy", "test_loss")} if tested else None
    return _described(run, "finetune", settings=load_toml(run.config_file)) | {"tested": found}


def _inspect_run(run: RunDirectory) -> dict[str, Any]:
    config = {key: value for key, value, _ in fields_of(run.config()) if value is not None}
    return _described(run, "run", config=config) | {"last": _last(run.metrics())}


def _described(run: RunDirectory, kind: str, **settings: dict[str, Any]) -> dict[str, Any]:
    """Return what the two kinds of training have in common."""
    return {
        "kind": kind,
        "path": str(run.path),
        "finished": run.encoder_file.is_file(),
        **settings,
        "checkpoints": [
            {"step": checkpoint.step, "problem": checkpoint.problem()} for checkpoint in run.list_checkpoints()
        ],
    }
