"""Stage `speed`: how fast, on one card, one function for each part; what is timed has the machine to itself.

data           the ImageNet sample, each shard under many names
card           the card: clock, rate of a large product of matrices, rate of a copy
compile_base   (and compile_large) fill the compiler's cache
encoder        a ViT-B with random weights, exported in fp16
step_base      (and step_large) the step of maekit beside the reference's way of stepping and transformers' ViTMAE
train          ViT-B end to end from shards, beside its loader alone and its step alone
session        the fp16 session of ViT-B at three batches, beside torch.compile in bf16; which attention kernel ran
embedding      `maekit embed` of ViT-B in fp16 end to end
decoding       JPEGs decoded by all cores (Pillow), and by the GPU (nvJPEG)
"""

import argparse
import gc
import io
import os
import shutil
import statistics
import subprocess
import tarfile
import time
from collections.abc import Callable
from multiprocessing import Pool
from typing import Any

import torch
from common import DATA, TINY, Bench, Failed, Found, Skipped, as_options, drawn, maekit, run_part, script, write_shard
from gpu_hours import flops_per_image
from PIL import Image
from step import SIZES, make_step

from maekit.config import ModelConfig
from maekit.system.machine import cores

COPIES = 24  # of each shard: the sample of 334 images is over in a tenth of a second
BATCH = {"base": 256, "large": 128}  # what attention written out leaves room for in 80 GB
PEERS = ("reference", "transformers")
STEPS = 10  # timed at once; the host is a step or two ahead of the device, as in a run


def data(bench: Bench) -> Found:
    """Shards to read from, each under several names."""
    packed, once = DATA / "speed.tar", bench.work / "once"
    if packed.exists() and not bench.dry:
        once.mkdir()
        with tarfile.open(packed) as tar:
            tar.extractall(once, filter="data")
        source = "ImageNet sample"
    else:
        count, size = (24, 64) if bench.dry else (320, 400)
        write_shard(once / "00.tar", ((f"{n:04d}", {"jpg": image}) for n, (image, _) in enumerate(drawn(count, size))))
        source = "drawn"
    bench.shards.mkdir()
    shards = sorted(once.glob("*.tar"))
    for number in range(2 if bench.dry else COPIES):
        for shard in shards:
            os.link(shard, bench.shards / f"{number:02d}-{shard.name}")
    return Found(f"{source}, {len(shards)} shards under {len(list(bench.shards.iterdir()))} names", {"source": source})


def card(bench: Bench) -> Found:
    """Measure what the card does at best: a product of two square matrices in bf16, and a copy within its memory."""
    device, size = torch.device(bench.device), 256 if bench.dry else 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in "ab")
    product = 2 * size**3 / median_seconds(lambda: a @ b, device)
    source = torch.randn(1 << (16 if bench.dry else 30), device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device)
    figures: dict[str, Any] = {
        "name": "CPU" if bench.dry else torch.cuda.get_device_name(),
        "matmul_flops": product,
        "copy_bytes_per_second": copy,
        "cores": cores(),
        "torch": torch.__version__,
    }
    if shutil.which("nvidia-smi") and not bench.dry:
        asked = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw"
        command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader", "--id=0"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        figures["nvidia_smi"] = dict(zip(asked.split(","), answer.split(", "), strict=False))
    bench.write("card.json", figures)
    clock = figures.get("nvidia_smi", {}).get("clocks.sm", "")
    said = f"{figures['name']} {clock}: {product / 1e12:.3g} TFLOP/s of bf16, copies {copy / 1e12:.3g} TB/s"
    return Found(said, figures)


def median_seconds(run: Callable[[], object], device: torch.device, times: int = 10) -> float:
    """Return the median duration of a call, each waited for."""
    seconds = []
    for _ in range(times + 3):
        before = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - before)
    return statistics.median(seconds[3:])


def step_options(bench: Bench, size: str) -> argparse.Namespace:
    """Return what `bench/step.py` makes a step of."""
    if bench.dry:
        return argparse.Namespace(model="tiny", batch_size=2, precision="fp32", device="cpu", compile=False)
    return argparse.Namespace(model=size, batch_size=BATCH[size], precision="bf16", device="cuda", compile=True)


def compile_step(size: str) -> Callable[[Bench], Found]:
    """Return the part that compiles maekit's step of a size, for the parts that come later."""

    def part(bench: Bench) -> Found:
        if bench.dry:
            raise Skipped("nothing is compiled in a dry run")
        before = time.perf_counter()
        make_step("maekit", step_options(bench, size))()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - before
        return Found(f"first step after {seconds:.0f} s", {"seconds_to_first_step": seconds})

    return part


def steps(size: str) -> Callable[[Bench], Found]:
    """Return the part that times the step of a size beside its peers."""

    def part(bench: Bench) -> Found:
        options = step_options(bench, size)
        rate_at_best = bench.read("card.json")["matmul_flops"]
        width, depth, heads = SIZES[options.model]
        flops = flops_per_image(ModelConfig("vit_base_patch16_224", width=width, depth=depth, heads=heads))
        figures: dict[str, Any] = {"batch_size": options.batch_size, "flops_per_image": flops}
        for name in ("maekit", *PEERS):
            figures[name] = step_figures(name, options, flops, rate_at_best)
        ours = figures["maekit"]
        said = f"ViT-{options.model} {ours['images_per_second']:,.0f} img/s, {ours['flops'] / 1e12:.3g} TFLOP/s"
        said += f" ({ours['share_of_matmul']:.2f} of the card's), {ours['peak_bytes'] / 1e9:.1f} GB"
        for name in PEERS:
            said += f"; {ours['images_per_second'] / figures[name]['images_per_second']:.2f} x {name}"
        return Found(said, figures)

    return part


def step_figures(name: str, options: argparse.Namespace, flops: int, rate_at_best: float) -> dict[str, float]:
    """Time one way of stepping; figures per second, and the peak of the allocator in bytes."""
    on_cuda = options.device == "cuda"
    gc.collect()  # the one before
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step = make_step(name, options)
    count = STEPS if on_cuda else 1
    for _ in range(3 if on_cuda else 1):
        step()
    rates = []
    for _ in range(3):
        if on_cuda:
            torch.cuda.synchronize()
        before = time.perf_counter()
        for _ in range(count):
            step()
        if on_cuda:
            torch.cuda.synchronize()
        rates.append(count * options.batch_size / (time.perf_counter() - before))
    rate = statistics.median(rates)
    return {
        "images_per_second": rate,
        "flops": rate * flops,
        "share_of_matmul": rate * flops / rate_at_best,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_cuda else 0,
    }


def train(bench: Bench) -> Found:
    """Train from shards; the measurement is that of `bench/pretrain.py`."""
    if bench.dry:
        sizes = [*as_options(TINY), "--batch-size", 8, "--steps", 6, "--seconds", 1]
    else:
        batch = BATCH["base"]
        sizes = ["--model", "vit_base_patch16_224", "--batch-size", batch, "--steps", 96, "--seconds", 4]
        sizes += ["--set", f"run.micro_batch={batch}"]  # as the part step_base, whose compilation it finds
    figures = script(bench, "pretrain.py", bench.shards, "--device", bench.device, *sizes)
    rates = {name: figures[name] for name in ("loader_alone", "step_alone", "end_to_end")}
    slower = "the loader" if rates["loader_alone"] < rates["step_alone"] else "the step"
    said = (
        f"{rates['end_to_end']:,.0f} img/s, {figures['share']:.2f} of the limit (loader {rates['loader_alone']:,.0f}, "
    )
    said += f"step {rates['step_alone']:,.0f}: {slower} binds), data-wait {figures['data_wait']:.1%}"
    return Found(said, figures)


def encoder(bench: Bench) -> Found:
    """Export a ViT-B with random weights in fp16; in a dry run, a ViT-Ti in fp32."""
    import timm
    from safetensors.torch import save_file

    name, precision = ("vit_tiny_patch16_224", "fp32") if bench.dry else ("vit_base_patch16_224", "fp16")
    torch.manual_seed(0)
    weights = bench.work / "weights.safetensors"
    save_file(timm.create_model(name, num_classes=0).state_dict(), weights)
    arguments = ("--model", name, "--precision", precision, "--parity", bench.shards, "--json")
    parity = maekit(bench, "export", weights, "--out", bench.work / "encoder.onnx", *arguments).summary["parity"]
    return Found(f"{name} {precision}, least cosine {parity['min_cosine']:.6f}", {"model": name, "parity": parity})


def session(bench: Bench) -> Found:
    """Run the exported encoder alone; the measurement is that of `bench/encoder_cuda.py`."""
    sizes, batches = ("tiny", "1,2") if bench.dry else ("base", "1,16,256")
    peak = bench.read("card.json")["matmul_flops"] / 1e12
    short = ("--rounds", 1, "--seconds", 0.1) if bench.dry else ("--rounds", 3, "--seconds", 0.3)
    # The compiler's usual mode: what searches longer takes minutes for each batch.
    arguments = ("--sizes", sizes, "--batches", batches, "--peak", peak, "--mode", "default", *short)
    figures = script(bench, "encoder_cuda.py", "--device", bench.device, *arguments)
    rows = figures["rows"]
    said = ", ".join(
        f"batch {row['batch']}: {row['images_per_second']['maekit fp16']:,.0f} img/s, {row['ratio']:.2f} x compiled"
        for row in rows
    )
    return Found(f"{said}; {', '.join(rows[-1]['attention_kernels']) or 'attention kernel not told'}", figures)


def embedding(bench: Bench) -> Found:
    """Embed all shards, as the command does it."""
    model = bench.work / "encoder.onnx"
    if not model.exists():
        raise Skipped("no encoder was exported")
    arguments = ("--out", bench.work / "embeddings", "--device", bench.device, "--json")
    before = time.perf_counter()
    summary = maekit(bench, "embed", model, bench.shards, *arguments).summary
    figures = {**summary, "command_seconds": time.perf_counter() - before}
    if not summary["rows"] or summary["errors"]:
        raise Failed(f"{summary['rows']} rows, {summary['errors']} errors", figures)
    stages = ", ".join(f"{name} {rate:,.0f}" for name, rate in summary["rates"].items())
    said = f"{summary['images_per_second']:,.0f} img/s, {summary['limit_share']:.2f} of the limit"
    return Found(f"{said} (alone: {stages}); {summary['binds']} binds", figures)


def decoding(bench: Bench) -> Found:
    """Decode JPEGs whole: by processes on all cores, and where there is a GPU, there."""
    from maekit.shards.read import open_shards
    from maekit.shards.spec import find_shards

    shards = open_shards(find_shards(str(bench.work / "once")))
    reader, places = shards.reader(), map(shards.locate, range(shards.samples))
    images = [reader.read_image(shards.index(shard), ordinal) for shard, ordinal in places] * (1 if bench.dry else 12)
    with Pool(cores()) as pool:
        pool.map(decode, images[: 4 * cores()])
        before = time.perf_counter()
        pool.map(decode, images, chunksize=8)
        figures = {"cores": cores(), "pillow": len(images) / (time.perf_counter() - before)}
    said = f"{cores()} cores of Pillow {figures['pillow']:,.0f} img/s"
    if not bench.dry:
        figures["nvjpeg"] = nvjpeg_rate(images[:1024])
        said += f", nvJPEG {figures['nvjpeg']:,.0f}"
    return Found(said, figures)


def decode(image: bytes) -> tuple[int, int]:
    """Decode with Pillow, and return the size."""
    return Image.open(io.BytesIO(image)).convert("RGB").size


def nvjpeg_rate(images: list[bytes]) -> float:
    """Return images per second of the GPU's decoder, 64 at a time."""
    from torchvision.io import ImageReadMode, decode_jpeg

    tensors = [torch.frombuffer(bytearray(image), dtype=torch.uint8) for image in images]
    batches = [tensors[start : start + 64] for start in range(0, len(tensors), 64)]
    for number, batch in enumerate((batches[0], *batches)):
        if number == 1:  # the first one warms up
            torch.cuda.synchronize()
            before = time.perf_counter()
        decode_jpeg(batch, mode=ImageReadMode.RGB, device="cuda")
    torch.cuda.synchronize()
    return len(images) / (time.perf_counter() - before)


PARTS = {
    "data": data,
    "card": card,
    "compile_base": compile_step("base"),
    "compile_large": compile_step("large"),
    "encoder": encoder,
    "step_base": steps("base"),
    "step_large": steps("large"),
    "train": train,
    "session": session,
    "embedding": embedding,
    "decoding": decoding,
}

if __name__ == "__main__":
    run_part("speed", PARTS)
