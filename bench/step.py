"""One training step against its peers, side by side in one run: same sizes, same batch, same precision.

    python bench/step.py [--model base|tiny|small|large] [--batch-size 16] [--precision fp32|bf16] [--repeat 5]
                         [--device cpu|cuda] [--compile] [--json FILE] [--design-space] [--only NAME ...]

maekit      from uint8 to the optimiser's step, as `maekit pretrain` takes it
transformers ViTMAEForPreTraining, AdamW with its defaults, from normalised float images
timm        a plain MAE of timm's blocks as lightly's examples write it: gather, decode all, predict, MSELoss, AdamW
reference   the same the way the reference implementation steps: attention written out, on CUDA in fp16 with a loss
            scaler, whatever the precision of the others, and a synchronisation after each step

The first also normalises, mirrors and computes the gradient's norm; the others are handed normalised images.
With `--design-space`, maekit's default step against its own other decoders, targets and masks instead, each in turn
with the default. Two of them are table 2 of the paper (He et al. 2021): there 42.4, 15.4 and 11.6 hours for ViT-L with
mask tokens in the encoder, without, and with a decoder of 1 block. The tokens of the token target cost nothing here:
what a tokenizer takes is its own.
Rates are medians over rounds in turn; memory is the peak of a process of its own (CPU) or of the allocator (CUDA).
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

CROSS = {"decoder": "cross"}
DESIGN_SPACE = {
    "maekit": {},
    "decoder of 1 block": {"decoder_depth": 1},
    "mask tokens in the encoder": {"mask_tokens": "encoder"},
    "self, predicts 1/4": {"predict_ratio": 0.25},
    "cross, predicts all": CROSS,
    "cross, predicts 1/3": {**CROSS, "predict_ratio": 1 / 3},
    "cross, predicts 1/4": {**CROSS, "predict_ratio": 0.25},
    "cross of 12 blocks, predicts 1/4": {**CROSS, "predict_ratio": 0.25, "decoder_depth": 12},
    "4 masks per image": {"masks_per_image": 4},
    "4 masks, cross, predicts 1/4": {**CROSS, "predict_ratio": 0.25, "masks_per_image": 4},
    "pixel": {"target": "pixel"},
    "pca": {"target": "pca"},
    "tokens of 8192": {"target": "tokens", "vocabulary": 8192, "tokenizer": "none"},
}
SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SIZES, default="base")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compile", action="store_true", help="compile maekit's step")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--design-space", action="store_true")
    parser.add_argument("--only", nargs="+", help="of what is compared with maekit's default")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.memory_of:
        step = make_step(options.memory_of, options)
        for _ in range(2):
            step()
        if options.device == "cuda":
            print(torch.cuda.max_memory_allocated())
            return
        # Not getrusage: a process inherits the peak of the one that started it.
        (peak,) = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
        print(int(peak) * 1024)
        return
    first, *others = DESIGN_SPACE if options.design_space else PEERS
    names = [first, *(name for name in others if options.only is None or name in options.only)]
    rates: dict[str, list[float]] = {name: [] for name in names}
    ratios: dict[str, float] = {}
    base = make_step(names[0], options)
    for name in names:
        # One beside the first at a time: together they would not fit into memory.
        step = base if name == names[0] else make_step(name, options)
        pairs = [(_rate(base, options), _rate(step, options)) for _ in range(options.repeat + 1)][1:]  # one warms up
        rates[name] = [rate for _, rate in pairs]
        ratios[name] = statistics.median(mine for mine, _ in pairs) / statistics.median(rates[name])
        del step
    medians = {name: statistics.median(values) for name, values in rates.items()}
    memory = {name: _memory_of(name) for name in names}
    print(f"ViT-{options.model} batch {options.batch_size} {options.precision} on {options.device}")
    for name, rate in medians.items():
        said = f"{1 / ratios[name]:5.2f} x maekit" if options.design_space else f"maekit is {ratios[name]:5.2f} x"
        print(f"  {name:<32} {rate:9.2f} img/s   {said}   {memory[name] / 1e9:5.2f} GB")
    if options.json:
        found = {"medians": medians, "ratios": ratios, "rates": rates, "memory": memory}
        options.json.write_text(json.dumps({**vars(options), "json": None, **found}, indent=1))


def make_step(name: str, options: argparse.Namespace) -> Callable[[], object]:
    """Return a function that takes one step of `maekit`, or of what it is compared with."""
    return PEERS[name](options) if name in PEERS else _maekit(options, **DESIGN_SPACE[name])


def _rate(step: Callable[[], object], options: argparse.Namespace) -> float:
    before = time.perf_counter()
    step()
    if options.device == "cuda":
        torch.cuda.synchronize()
    return options.batch_size / (time.perf_counter() - before)


def _memory_of(name: str) -> int:
    """Return the peak memory of a process that takes two steps, in bytes."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()[-1])


def _autocast(options: argparse.Namespace):
    return torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16")


def _maekit(options: argparse.Namespace, **changes: object) -> Callable[[], object]:
    from maekit.config import IMAGENET_MEAN, IMAGENET_STD, ModelConfig, OptimizerConfig
    from maekit.mae.autoencoder import build_autoencoder
    from maekit.mae.kernels import choose_kernels
    from maekit.mae.normalize import Normalizer
    from maekit.training.crops import Chunk
    from maekit.training.data import Uploader
    from maekit.training.distributed import DistributedContext
    from maekit.training.optim import make_optimizer, make_schedule
    from maekit.training.step import MaskedObjective, Step

    width, depth, heads = SIZES[options.model]
    device = torch.device(options.device)
    sizes = ModelConfig("vit_base_patch16_224", width=width, depth=depth, heads=heads)
    sizes = dataclasses.replace(sizes, **changes)
    model = build_autoencoder(sizes, seed=0).to(device)
    config = OptimizerConfig()
    step = Step(
        MaskedObjective(model, Normalizer(IMAGENET_MEAN, IMAGENET_STD, device)).train(),
        make_optimizer(model, config),
        make_schedule(config, batch_size=256, samples=1000, steps=100),
        forward=choose_kernels(model, device, options.precision),
        upload=Uploader(device, _no_tokens if sizes.target == "tokens" else None),
        world=DistributedContext(),
        compile=options.compile,
    )
    chunk = Chunk(
        torch.randint(256, (options.batch_size, 3, 224, 224), dtype=torch.uint8),
        torch.rand(options.batch_size) < 0.5,
        torch.rand(options.batch_size, 196 * sizes.masks_per_image),
        [],
    )
    if options.device == "cuda":
        chunk = chunk.pin_memory()
    return lambda: step([[chunk]], 50)


def _no_tokens(images: torch.Tensor, flips: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(images), 196, dtype=torch.int64)


def _transformers(options: argparse.Namespace) -> Callable[[], object]:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    width, depth, heads = SIZES[options.model]
    config = ViTMAEConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        norm_pix_loss=True,
    )
    model = ViTMAEForPreTraining(config).to(options.device).train()
    return _usual_step(options, model, lambda images: model(pixel_values=images).loss)


def _timm(options: argparse.Namespace) -> Callable[[], object]:
    model = PlainMAE(*SIZES[options.model]).to(options.device).train()
    return _usual_step(options, model, model)


def _reference(options: argparse.Namespace) -> Callable[[], object]:
    model = PlainMAE(*SIZES[options.model]).to(options.device).train()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return _usual_step(options, model, model, scaled=options.device == "cuda")


def _usual_step(
    options: argparse.Namespace,
    model: nn.Module,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    *,
    scaled: bool = False,
) -> Callable[[], object]:
    """Return a step as training scripts write it; `scaled` is fp16 with a loss scaler, and waits for the device."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)
    images = torch.randn(options.batch_size, 3, 224, 224)
    scaler = torch.amp.GradScaler(options.device, enabled=scaled)
    half = torch.autocast(options.device, torch.float16) if scaled else _autocast(options)

    def step() -> None:
        with half:
            loss = loss_of(images.to(options.device))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        loss.item()
        if scaled:
            torch.cuda.synchronize()

    return step


class PlainMAE(nn.Module):
    """A MAE put together from timm's parts, without any of maekit's."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block, VisionTransformer

        self.vit = VisionTransformer(embed_dim=width, depth=depth, num_heads=heads, num_classes=0, global_pool="")
        self.embed = nn.Linear(width, 512)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 512))
        self.positions = nn.Parameter(torch.randn(1, 197, 512) * 0.02, requires_grad=False)
        self.blocks = nn.Sequential(*[Block(512, 16, qkv_bias=True) for _ in range(8)])
        self.norm = nn.LayerNorm(512)
        self.pred = nn.Linear(512, 768)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the loss of normalised images, `[B, 3, 224, 224]`."""
        b = images.shape[0]
        tokens = self.vit.patch_embed(images) + self.vit.pos_embed[:, 1:]
        shuffle = torch.rand(b, 196, device=images.device).argsort(1)
        keep, masked = shuffle[:, :49], shuffle[:, 49:]
        tokens = tokens.gather(1, keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        tokens = torch.cat([(self.vit.cls_token + self.vit.pos_embed[:, :1]).expand(b, -1, -1), tokens], 1)
        latent = self.embed(self.vit.norm(self.vit.blocks(tokens)))
        full = self.mask_token.to(latent.dtype).repeat(b, 197, 1)
        with_class = torch.cat([torch.zeros_like(keep[:, :1]), keep + 1], 1)
        full = full.scatter(1, with_class.unsqueeze(-1).expand(-1, -1, 512), latent) + self.positions
        decoded = self.norm(self.blocks(full))
        chosen = decoded.gather(1, (masked + 1).unsqueeze(-1).expand(-1, -1, 512))
        patches = images.reshape(b, 3, 14, 16, 14, 16).permute(0, 2, 4, 3, 5, 1).reshape(b, 196, 768)
        target = patches.gather(1, masked.unsqueeze(-1).expand(-1, -1, 768))
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return nn.functional.mse_loss(self.pred(chosen), target)


PEERS = {"maekit": _maekit, "transformers": _transformers, "timm": _timm, "reference": _reference}

if __name__ == "__main__":
    main()
