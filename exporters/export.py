"""`maekit export`: write one verified ONNX file with preprocessing, encoder and pooling, described in its metadata."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from maekit.config.export import ExportConfig
from maekit.config.poolings import UNPOOLED
from maekit.encoder_file import DIGEST, EMBEDDINGS, METADATA_KEY, TOKENS, metadata_digest
from maekit.encoder_probe import probe_images, rows_to_json
from maekit.exporters.graph import EmbeddingModule, check_exportable
from maekit.exporters.parity import GATES, IMAGES, Parity, measure
from maekit.exporters.quantization import quantize
from maekit.exporters.runtime import ExportedEncoder
from maekit.exporters.sampling import Sample, sample_images
from maekit.exporters.timm_format import refuse_foreign_directory, write_timm
from maekit.exporters.trace import node_census, to_onnx
from maekit.exporters.writing import new_model
from maekit.images import Pixels
from maekit.mae.device import choose_device, device_errors
from maekit.pretrained.load import TrainedEncoder, load_encoder
from maekit.pretrained.torch_embedder import reference_embeddings
from maekit.system import files
from maekit.system.errors import InputError, MaekitError
from maekit.system.progress import Progress, Silent
from maekit.vectors.whitening import Whitening, fit_whitening
from maekit.version import __version__

_CALIBRATION_IMAGES = 64


@dataclass(frozen=True)
class ExportResult:
    """Summary of the export; `--json` prints it.

    Attributes:
        path: the ONNX file, or timm's directory.
        dim: length of an embedding.
        parity: difference from PyTorch; None for timm's format, which is bit-identical.
        bytes: total size of the written files.
        nodes: number of nodes per operator in the graph.
        whitening: description of the fitted whitening, or None.
        warning: the failed parity gate of a file that `force` kept.
    """

    path: str
    dim: int
    parity: Parity | None
    bytes: int
    nodes: dict[str, int]
    whitening: dict[str, Any] | None = None
    warning: str | None = None


def export(config: ExportConfig, progress: Progress | None = None) -> ExportResult:
    """Export an encoder, compare the written file with PyTorch on real images, and keep it if they agree.

    Args:
        config: the source (see `maekit.pretrained.sources`), the file, and what it computes.
        progress: receives progress updates.

    Raises:
        InputError: no such model, no images to compare on, an impossible option, or a path that is not writable.
        MaekitError: the file differs from PyTorch by more than its precision allows; no file is left behind.
    """
    progress, out = progress or Silent(), Path(config.out)
    config.validate()
    if config.format == "timm":
        refuse_foreign_directory(out)
    elif out.is_dir() or out.suffix != ".onnx":
        raise InputError(f"`out` {out}: must name a file that ends in .onnx")
    files.require_writable(out.parent)
    trained = load_encoder(config.source, model=config.model, image_size=config.image_size, on_note=progress.note)
    check_exportable(trained.encoder, config.pooling)
    device = choose_device("auto" if config.whiten else "cpu")
    images = _comparison_images(trained, config)
    if config.format == "timm":
        size = sum(file.stat().st_size for file in write_timm(trained, out, images, progress.note))
        return ExportResult(str(out), trained.encoder.embed_dim, None, size, {})
    whitening = _fit(trained, config, device, progress) if config.whiten else None
    return _write(trained, config, whitening, images, progress)


def _comparison_images(trained: TrainedEncoder, config: ExportConfig) -> Pixels:
    """Return the calibration images followed by the comparison images."""
    count = IMAGES + (_CALIBRATION_IMAGES if config.precision == "int8" else 0)
    try:
        if config.parity:
            return sample_images(config.parity, trained.preprocess, count, image=config.image or trained.image)
        return sample_images(trained.shards, trained.preprocess, count, image=trained.image)
    except InputError as error:
        if config.parity:
            raise
        said = str(error) if trained.shards else f"{config.source} does not say what it was trained on"
        raise InputError(f"{said}; name shards with images to compare on: `parity` SHARDS") from error


def _fit(trained: TrainedEncoder, config: ExportConfig, device: str, progress: Progress) -> Whitening:
    """Fit the whitening, with the encoder on the device."""
    trained.encoder.to(device)
    sample = Sample(config.whiten, trained.preprocess, config.whiten_images, image=config.image or trained.image)
    sample.refuse_ambiguous()

    def batches() -> Any:
        done = 0
        for images in sample:
            yield reference_embeddings(trained, images, pool=config.pooling, normalize=False)
            done += len(images)
            progress.advance(done)

    progress.start("whiten", len(sample))
    try:
        with device_errors():
            whitening = fit_whitening(batches(), config.whiten_dim, sample.digest)
    finally:
        progress.stop()
        trained.encoder.to("cpu")
    said = f"whitening: {whitening.dim} directions with {whitening.explained_variance:.2%} of the variance"
    progress.note(f"{said} of {whitening.images} images")
    return whitening


def _write(
    trained: TrainedEncoder, config: ExportConfig, whitening: Whitening | None, images: Pixels, progress: Progress
) -> ExportResult:
    """Write the graph, measure the written file, add its metadata, and move it to its final name."""
    progress.note(f"tracing {trained.name} at opset {config.opset}")
    proto, out = _trace(trained, config, whitening, images), Path(config.out)
    if config.precision == "int8":
        progress.note(f"calibrating int8 on {min(len(images), _CALIBRATION_IMAGES)} images")
        proto = quantize(proto, images[:_CALIBRATION_IMAGES])
        if len(images) >= 2 * _CALIBRATION_IMAGES:
            images = images[_CALIBRATION_IMAGES:]
        else:
            progress.note(f"only {len(images)} images: int8 is compared on those it is calibrated on as well")
    elif len(images) < IMAGES:
        progress.note(f"compared on {len(images)} images only, there are no more")
    expected = reference_embeddings(
        trained, images, pool=config.pooling, normalize=config.normalize, whitening=whitening
    )
    with new_model(out, proto) as model:
        # The written file is compared before it gets its final name. The figures then go into its metadata; the graph
        # does not change.
        device = "auto" if config.precision == "fp16" else "cpu"
        opened = ExportedEncoder(model.path, proto.graph.output[0].name, device=device)
        parity = measure(opened.encode, images, expected, provider=opened.provider)
        warning = GATES[config.precision].problem(parity)
        if warning and not config.force:
            raise MaekitError(f"the exported file differs from PyTorch: {warning}; none is written (`force` keeps it)")
        probe = rows_to_json(opened.encode(probe_images(trained.preprocess.size)))
        description = {
            "maekit": __version__,
            "model": trained.name,
            "preprocess": trained.preprocess.to_json(),
            "pool": config.pooling,
            "normalize": config.normalize,
            "whitening": whitening.to_json() if whitening else None,
            "dim": probe["shape"][-1],
            "precision": config.precision,
            "checkpoint": trained.provenance,
            "parity": asdict(parity),
            "probe": probe,
        }
        if model.external:
            description["external_data"] = model.external
        description[DIGEST] = metadata_digest(description)
        onnx.helper.set_model_props(proto, {METADATA_KEY: json.dumps(description)})
        proto.producer_name, proto.producer_version = "maekit", __version__
        model.write(proto)
    said = f"parity with PyTorch on {parity.images} images: {parity.max_relative_difference:.1e} of the largest value"
    progress.note(f"{said}, cosine at least {parity.min_cosine:.5f}, {parity.mean_cosine:.5f} on average")
    size = sum(file.stat().st_size for file in (out, *map(out.with_name, model.external)))
    nodes = node_census(proto)
    return ExportResult(str(out), description["dim"], parity, size, nodes, description["whitening"], warning)


def _trace(
    trained: TrainedEncoder, config: ExportConfig, whitening: Whitening | None, images: Pixels
) -> onnx.ModelProto:
    """Return the graph; the traced module is not kept in memory."""
    module = EmbeddingModule(
        trained.encoder,
        trained.preprocess,
        pool=config.pooling,
        normalize=config.normalize,
        whitening=whitening,
        half=config.precision == "fp16",
        opset=config.opset,
    )
    # PyTorch's exporter treats a batch of one as a fixed size.
    two = np.resize(images, (2, *images.shape[1:]))
    output = TOKENS if config.pool == UNPOOLED else EMBEDDINGS
    return to_onnx(module.eval(), two, opset=config.opset, output=output)
