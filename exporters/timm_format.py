"""`maekit export --format timm`: a directory for `timm.create_model("local-dir:DIR", pretrained=True)`."""

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch

from maekit.images import LUMA, Pixels
from maekit.pretrained.load import TrainedEncoder, norm_eps, set_norm_eps
from maekit.pretrained.sources import Note
from maekit.system import files
from maekit.system.errors import InputError, MaekitError

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def write_timm(trained: TrainedEncoder, out: Path, images: Pixels, on_note: Note) -> list[Path]:
    """Write an encoder in the format of timm's hub, after checking that timm loads it and returns the same tokens.

    Args:
        trained: the encoder.
        out: the directory; may exist already and hold an earlier export.
        images: images to compare on, uint8 `[n, H, W, 3]`.
        on_note: receives a note on what timm's format cannot express.

    Returns:
        the written files.

    Raises:
        MaekitError: timm cannot load it, the loaded model gives other tokens, or the disk is full.
    """
    config = json.dumps(_config(trained), indent=2).encode()
    tensors = {name: tensor.detach().contiguous() for name, tensor in trained.encoder.state_dict().items()}
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    try:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / CONFIG).write_bytes(config)
            (Path(folder) / WEIGHTS).write_bytes(weights)
            _compare(trained, Path(folder), images, on_note)
    except OSError as error:
        raise files.write_failure(Path(error.filename or tempfile.gettempdir()), error) from error
    # Remove the old config first and write the new one last: a directory with a config can always be loaded.
    (out / CONFIG).unlink(missing_ok=True)
    files.write_atomically(out / WEIGHTS, weights)
    files.write_atomically(out / CONFIG, config)
    return [out / CONFIG, out / WEIGHTS]


def refuse_foreign_directory(out: Path) -> None:
    """Check that a directory is new or an earlier export of maekit.

    Raises:
        InputError: the directory holds something else.
    """
    if not out.exists():
        return
    there = {path.name for path in out.iterdir() if not path.name.endswith(".tmp")} if out.is_dir() else {""}
    with contextlib.suppress(OSError, ValueError, TypeError):
        is_own = not there or "maekit" in json.loads((out / CONFIG).read_bytes())
        if is_own and there <= {CONFIG, WEIGHTS}:
            return
    raise InputError(f"`out` {out}: must be a new directory, or one of an earlier export with `format=timm`")


def _config(trained: TrainedEncoder) -> dict[str, Any]:
    preprocess, channels = trained.preprocess, _channels(trained)
    mean, std = preprocess.mean, preprocess.std
    if channels == 1:
        mean, std = ((float(np.dot(values, LUMA)),) for values in (mean, std))
    return {
        "architecture": trained.name,
        "num_classes": 0,
        "num_features": trained.encoder.embed_dim,
        "global_pool": trained.encoder.global_pool,
        "model_args": {key: value for key, value in trained.arguments.items() if key != "num_classes"},
        "pretrained_cfg": {
            "input_size": [channels, *preprocess.size],
            "fixed_input_size": True,
            "interpolation": preprocess.interpolation,
            "crop_pct": preprocess.size[0] / preprocess.resize[0],
            "crop_mode": preprocess.crop_mode,
            "mean": list(mean),
            "std": list(std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        "maekit": trained.provenance,
    }


def _channels(trained: TrainedEncoder) -> int:
    return int(trained.encoder.patch_embed.proj.weight.shape[1])


@torch.no_grad()
def _compare(trained: TrainedEncoder, folder: Path, images: Pixels, on_note: Note) -> None:
    try:
        loaded: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except Exception as error:  # timm can raise anything
        raise MaekitError(f"timm cannot load what was exported: {error}") from error
    eps, theirs = (norm_eps(module) for module in (trained.encoder, loaded))
    if eps != theirs:
        on_note(f"this model has a LayerNorm epsilon of {eps}, which timm's config cannot say: timm takes {theirs}")
        set_norm_eps(loaded, eps)
    pixels = torch.from_numpy(images[:2]).permute(0, 3, 1, 2)[:, : _channels(trained)].float() / 255
    if not torch.equal(loaded.forward_features(pixels), trained.encoder.forward_features(pixels)):
        raise MaekitError("what timm loads from the exported directory gives other tokens; nothing is written")
