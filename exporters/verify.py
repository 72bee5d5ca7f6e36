"""`maekit export --verify`: check that a file gives the same output on this machine and provider as when exported."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maekit.encoder_file import (
    DIGEST,
    METADATA_KEY,
    EncoderDescription,
    check_digests,
    load_graph,
    metadata_digest,
    read_model,
)
from maekit.encoder_probe import pooled_rows, probe_images, rows_from_json
from maekit.exporters.parity import GATES, IMAGES, Embeddings, Gate, Parity, measure
from maekit.exporters.runtime import ExportedEncoder
from maekit.exporters.sampling import sample_images
from maekit.exporters.whitening import MATRIX, read_whitening
from maekit.images import Pixels
from maekit.system.errors import InputError
from maekit.system.model_file import ModelFile
from maekit.system.progress import Progress, Silent

if TYPE_CHECKING:
    from maekit.pretrained.load import TrainedEncoder

# Gates between two machines, not between PyTorch and the file: int8 hardly changes between machines, and fp16 little.
_SAME = {"fp32": GATES["fp32"], "fp16": Gate("min_cosine", 0.999), "int8": Gate("min_cosine", 0.999)}


_NORM_TOLERANCE = 2e-3
_FLOAT16, _INT8 = 10, 3  # of onnx.TensorProto.DataType
# What a file without a digest of its metadata leaves open: without the source of its weights, and with it.
_UNTOLD_BY_SOURCE = ("whitening.explained_variance", "whitening.images", "whitening.sample_sha256", "parity", "maekit")
_UNTOLD_BY_GRAPH = (
    *("model", "preprocess.resize", "preprocess.interpolation", "preprocess.crop_mode", "preprocess.mean"),
    *("preprocess.std", "pool", "checkpoint", *_UNTOLD_BY_SOURCE),
)


@dataclass(frozen=True)
class Verification:
    """Result of verifying a file; `--json` prints it.

    Attributes:
        path: the file.
        provider: execution provider that ran it.
        probe: comparison with the embeddings recorded at export, on synthetic images.
        parity: comparison with PyTorch on real images; None without the source of the weights. The figures that the
            file itself states are never taken for it.
        problems: the failed checks; empty if the file passes.
        unchecked: what of the metadata could not be checked, for a file without a digest of them.
    """

    path: str
    provider: str
    probe: Parity
    parity: Parity | None
    problems: tuple[str, ...]
    unchecked: tuple[str, ...] = ()


def verify(
    path: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    *,
    device: str = "auto",
    parity: Sequence[str] = (),
    model: str | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Run an exported file and compare its output with the embeddings recorded at export, and with PyTorch.

    Its metadata are held against the digest of them, against the graph, and against what an export of the source would
    state. Needs torch only if a source is given.

    Args:
        path: the ONNX file.
        source: source of its weights, as for `export`; None compares only with the recorded embeddings.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        parity: shards with the images to compare on; by default the training shards.
        model: timm's name of the architecture, for a weights file that does not give it.
        progress: receives progress updates.

    Raises:
        InputError: no such file, not from maekit, a device that does not work, or a source with other weights.
        MaekitError: the file gives other shapes, or values that are not finite.
    """
    path, progress = Path(path), progress or Silent()
    if source is None and (parity or model):
        name = "parity" if parity else "model"
        raise InputError(f"`{name}` needs the source of the weights, to compute what the file must give")
    read, proto, description, spec = _read(path)
    opened = ExportedEncoder(read, description.output, device=device)
    progress.note(f"{path} runs on {opened.provider}")
    try:
        gate, same = GATES[spec["precision"]], _SAME[spec["precision"]]
        recorded = spec["checkpoint"].get("sha256")
        whitening = read_whitening(proto, path.parent, spec["whitening"])
        dims = [dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim]
        if dims[1:3] != list(description.preprocess.size):
            raise ValueError(f"images of {description.preprocess.size}, and the graph takes {dims[1:3]}")
        probe = _probe(opened, description, spec["probe"])
        problems = [*_odd_metadata(spec, description), *_unlike_graph(spec, description, proto, opened)]
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"{path}: its {METADATA_KEY} metadata is damaged or older than `verify`: {error!r}") from error
    compared = {"it is not what it was when it was exported": (same, probe)}
    measured = None
    if source is not None:
        from maekit.pretrained.load import load_encoder
        from maekit.pretrained.torch_embedder import reference_embeddings

        size = description.preprocess.size
        trained = load_encoder(os.fspath(source), model=model, image_size=size, on_note=progress.note)
        if recorded != (here := trained.provenance.get("sha256")):
            raise InputError(f"{path} was exported from other weights ({recorded}) than {source} has ({here})")
        problems += _unlike_source(spec, description, trained)
        images = sample_images(parity or trained.shards, description.preprocess, IMAGES)
        expected = reference_embeddings(
            trained, images, pool=description.pool, normalize=description.normalize, whitening=whitening
        )
        measured = measure(opened.encode, images, expected, provider=opened.provider)
        compared["it differs from PyTorch"] = (gate, measured)
    differing = [f"{said}: {problem}" for said, (gate, found) in compared.items() if (problem := gate.problem(found))]
    unchecked = () if DIGEST in spec else _UNTOLD_BY_SOURCE if source is not None else _UNTOLD_BY_GRAPH
    return Verification(str(path), opened.provider, probe, measured, (*differing, *problems), unchecked)


def _read(path: Path) -> tuple[ModelFile, Any, EncoderDescription, dict[str, Any]]:
    """Return an exported file's bytes, graph, description, and all metadata; check the weights beside it."""
    read = read_model(path)
    proto = load_graph(path, read.content)
    metadata = {entry.key: entry.value for entry in proto.metadata_props}.get(METADATA_KEY)
    description = EncoderDescription.from_metadata(path, metadata, read.sha256)
    check_digests(description, read)
    return read, proto, description, json.loads(metadata or "{}")


def _odd_metadata(spec: dict[str, Any], description: EncoderDescription) -> Iterator[str]:
    """Yield what cannot be as export wrote it."""
    if DIGEST in spec and spec[DIGEST] != metadata_digest(spec):
        yield f"its {METADATA_KEY} metadata were changed after the export: the digest of their fields is another"
    known = json.loads(json.dumps(description.preprocess.to_json()))
    for key, value in spec["preprocess"].items():
        if known.get(key, value) != value:
            yield f"preprocess.{key} is {value}, and {known[key]} is what is done"


def _unlike_graph(
    spec: dict[str, Any], description: EncoderDescription, proto: Any, opened: ExportedEncoder
) -> Iterator[str]:
    """Yield each field that the graph, or what it gives, contradicts."""
    rows = opened.encode(probe_images(description.preprocess.size))
    initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
    types = {tensor.data_type for tensor in initializers.values()}
    precision = "fp16" if _FLOAT16 in types else "int8" if _INT8 in types else "fp32"
    matrix = initializers.get(MATRIX)
    found = {
        "dim": (description.dim, rows.shape[-1]),
        "normalize": (description.normalize, bool((abs(np.linalg.norm(rows, axis=-1) - 1) < _NORM_TOLERANCE).all())),
        "precision": (spec["precision"], precision),
        "whitening": (spec["whitening"] is not None, matrix is not None),
        "whitening.dim": ((spec["whitening"] or {}).get("dim"), matrix.dims[0] if matrix is not None else None),
    }
    for key, (stated, there) in found.items():
        if stated != there:
            yield f"{key} is stated as {stated}, and the graph has {there}"


def _unlike_source(spec: dict[str, Any], description: EncoderDescription, trained: "TrainedEncoder") -> Iterator[str]:
    """Yield each field that an export of the source would write in another way; `pool` shows in the embeddings."""
    provenance = json.loads(json.dumps(trained.provenance))
    stated = {"model": spec["model"], **{f"preprocess.{k}": v for k, v in vars(description.preprocess).items()}}
    there = {"model": trained.name, **{f"preprocess.{k}": v for k, v in vars(trained.preprocess).items()}}
    for key in (spec["checkpoint"].keys() & provenance.keys()) - {"file"}:  # a file may have been renamed since
        stated[f"checkpoint.{key}"], there[f"checkpoint.{key}"] = spec["checkpoint"][key], provenance[key]
    for key, value in sorted(stated.items()):
        if there[key] != value:
            yield f"{key} is stated as {value}, and the source has {there[key]}"


def _probe(opened: ExportedEncoder, description: EncoderDescription, recorded: dict[str, Any]) -> Parity:
    def encode(images: Pixels) -> Embeddings:
        return pooled_rows(opened.encode(images))

    images = probe_images(description.preprocess.size)
    return measure(encode, images, rows_from_json(recorded), provider=opened.provider)
