"""The usual loop over a folder of images: timm's transform and model, torch's DataLoader, one .npy file.

Prints its rate, counted from the moment when the model is ready.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset


class Images(Dataset):
    """The images of a folder, decoded and transformed."""

    def __init__(self, paths: list[Path], transform) -> None:
        self._paths, self._transform = paths, transform

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> torch.Tensor:
        with Image.open(self._paths[number]) as image:
            return self._transform(image.convert("RGB"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True, help="timm's name")
    parser.add_argument("--weights", type=Path, required=True, help="encoder.safetensors of a run")
    parser.add_argument("--preprocess", type=json.loads, required=True, help="as the ONNX file's metadata has it")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = timm.create_model(options.model, num_classes=0).eval()
    model.load_state_dict(load_file(options.weights))
    spec = options.preprocess
    transform = create_transform(
        (3, *spec["size"]),
        interpolation="bicubic",
        mean=spec["mean"],
        std=spec["std"],
        crop_pct=spec["size"][0] / spec["resize"][0],
    )
    dataset = Images(sorted(options.images.iterdir()), transform)
    before = time.perf_counter()
    rows = []
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
        for batch in DataLoader(dataset, options.batch_size, num_workers=options.workers):
            tokens = model.forward_features(batch)
            rows.append(F.normalize(tokens[:, model.num_prefix_tokens :].float().mean(1), dim=-1).numpy())
    seconds = time.perf_counter() - before
    np.save(options.out, np.concatenate(rows))
    print(json.dumps({"images_per_second": len(dataset) / seconds}))


if __name__ == "__main__":
    main()
