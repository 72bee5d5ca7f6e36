"""The exported encoder alone on a GPU: ONNX Runtime in fp16 with IO binding against PyTorch in bf16, in one run.

    python bench/encoder_cuda.py [--sizes small,base,large] [--batches 1,8,32,128,512] [--rounds 5] [--seconds 0.5]
                                 [--peak TFLOPS] [--mode MODE] [--device cuda|cpu] [--json FILE]

maekit fp16    from uint8 on the device to unit vectors on the device, buffers bound once
torch compile  timm's forward_features, bf16 weights, torch.compile (`--mode`), from normalised
torch eager    the same, eager

Medians of rounds in turn. With the rate stands the share of the device's dense fp16 peak (`--peak`, 989 TFLOPS for an
H200 SXM), by the ViT's multiply-adds. A profile of one run says which kernels ran attention. `--device cpu` tries the
script itself where there is no GPU.
"""

import argparse
import json
import statistics
import tempfile
import time
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
from maekit.exporters.trace import to_onnx
from maekit.images import Preprocess
from maekit.providers import open_cpu, open_cuda
from maekit.system.machine import cores

PREPROCESS = Preprocess.for_size((224, 224), IMAGENET_MEAN, IMAGENET_STD)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="small,base,large")
    parser.add_argument("--batches", default="1,8,32,128,512")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement (default: %(default)s)")
    parser.add_argument("--peak", type=float, default=989.0)
    parser.add_argument("--mode", default="max-autotune-no-cudagraphs", help="of torch.compile (default: %(default)s)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes.split(","):
            torch.manual_seed(0)
            encoder = timm.create_model(f"vit_{size}_patch16_224", num_classes=0).eval()
            path = Path(folder) / f"{size}.onnx"
            module = EmbeddingModule(encoder, PREPROCESS, half=True).eval()
            onnx.save(to_onnx(module, np.zeros((2, 224, 224, 3), np.uint8), opset=23, output="embeddings"), path)
            peers = encoder.to(options.device, torch.bfloat16)
            for batch in map(int, options.batches.split(",")):
                rows.append(one(size, batch, path, peers, options))
    if options.json:
        name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
        about = {"what": "encoder_cuda", "device": name, "onnxruntime": onnxruntime.__version__, "rows": rows}
        options.json.write_text(json.dumps(about | {"torch": torch.__version__}, indent=1) + "\n")


def one(size: str, batch: int, path: Path, encoder: Any, options: argparse.Namespace) -> dict[str, Any]:
    session, kernels = bound_session(path, batch, options.device)
    images = torch.randn(batch, 3, 224, 224, device=options.device, dtype=torch.bfloat16)
    compiled = torch.compile(encoder.forward_features, mode=options.mode)

    def torch_run(forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
        with torch.inference_mode():
            forward(images)
        if options.device == "cuda":
            torch.cuda.synchronize()

    runs: dict[str, Callable[[], None]] = {
        "maekit fp16": session,
        "torch compile": lambda: torch_run(compiled),
        "torch eager": lambda: torch_run(encoder.forward_features),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(options.rounds + 1):
        for name, run in runs.items():
            run()
            times, started = 0, time.perf_counter()
            while time.perf_counter() - started < options.seconds or not times:
                run()
                times += 1
            if round_:  # the first one compiles and warms up
                seconds[name].append((time.perf_counter() - started) / times)
    rates = {name: batch / statistics.median(values) for name, values in seconds.items()}
    flops = 2 * multiply_adds(encoder)
    shares = {name: rate * flops / (options.peak * 1e12) for name, rate in rates.items()}
    ratio = rates["maekit fp16"] / rates["torch compile"]
    print(f"ViT-{size}, batch {batch}: {ratio:.2f} x torch.compile; attention: {', '.join(kernels) or 'not told'}")
    for name, rate in rates.items():
        print(f"  {name:14} {rate:9.1f} img/s  {shares[name]:6.1%} of the peak", flush=True)
    found = {"size": size, "batch": batch, "images_per_second": rates, "share_of_peak": shares, "ratio": ratio}
    return found | {"attention_kernels": kernels}


def bound_session(path: Path, batch: int, device: str) -> tuple[Callable[[], None], list[str]]:
    """Return a function that runs the session once on buffers of the device, and the kernels of its attention."""
    opened = open_cuda(path, "cuda", threads=cores()) if device == "cuda" else open_cpu(path, threads=cores())
    assert opened.problem is None, opened.problem
    session, binding = opened.session, opened.session.io_binding()
    images = np.random.default_rng(0).integers(0, 256, (batch, 224, 224, 3), np.uint8)
    source = onnxruntime.OrtValue.ortvalue_from_numpy(images, device, 0)
    width = session.get_outputs()[0].shape[1]
    result = onnxruntime.OrtValue.ortvalue_from_shape_and_type([batch, width], np.float32, device, 0)
    binding.bind_ortvalue_input("images", source)
    binding.bind_ortvalue_output("embeddings", result)

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    run()
    kernels: list[str] = []
    if device == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
        names = {event.name for event in profile.events()}
        kernels = sorted(
            n[:80] for n in names if any(w in n.lower() for w in ("attention", "flash", "fmha", "softmax"))
        )
    return run, kernels


def multiply_adds(encoder: Any) -> float:
    """Return those of one image: linear layers over all tokens, and the two products of attention."""
    tokens = encoder.patch_embed.num_patches + encoder.num_prefix_tokens
    width, depth = encoder.embed_dim, len(encoder.blocks)
    embedding = encoder.patch_embed.num_patches * encoder.patch_embed.proj.weight.numel()
    return float(embedding + depth * (12 * tokens * width**2 + 2 * tokens**2 * width))


if __name__ == "__main__":
    main()
