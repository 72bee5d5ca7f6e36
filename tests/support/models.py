"""A tiny trained encoder, and what its embeddings must be."""

import io
from pathlib import Path

import numpy as np
from PIL import Image
from support.processes import tiny_config
from support.shards import jpeg, write_shard

from maekit.config import IMAGENET_MEAN, IMAGENET_STD
from maekit.config.embed import EmbedConfig
from maekit.config.export import ExportConfig


def train(folder: Path) -> Path:
    """Make shards, a run of a tiny model on them, and its export: `shards`, `run`, `encoder.onnx`."""
    import maekit
    from maekit.exporters.export import export

    for shard, count in enumerate((9, 1, 20)):
        samples = {f"s{shard}k{i}": {"jpg": jpeg(100 * shard + i), "cls": b"1"} for i in range(count)}
        write_shard(folder / "shards" / f"{shard}.tar", samples)
    maekit.pretrain(tiny_config(folder / "shards", folder / "run"))
    export(ExportConfig(folder / "run", folder / "encoder.onnx"))
    return folder


def timm_embeddings(folder: Path, data: list[bytes], pool: str = "avg") -> np.ndarray:
    """Return embeddings by timm's own model, forward pass and transform: the oracle."""
    import timm
    import torch
    from safetensors.torch import load_file
    from timm.data import create_transform

    encoder = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0
    ).eval()
    encoder.load_state_dict(load_file(folder / "run" / "encoder.safetensors"), strict=True)
    # Below 128 pixels there is no margin around the crop.
    transform = create_transform(
        (3, 32, 32), interpolation="bicubic", crop_pct=1.0, mean=IMAGENET_MEAN, std=IMAGENET_STD
    )
    images = torch.stack([transform(Image.open(io.BytesIO(d)).convert("RGB")) for d in data])
    with torch.no_grad():
        tokens = encoder.forward_features(images)
    pooled = tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(1)
    return torch.nn.functional.normalize(pooled, dim=-1).numpy()


def embed_config(trained: Path, out: Path, **changes) -> EmbedConfig:
    # Wherever a process starts, and whatever it started before, it writes the same bytes.
    settings = {
        "shards": (str(trained / "shards"),),
        "device": "cpu",
        "runtime": "onnxruntime",
        "batch_size": 8,
        **changes,
    }
    return EmbedConfig(model=str(trained / "encoder.onnx"), out=str(out), **settings)
