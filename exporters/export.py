"""`maekit export`: a run -> one verified ONNX file that holds preprocessing, encoder and pooling, and says so."""

import io
import json
import logging
import os
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch

import maekit
from maekit import files
from maekit.errors import InputError, MaekitError
from maekit.exporters.graph import POOLINGS, EmbeddingModule, reference_embeddings
from maekit.exporters.parity import FP32_LIMIT, Embeddings, Parity, compare, sample_images
from maekit.images import Pixels, Preprocess
from maekit.mae.weights import TrainedModel, load_trained
from maekit.progress import Progress, Silent

METADATA_KEY = "maekit"
OPSET = 23
_MAX_BYTES = 2_000_000_000  # protobuf's limit is 2 GiB, graph and metadata included


@dataclass(frozen=True)
class ExportResult:
    """What was written; `--json` prints it.

    Attributes:
        path: the file.
        dim: length of an embedding.
        parity: how far it is from PyTorch.
        bytes: size of the file.
        nodes: how many nodes of each operator it has.
    """

    path: str
    dim: int
    parity: Parity
    bytes: int
    nodes: dict[str, int]


def export(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    pool: str = "avg",
    normalize: bool = True,
    parity: Sequence[str] = (),
    progress: Progress | None = None,
) -> ExportResult:
    """Export the encoder of a run, compare the written file with PyTorch on real images, and keep it if they agree.

    Args:
        run: a run (its newest valid checkpoint) or one of its checkpoints.
        out: the ONNX file.
        pool: `avg` or `cls`; see `EmbeddingModule`.
        normalize: divide each embedding by its L2 norm.
        parity: shards with the images to compare on; the run's own by default.
        progress: where to show how it goes on.

    Raises:
        InputError: no such run, no images to compare on, or an impossible option.
        MaekitError: the file differs from PyTorch by more than 1e-4 of the largest value; none is left behind.
    """
    progress = progress or Silent()
    out = Path(out)
    if pool not in POOLINGS:
        raise InputError(f"--pool {pool}: must be one of {', '.join(POOLINGS)}")
    if out.is_dir() or out.suffix != ".onnx":
        raise InputError(f"--out {out}: must name a file that ends in .onnx")
    trained = load_trained(Path(run), progress.note)
    size = trained.config.model.image_size
    preprocess = Preprocess.for_size((size, size), trained.config.data.mean, trained.config.data.std)
    try:
        images = sample_images(parity or trained.config.shards, preprocess)
    except InputError as error:
        if parity:
            raise
        raise InputError(f"{error}; name shards with images to compare on: --parity SHARDS") from error
    encoder = trained.model.encoder
    weights = sum(p.numel() * p.element_size() for p in encoder.parameters())
    if weights > _MAX_BYTES:
        raise InputError(f"{run}: {weights / 1e9:.1f} GB of weights do not fit into one ONNX file (at most 2 GB)")
    progress.note(f"exporting the encoder of {trained.checkpoint.path} (step {trained.checkpoint.step})")
    proto = _to_onnx(EmbeddingModule(encoder, preprocess, pool=pool, normalize=normalize).eval(), images)

    def reference(pixels: Pixels) -> Embeddings:
        result: Embeddings = reference_embeddings(
            encoder, preprocess, torch.from_numpy(pixels), pool=pool, normalize=normalize
        ).numpy()
        return result

    measured: Parity | None = None
    with files.atomic_file(out) as file:
        # Compared as a file, before it gets its name; the figures then go into its metadata, the graph stays.
        file.write(proto.SerializeToString())
        file.flush()
        measured = compare(Path(file.name), images, reference)
        if not measured.max_relative_difference <= FP32_LIMIT:  # a NaN does not pass either
            raise MaekitError(
                f"the exported file differs from PyTorch by {measured.max_relative_difference:.1e} of the largest "
                f"value (at most {FP32_LIMIT:.0e} is accepted); no file is written"
            )
        _describe(proto, trained, preprocess, pool=pool, normalize=normalize, parity=measured)
        file.seek(0)
        file.truncate()
        file.write(proto.SerializeToString(deterministic=True))
    progress.note(f"parity with PyTorch: {measured.max_relative_difference:.1e} of the largest value")
    return ExportResult(str(out), encoder.embed_dim, measured, out.stat().st_size, node_census(proto))


def _to_onnx(module: EmbeddingModule, images: Pixels) -> onnx.ModelProto:
    example = torch.from_numpy(images[:2])
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # the exporter prints its progress
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["embeddings"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            external_data=False,
            verbose=False,
        )
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    # Where each node came from in the source: machine paths that help nobody who runs the file.
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        del value.metadata_props[:]
    del proto.graph.metadata_props[:]
    del proto.metadata_props[:]
    return proto


def _describe(
    proto: onnx.ModelProto,
    trained: TrainedModel,
    preprocess: Preprocess,
    *,
    pool: str,
    normalize: bool,
    parity: Parity,
) -> None:
    """Write into the file what a reader needs to use it and to know where it comes from."""
    state = trained.checkpoint.state()
    description = {
        "maekit": maekit.__version__,
        "model": trained.config.model.name,
        "preprocess": preprocess.to_json(),
        "pool": pool,
        "normalize": normalize,
        "dim": trained.model.encoder.embed_dim,
        "precision": "fp32",
        "checkpoint": {
            "step": trained.checkpoint.step,
            "sha256": trained.checkpoint.digest(),
            "data_digest": state["data_digest"],
        },
        "parity": parity.to_json(),
    }
    onnx.helper.set_model_props(proto, {METADATA_KEY: json.dumps(description)})
    proto.producer_name, proto.producer_version = "maekit", maekit.__version__


def node_census(proto: onnx.ModelProto) -> dict[str, int]:
    """Return how many nodes of each operator a graph has, most frequent first."""
    names, counts = np.unique([node.op_type for node in proto.graph.node], return_counts=True)
    return dict(sorted(zip(names.tolist(), counts.tolist(), strict=True), key=lambda item: (-item[1], item[0])))
