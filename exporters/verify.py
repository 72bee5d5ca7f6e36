"""`maekit export --verify`: check that a file gives the same output on this machine and provider as when exported."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maekit.encoder_file import METADATA_KEY, EncoderDescription, check_digests, check_external_data, load_graph
from maekit.exporters.parity import GATES, IMAGES, Embeddings, Gate, Parity, measure
from maekit.exporters.probe import pooled_rows, probe_images, rows_from_json
from maekit.exporters.runtime import ExportedEncoder
from maekit.exporters.sampling import sample_images
from maekit.exporters.whitening import read_whitening
from maekit.images import Pixels
from maekit.system import files
from maekit.system.errors import InputError
from maekit.system.progress import Progress, Silent

# Gates between two machines, not between PyTorch and the file: int8 hardly changes between machines, and fp16 little.
_SAME = {"fp32": GATES["fp32"], "fp16": Gate("min_cosine", 0.999), "int8": Gate("min_cosine", 0.999)}


@dataclass(frozen=True)
class Verification:
    """Result of verifying a file; `--json` prints it.

    Attributes:
        path: the file.
        provider: execution provider that ran it.
        probe: comparison with the embeddings recorded at export, on synthetic images.
        parity: comparison with PyTorch on real images; None without the source of the weights.
        problems: the failed checks; empty if the file passes.
    """

    path: str
    provider: str
    probe: Parity
    parity: Parity | None
    problems: tuple[str, ...]


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

    Needs torch only if a source is given.

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
    proto, description, spec = _read(path)
    opened = ExportedEncoder(path, description.output, device=device)
    progress.note(f"{path} runs on {opened.provider}")
    try:
        gate, same = GATES[spec["precision"]], _SAME[spec["precision"]]
        recorded = spec["checkpoint"].get("sha256")
        whitening = read_whitening(proto, path.parent, spec["whitening"])
        dims = [dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim]
        if dims[1:3] != list(description.preprocess.size):
            raise ValueError(f"images of {description.preprocess.size}, and the graph takes {dims[1:3]}")
        probe = _probe(opened, description, spec["probe"])
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"{path}: its {METADATA_KEY} metadata is damaged or older than `verify`: {error!r}") from error
    compared = {"it is not what it was when it was exported": (same, probe)}
    measured = None
    if source is not None:
        from maekit.pretrained.load import load_encoder
        from maekit.pretrained.torch_embedder import reference_embeddings

        trained = load_encoder(os.fspath(source), model=model, on_note=progress.note)
        if recorded != (here := trained.provenance.get("sha256")):
            raise InputError(f"{path} was exported from other weights ({recorded}) than {source} has ({here})")
        images = sample_images(parity or trained.shards, description.preprocess, IMAGES)
        expected = reference_embeddings(
            trained, images, pool=description.pool, normalize=description.normalize, whitening=whitening
        )
        measured = measure(opened.encode, images, expected, provider=opened.provider)
        compared["it differs from PyTorch"] = (gate, measured)
    problems = (f"{said}: {problem}" for said, (limit, found) in compared.items() if (problem := limit.problem(found)))
    return Verification(str(path), opened.provider, probe, measured, tuple(problems))


def _read(path: Path) -> tuple[Any, EncoderDescription, dict[str, Any]]:
    """Return an exported file's graph, its description, and all its metadata; check the weights beside it."""
    external = check_external_data(path)
    proto = load_graph(path)
    metadata = {entry.key: entry.value for entry in proto.metadata_props}.get(METADATA_KEY)
    description = EncoderDescription.from_metadata(path, metadata, files.sha256_file(path))
    check_digests(description, external)
    return proto, description, json.loads(metadata or "{}")


def _probe(opened: ExportedEncoder, description: EncoderDescription, recorded: dict[str, Any]) -> Parity:
    def encode(images: Pixels) -> Embeddings:
        return pooled_rows(opened.encode(images))

    images = probe_images(description.preprocess.size)
    return measure(encode, images, rows_from_json(recorded), provider=opened.provider)
