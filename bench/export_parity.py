"""Every size, pooling, precision and opset: the ONNX checker, a run, and how far the graph is from PyTorch.

    python bench/export_parity.py SHARDS [--sizes tiny,small,base,large] [--images 8] [--out FILE.json]

The encoders have random weights (as initialised by timm, biases moved off zero): there is nothing to download. int8 is
calibrated on the first half of the images and all are compared on the second half. The whole run takes about
fifteen minutes on two cores.
"""

import argparse
import itertools
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import timm
import torch

from maekit.config import IMAGENET_MEAN, IMAGENET_STD
from maekit.exporters.graph import EmbeddingModule
from maekit.exporters.parity import GATES, measure
from maekit.exporters.quantization import quantize
from maekit.exporters.sampling import sample_images
from maekit.exporters.trace import node_census, to_onnx
from maekit.images import Pixels, Preprocess
from maekit.pretrained.load import TrainedEncoder
from maekit.pretrained.torch_embedder import reference_embeddings

POOLINGS = ("avg", "cls", "avg+cls", "avg+std", "avg2x2", "tokens")
PREPROCESS = Preprocess.for_size((224, 224), IMAGENET_MEAN, IMAGENET_STD)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards")
    parser.add_argument("--sizes", default="tiny,small,base,large")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    images = sample_images([options.shards], PREPROCESS, 2 * options.images)
    half = len(images) // 2
    rows = []
    for size in options.sizes.split(","):
        trained = encoder_of(f"vit_{size}_patch16_224")
        expected = {pool: reference_embeddings(trained, images[half:], pool=pool) for pool in POOLINGS}
        for precision, opset, pool in itertools.product(GATES, (23, 20), POOLINGS):
            row = {"size": size, "precision": precision, "opset": opset, "pool": pool}
            row |= one(trained, images[:half], images[half:], expected[pool], precision, opset, pool)
            rows.append(row)
            print(
                f"{size:6} {precision} opset {opset} {pool:8} checked, {row['nodes']} nodes, {row['attention']} of "
                f"attention, difference {row['difference']:.1e}, cosine {row['min_cosine']:.6f} or more, "
                f"{'passes' if row['passes'] else 'FAILS'}",
                flush=True,
            )
    print(f"{sum(row['passes'] for row in rows)} of {len(rows)} pass their gate")
    if options.out:
        about = {
            "what": "export_parity",
            "images": half,
            "machine": platform.machine(),
            "torch": torch.__version__,
            "onnxruntime": onnxruntime.__version__,
            "rows": rows,
        }
        options.out.write_text(json.dumps(about, indent=1) + "\n")


def encoder_of(name: str) -> TrainedEncoder:
    torch.manual_seed(0)
    encoder = timm.create_model(name, num_classes=0).eval()
    for parameter in encoder.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.02 * torch.randn_like(parameter)
    return TrainedEncoder(encoder, name, PREPROCESS, {}, {})


def one(
    trained: TrainedEncoder, calibration: Pixels, images: Pixels, expected: Any, precision: str, opset: int, pool: str
) -> dict[str, Any]:
    started = time.perf_counter()
    module = EmbeddingModule(trained.encoder, PREPROCESS, pool=pool, half=precision == "fp16", opset=opset).eval()
    proto = to_onnx(module, images, opset=opset, output="embeddings")
    if precision == "int8":
        proto = quantize(proto, calibration)
    onnx.checker.check_model(proto, full_check=True)
    census = node_census(proto)
    assert not {"Shape", "Expand"} & set(census), census
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    parity = measure(
        lambda batch: np.asarray(session.run(None, {"images": batch})[0]), images, expected, provider="CPU"
    )
    return {
        "nodes": sum(census.values()),
        "attention": census.get("Attention", 0),
        "bytes": proto.ByteSize(),
        "difference": parity.max_relative_difference,
        "min_cosine": parity.min_cosine,
        "mean_cosine": parity.mean_cosine,
        "passes": GATES[precision].problem(parity) is None,
        "seconds": time.perf_counter() - started,
    }


if __name__ == "__main__":
    main()
