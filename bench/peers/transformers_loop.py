"""The same loop with transformers: its image processor in the workers, ViTModel, torch's DataLoader, one .npy file.

With `--convert`, first of all and once: writes an encoder of maekit's as the folder that `from_pretrained` reads.
Prints its rate, counted from the moment when the model is ready.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import AutoImageProcessor, ViTConfig, ViTImageProcessor, ViTModel

HEAD_DIM = 64  # of every plain ViT that is measured


class Images(Dataset):
    """The images of a folder, decoded and processed."""

    def __init__(self, paths: list[Path], processor) -> None:
        self._paths, self._processor = paths, processor

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> torch.Tensor:
        with Image.open(self._paths[number]) as image:
            return self._processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="the folder that --convert writes")
    parser.add_argument("images", type=Path, nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--convert", type=Path, help="encoder.safetensors of a run")
    parser.add_argument("--preprocess", type=json.loads, help="for --convert, as the ONNX file's metadata has it")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    if options.convert:
        convert(options.convert, options.preprocess, options.model)
        return
    torch.set_num_threads(options.threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    model = ViTModel.from_pretrained(options.model, add_pooling_layer=False, dtype=dtype).eval()
    dataset = Images(sorted(options.images.iterdir()), AutoImageProcessor.from_pretrained(options.model))
    before = time.perf_counter()
    rows = []
    with torch.inference_mode():
        for batch in DataLoader(dataset, options.batch_size, num_workers=options.workers):
            tokens = model(pixel_values=batch.to(dtype)).last_hidden_state
            rows.append(F.normalize(tokens[:, 1:].float().mean(1), dim=-1).numpy())
    seconds = time.perf_counter() - before
    np.save(options.out, np.concatenate(rows))
    print(json.dumps({"images_per_second": len(dataset) / seconds}))


def convert(weights: Path, preprocess: dict, out: Path) -> None:
    theirs = load_file(weights)
    depth = len({name.split(".")[1] for name in theirs if name.startswith("blocks.")})
    hidden, _, patch, _ = theirs["patch_embed.proj.weight"].shape
    ours = {
        "embeddings.cls_token": theirs["cls_token"],
        "embeddings.position_embeddings": theirs["pos_embed"],
        "embeddings.patch_embeddings.projection.weight": theirs["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": theirs["patch_embed.proj.bias"],
        "layernorm.weight": theirs["norm.weight"],
        "layernorm.bias": theirs["norm.bias"],
    }
    names = {"layernorm_before": "norm1", "layernorm_after": "norm2", "attention.o_proj": "attn.proj"}
    names |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for number in range(depth):
        for kind in ("weight", "bias"):
            for name, timm_name in names.items():
                ours[f"layers.{number}.{name}.{kind}"] = theirs[f"blocks.{number}.{timm_name}.{kind}"]
            parts = theirs[f"blocks.{number}.attn.qkv.{kind}"].chunk(3)
            for name, part in zip("qkv", parts, strict=True):
                ours[f"layers.{number}.attention.{name}_proj.{kind}"] = part
    config = ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=depth,
        num_attention_heads=hidden // HEAD_DIM,
        intermediate_size=4 * hidden,
        patch_size=patch,
        image_size=preprocess["size"][0],
        layer_norm_eps=1e-6,
    )
    model = ViTModel(config, add_pooling_layer=False)
    model.load_state_dict(ours)
    model.save_pretrained(out)
    height, width = preprocess["size"]
    ViTImageProcessor(
        size={"shortest_edge": preprocess["resize"][0]},
        resample=Image.Resampling.BICUBIC,
        do_center_crop=True,
        crop_size={"height": height, "width": width},
        image_mean=preprocess["mean"],
        image_std=preprocess["std"],
    ).save_pretrained(out)


if __name__ == "__main__":
    main()
