"""int8 in several ways, on a trained encoder: how fast, how far from PyTorch, and whether rows depend on their batch.

    python bench/int8.py MODEL SHARDS [--images 256] [--batch 8] [--threads 1] [--rounds 5] [--json FILE]

fp32                      the exported graph
dynamic                   ONNX Runtime's quantize_dynamic, per channel: scales of activations measured in each batch
static, min-max           ONNX Runtime's quantize_static, per channel, min-max calibration, no quantised outputs
maekit                    as `maekit export --precision int8`: 7-bit weights, best ranges, corrected biases
maekit, 8-bit weights     the same with all 8 bits
maekit, biases as are     the same with 7 bits, and biases not corrected

MODEL is what `maekit export` takes. 64 images calibrate, others are compared. "whitened" is the cosine after whitening
(all directions, fitted on the calibration images' fp32 embeddings and those of 1,000 more).
"""

import argparse
import functools
import hashlib
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

import maekit.exporters.quantization as own
from maekit.exporters.graph import EmbeddingModule
from maekit.exporters.parity import measure
from maekit.exporters.sampling import sample_images
from maekit.exporters.trace import to_onnx
from maekit.images import Pixels
from maekit.pretrained.load import load_encoder
from maekit.vectors.whitening import fit_whitening

CALIBRATION, FITTED = 64, 1000


class Reader(CalibrationDataReader):
    """Hands images to ONNX Runtime's calibration, eight at a time."""

    def __init__(self, images: Pixels) -> None:
        self._batches = iter(np.split(images, len(images) // 8))

    def get_next(self) -> dict[str, Pixels] | None:
        """Return the next batch, or None."""
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("shards")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    trained = load_encoder(options.model, on_note=print)
    everything = sample_images([options.shards], trained.preprocess, CALIBRATION + FITTED + options.images)
    images, fitted = everything[: options.images], everything[options.images :]
    calibration = fitted[:CALIBRATION]
    module = EmbeddingModule(trained.encoder, trained.preprocess, normalize=False).eval()
    proto = to_onnx(module, images, opset=23, output="embeddings")
    with tempfile.TemporaryDirectory() as folder:
        files = write_all(proto, calibration, Path(folder))
        sessions = {name: session_of(path, options.threads) for name, path in files.items()}
        sizes = {name: path.stat().st_size for name, path in files.items()}
    rows = {name: run(session, images, options.batch) for name, session in sessions.items()}
    whitening = fit_whitening([run(sessions["fp32"], fitted, options.batch)], None, hashlib.sha256())
    rates = measured_rates(sessions, images[: options.batch], options.rounds)
    table = []
    for name, session in sessions.items():
        encode = functools.partial(once, session)
        figures = measure(encode, images, rows["fp32"], provider="CPU")
        white, reference = (values @ whitening.matrix.T + whitening.bias for values in (rows[name], rows["fp32"]))
        row = {
            "way": name,
            "images_per_second": statistics.median(rates[name]),
            "speed": statistics.median(a / b for a, b in zip(rates[name], rates["fp32"], strict=True)),
            "mean_cosine": figures.mean_cosine,
            "min_cosine": figures.min_cosine,
            "neighbour_agreement": figures.neighbour_agreement,
            "whitened_cosine": float(np.mean(cosines(white, reference))),
            "batch_dependence": batch_dependence(session, images),
            "bytes": sizes[name],
        }
        table.append(row)
        print(
            f"{name:24} {row['images_per_second']:7.1f} img/s  {row['speed']:.2f} x  cosine mean "
            f"{row['mean_cosine']:.5f} min {row['min_cosine']:.5f}  whitened {row['whitened_cosine']:.4f}  neighbours "
            f"{row['neighbour_agreement']:.3f}  by batch {row['batch_dependence']:.0e}  {row['bytes'] / 1e6:.1f} MB"
        )
    if options.json:
        about = {"what": "int8", "model": trained.name, "size": trained.preprocess.size, "images": len(images)}
        about |= {"batch": options.batch, "threads": options.threads, "onnxruntime": onnxruntime.__version__}
        options.json.write_text(json.dumps(about | {"rows": table}, indent=1) + "\n")


def write_all(proto: onnx.ModelProto, calibration: Pixels, folder: Path) -> dict[str, Path]:
    """Write the graph in each way; returns the files by name."""
    names = ("fp32", "dynamic", "static, min-max", "maekit", "maekit, 8-bit weights", "maekit, biases as are")
    files = {name: folder / f"{number}.onnx" for number, name in enumerate(names)}
    del proto.graph.value_info[:]  # ONNX Runtime turns weights round and leaves their old shapes there
    onnx.save(proto, files["fp32"])
    quantize_dynamic(files["fp32"], files["dynamic"], op_types_to_quantize=["MatMul", "Gemm"], per_channel=True)
    quantize_static(
        str(files["fp32"]),
        str(files["static, min-max"]),
        Reader(calibration),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Gemm"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm"]},
    )
    onnx.save(own.quantize(proto, calibration), files["maekit"])
    limit, observe = own._WEIGHT_LIMIT, own._observe
    own._WEIGHT_LIMIT = 127
    onnx.save(own.quantize(proto, calibration), files["maekit, 8-bit weights"])
    own._WEIGHT_LIMIT = limit

    def without_means(*arguments: Any) -> Any:
        seen = observe(*arguments)
        return {name: own.Activation(a.scale, a.zero_point, 0 * a.mean, 0 * a.mean) for name, a in seen.items()}

    own._observe = without_means
    onnx.save(own.quantize(proto, calibration), files["maekit, biases as are"])
    own._observe = observe
    return files


def session_of(path: Path, threads: int) -> Any:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])


def once(session: Any, images: Pixels) -> Any:
    return session.run(None, {"images": images})[0]


def run(session: Any, images: Pixels, batch: int) -> Any:
    return np.concatenate(
        [session.run(None, {"images": images[i : i + batch]})[0] for i in range(0, len(images), batch)]
    )


def measured_rates(sessions: dict[str, Any], images: Pixels, rounds: int) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {name: [] for name in sessions}
    for round_ in range(rounds + 1):
        for name, session in sessions.items():
            times, started = 0, time.perf_counter()
            while time.perf_counter() - started < 0.7 or not times:
                session.run(None, {"images": images})
                times += 1
            if round_:
                rates[name].append(times * len(images) / (time.perf_counter() - started))
    return rates


def batch_dependence(session: Any, images: Pixels) -> float:
    """Return by how much rows differ between being alone and among others, as a share of the largest value."""
    together = session.run(None, {"images": images[:8]})[0]
    alone = np.concatenate([session.run(None, {"images": images[i : i + 1]})[0] for i in range(8)])
    return float(np.abs(together - alone).max() / np.abs(together).max())


def cosines(a: Any, b: Any) -> Any:
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


if __name__ == "__main__":
    main()
