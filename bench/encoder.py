"""The exported encoder alone on a CPU, against other exports of the same ViT and against PyTorch, in one run.

    python bench/encoder.py [--sizes tiny,small,base] [--batches 1,16] [--threads 2] [--rounds 5]
                            [--optimum-python PATH] [--json FILE]

maekit fp32   from uint8 to unit vectors, opset 23; normalisation, pooling and L2 are inside
maekit 20     the same at opset 20
maekit int8   the same with int8 linear layers
timm          timm's forward_features by PyTorch's exporter, opset 20, from normalised float images to tokens
timm legacy   the same by PyTorch's older exporter (TorchScript), opset 17
optimum       transformers' ViTModel of the same size by optimum, where an interpreter that has it is named
torch fp32    timm's forward_features in PyTorch, eager; torch bf16 under autocast

The others are handed normalised images and give tokens. All sessions have the same options; medians of rounds in turn.
"""

import argparse
import contextlib
import io
import json
import logging
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import timm
import torch

from maekit.config import IMAGENET_MEAN, IMAGENET_STD
from maekit.exporters.graph import EmbeddingModule
from maekit.exporters.quantization import quantize
from maekit.exporters.trace import to_onnx
from maekit.images import Preprocess

PREPROCESS = Preprocess.for_size((224, 224), IMAGENET_MEAN, IMAGENET_STD)
SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
ONNX_PEERS = ("timm", "timm legacy", "optimum")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="tiny,small,base")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--optimum-python", help="an interpreter that has optimum-onnx and transformers")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for size in options.sizes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            files = export_all(size, Path(folder), options.optimum_python)
            for batch in map(int, options.batches.split(",")):
                rows.append(one(size, batch, files, options))
    if options.json:
        about = {
            "what": "encoder",
            "threads": options.threads,
            "onnxruntime": onnxruntime.__version__,
            "torch": torch.__version__,
            "rows": rows,
        }
        options.json.write_text(json.dumps(about, indent=1) + "\n")


def encoder_of(size: str) -> Any:
    torch.manual_seed(0)
    return timm.create_model(f"vit_{size}_patch16_224", num_classes=0).eval()


class Tokens(torch.nn.Module):
    """What the other exports give: tokens after the final norm."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """`[B, C, H, W]` -> `[B, T, D]`."""
        return self.encoder.forward_features(images)


def export_all(size: str, folder: Path, optimum_python: str | None) -> dict[str, Path]:
    """Write every ONNX file; returns them by name."""
    encoder = encoder_of(size)
    calibration = np.random.default_rng(0).integers(0, 256, (16, 224, 224, 3), np.uint8)
    files = {name: folder / f"{name.replace(' ', '-')}.onnx" for name in ("maekit fp32", "maekit 20", "maekit int8")}
    protos = {
        opset: to_onnx(
            EmbeddingModule(encoder, PREPROCESS, opset=opset).eval(), calibration, opset=opset, output="embeddings"
        )
        for opset in (23, 20)
    }
    for name, proto in (
        ("maekit fp32", protos[23]),
        ("maekit 20", protos[20]),
        ("maekit int8", quantize(protos[23], calibration)),
    ):
        onnx.save(proto, files[name])
    floats = torch.randn(2, 3, 224, 224)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Tokens(encoder),
            (floats,),
            dynamo=True,
            opset_version=20,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
        assert program is not None
        files["timm"] = folder / "timm.onnx"
        program.save(str(files["timm"]))
        files["timm legacy"] = folder / "legacy.onnx"
        torch.onnx.export(
            Tokens(encoder),
            (floats,),
            str(files["timm legacy"]),
            dynamo=False,
            opset_version=17,
            input_names=["images"],
            dynamic_axes={"images": {0: "batch"}},
        )
    if optimum_python:
        script = Path(__file__).parent / "peers" / "optimum_export.py"
        command = [optimum_python, str(script), *map(str, SIZES[size]), str(folder / "optimum")]
        subprocess.run(command, check=True, capture_output=True)
        files["optimum"] = folder / "optimum" / "model.onnx"
    return files


def one(size: str, batch: int, files: dict[str, Path], options: argparse.Namespace) -> dict[str, Any]:
    random = np.random.default_rng(1)
    images = random.integers(0, 256, (batch, 224, 224, 3), np.uint8)
    floats = random.standard_normal((batch, 3, 224, 224)).astype(np.float32)
    runs: dict[str, Callable[[], Any]] = {}
    for name, path in files.items():
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads, settings.log_severity_level = options.threads, 3
        session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: images if name.startswith("maekit") else floats}
        runs[name] = lambda session=session, feed=feed: session.run(None, feed)
    encoder, tensor = encoder_of(size), torch.from_numpy(floats)

    def eager(kind: torch.dtype) -> None:
        with torch.inference_mode(), torch.autocast("cpu", kind, enabled=kind != torch.float32):
            encoder.forward_features(tensor)

    runs["torch fp32"] = lambda: eager(torch.float32)
    runs["torch bf16"] = lambda: eager(torch.bfloat16)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(options.rounds + 1):
        for name, run in runs.items():
            times, started = 0, time.perf_counter()
            while time.perf_counter() - started < 1.0 or not times:
                run()
                times += 1
            if round_:  # the first one warms up
                seconds[name].append((time.perf_counter() - started) / times)
    rates = {name: batch / statistics.median(values) for name, values in seconds.items()}
    best = max((name for name in ONNX_PEERS if name in rates), key=lambda name: rates[name])
    # Ratios round by round: what else the machine does falls on both.
    ratios = {
        "fp32 / best export": statistics.median(
            theirs / ours for ours, theirs in zip(seconds["maekit fp32"], seconds[best], strict=True)
        ),
        "int8 / fp32": statistics.median(
            fp32 / int8 for int8, fp32 in zip(seconds["maekit int8"], seconds["maekit fp32"], strict=True)
        ),
    }
    print(f"ViT-{size}, batch {batch}, {options.threads} threads")
    for name, rate in rates.items():
        print(f"  {name:12} {rate:8.1f} img/s")
    print(
        f"  fp32 is {ratios['fp32 / best export']:.2f} x {best}; int8 is {ratios['int8 / fp32']:.2f} x fp32", flush=True
    )
    return {"size": size, "batch": batch, "images_per_second": rates, "best_export": best, **ratios}


if __name__ == "__main__":
    main()
