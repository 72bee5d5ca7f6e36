"""How long a recipe takes on a GPU, computed: the FLOPs of its training, counted, over what a GPU does in an hour.

    python bench/gpu_hours.py RECIPE ... [--samples 1281167] [--epochs E] [--gpu A100 ...] [--mfu 0.4] [--json FILE]

The recipe's model is built on torch's meta device, and the matrix products of a forward and a backward pass are counted
there, 2 FLOP for a multiplication with its addition. Attention is counted as its products written out, without what a
fused kernel computes twice; all else (norms, softmax, the optimiser) costs memory traffic rather than FLOPs, and is not
counted. Nothing is run, so how much of a GPU's peak a run reaches (`--mfu`, the model-FLOPs utilisation) is an
assumption, and so is that the loader keeps up: not yet measured on a GPU. By this count, two published times of a ViT-L
of 800 epochs come to 0.29 of the peak on 128 TPU-v3 cores (15.4 hours: He et al. 2021, table 2) and to 0.10 on 64 V100
(about 42 hours: the reference implementation's PRETRAIN.md).

Peaks are the makers': dense bf16 of the SXM boards; of a V100 fp16; of a TPU-v3 core, half a chip, bf16.
"""

import argparse
import copy
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from maekit.config import DEFAULT_EPOCHS, ModelConfig, PretrainConfig, load_config, total_steps
from maekit.mae.autoencoder import MaskedAutoencoder, build_autoencoder
from maekit.pretrained.load import resolve_model

IMAGENET = 1_281_167  # training images of ImageNet-1k
PEAKS = {"TPUv3-core": 61.5e12, "V100": 125e12, "A100": 312e12, "H100": 989e12, "H200": 989e12}  # FLOP/s


@dataclass(frozen=True)
class Cost:
    """What a recipe costs.

    Attributes:
        recipe: file name.
        flops_per_image: of a training step, forward and backward.
        images: trained on, repeats counted.
        flops: of the whole run.
        mfu: assumed share of the peak.
        hours: on one of each GPU, by name.
    """

    recipe: str
    flops_per_image: int
    images: int
    flops: int
    mfu: float
    hours: dict[str, float]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="+", type=Path, metavar="RECIPE")
    parser.add_argument("--samples", type=int, default=IMAGENET, help="images in the shards (default: ImageNet-1k)")
    parser.add_argument("--epochs", type=float, help="instead of the recipe's")
    parser.add_argument("--gpu", nargs="+", choices=PEAKS, default=["A100", "H100"])
    parser.add_argument("--mfu", type=float, default=0.4, help="assumed share of the peak (default: %(default)s)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    costs = []
    for recipe in options.recipes:
        config = load_config(recipe)
        if options.epochs is not None:
            config.epochs, config.steps = options.epochs, None
        costs.append(cost(config, recipe.name, options.samples, options.gpu, options.mfu))
    for found in costs:
        print(f"{found.recipe}: {found.flops_per_image / 1e9:.1f} GFLOP x {found.images / 1e6:,.1f} million images")
        for gpu, hours in found.hours.items():
            print(f"  {show_hours(hours)} hours of one {gpu} at {found.mfu:g} of its {PEAKS[gpu] / 1e12:g} TFLOP/s")
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(found) for found in costs], indent=1) + "\n")


def cost(config: PretrainConfig, name: str, samples: int, gpus: Sequence[str], mfu: float) -> Cost:
    """Compute what a run on so many samples costs."""
    config = copy.deepcopy(config)
    if config.epochs is None and config.steps is None:
        config.epochs = DEFAULT_EPOCHS
    images = total_steps(config, samples) * config.batch_size
    per_image = flops_per_image(config.model)
    flops = images * per_image
    return Cost(name, per_image, images, flops, mfu, {gpu: flops / (mfu * PEAKS[gpu]) / 3600 for gpu in gpus})


def build_on_meta(config: ModelConfig) -> MaskedAutoencoder:
    """Build the model of a config without memory for its weights; published weights are not fetched."""
    config = copy.deepcopy(config)
    resolve_model(config)
    with torch.device("meta"):
        return build_autoencoder(config, seed=0)


def flops_per_image(config: ModelConfig) -> int:
    """Count the FLOPs of a forward and a backward pass of a config's model."""
    model = build_on_meta(config)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    batch = 2
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        images = torch.empty(batch, config.channels, *config.size)
        noise = torch.empty(batch * config.masks_per_image, model.patches)
        tokens = torch.zeros(batch, model.patches, dtype=torch.int64) if config.target == "tokens" else None
        model(images, noise, tokens).loss.backward()
    return int(counter.get_total_flops()) // batch


def show_hours(hours: float) -> str:
    """Return hours to three digits, without an exponent."""
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


if __name__ == "__main__":
    main()
