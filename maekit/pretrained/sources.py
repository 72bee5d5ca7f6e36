"""Sources of weights: a run, one of its checkpoints, published weights, or any weights file.

    RUN, CHECKPOINT        maekit's own: encoder, decoder, normalisation and config
    FINETUNED              the --out of `maekit evaluate finetune`: its encoder
    timm:NAME              weights that timm fetches
    FILE                   an encoder under timm's names (safetensors, or a PyTorch file that needs no code to load),
                           or the reference implementation's .pth, with its decoder if it holds one
    DIRECTORY              config.json and weights: transformers' ViTMAE, or a timm model in the format of its hub

`pretrain --init-from`, `export`, and all commands that need a decoder take the same sources.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import timm
import torch

from maekit import runs
from maekit.config import ModelConfig
from maekit.images import Preprocess
from maekit.mae.encoder import DEFAULT_MODEL, TIMM_NAMES
from maekit.pretrained.files import read_weights
from maekit.pretrained.key_names import Parts, from_reference, from_transformers
from maekit.system.errors import InputError

Note = Callable[[str], None]

TIMM_PREFIX = "timm:"
# In transformers' ViTMAE; those of the decoder begin with `decoder_`, as here.
_VIT_MAE_NAMES = {"width": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads"}
_HUGGING_FACE_FILES = ("model.safetensors", "pytorch_model.bin")
# Exceptions that values of an unexpected type or range raise.
_MALFORMED = (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError, InputError)
# The published ViTs by width: timm's name and the number of heads (Dosovitskiy et al. 2021, table 1; tiny: DeiT).
_PUBLISHED = {
    192: ("vit_tiny_patch16_224", 3),
    384: ("vit_small_patch16_224", 6),
    768: ("vit_base_patch16_224", 12),
    1024: ("vit_large_patch16_224", 16),
    1280: ("vit_huge_patch14_224", 16),
}


@dataclass(frozen=True)
class Source:
    """The weights of a source, and the description of their model.

    Attributes:
        encoder: weights under timm's names.
        decoder: weights under the names of `maekit.mae.decoder.Decoder`; empty without a decoder.
        task: other weights of a maekit autoencoder: the basis of its target, the mask token of its encoder.
        sizes: settings of the model under the names of `ModelConfig`, as far as the source gives them.
        preprocess: preprocessing from a decoded image to the input; None if the source does not give it.
        norm_eps: epsilon of the LayerNorms, if it differs from the published one.
        provenance: JSON values that identify the weights.
        shards: the training shards, if known.
        image: which member of their samples was the image.
        timm_arguments: all arguments that timm builds the model with; None if only `sizes` are known.
        is_named: whether the source gives its model name; if not, the name is given by the caller or guessed from the
            weights.
    """

    encoder: dict[str, torch.Tensor]
    decoder: dict[str, torch.Tensor]
    sizes: dict[str, Any]
    preprocess: Preprocess | None = None
    norm_eps: float | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    shards: tuple[str, ...] = ()
    image: str | None = None
    timm_arguments: dict[str, Any] | None = None
    is_named: bool = True
    task: dict[str, torch.Tensor] = field(default_factory=dict)

    def config(self) -> ModelConfig:
        """Return the model that these weights belong to."""
        return ModelConfig(**{f.name: self.sizes[f.name] for f in fields(ModelConfig) if f.name in self.sizes})


def read_source(name: str, *, model: str | None = None, on_note: Note = lambda text: None) -> Source:
    """Read the weights of a source, except `timm:NAME`, which needs timm and a network.

    Args:
        name: the source; see the top of this file.
        model: timm's name of the architecture, for a file that does not give it.
        on_note: receives notes on damaged checkpoints and on the checkpoint used.

    Raises:
        InputError: no such source, or a source of an unknown kind.
    """
    path = Path(name)
    try:
        path.stat()
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            raise InputError(f"cannot read {name[:200]}: {error.strerror}") from error
    if runs.is_finetuned(path):
        path = runs.FinetuneDirectory(path).encoder_file
        if not path.is_file():
            raise InputError(f"{name} is a fine-tuning that has not ended; run its command again to go on")
    if path.is_file():
        return _from_file(path, model)
    if (path / "config.json").is_file() and not runs.is_run(path):
        return _from_hugging_face(path)
    if not path.exists():
        raise InputError(f"{name} does not exist; published weights are named timm:NAME")
    return _from_run(path, on_note)


def _from_run(path: Path, on_note: Note) -> Source:
    run, checkpoint = runs.find_checkpoint(path, on_note)
    config = run.config()
    weights = read_weights(checkpoint.path / runs.MODEL)
    if weights.sha256 != checkpoint.digest():
        raise InputError(f"{checkpoint.path} was changed while it was read; run the command again")
    whole = weights.tensors
    encoder, decoder = (
        {key.removeprefix(prefix): tensor for key, tensor in whole.items() if key.startswith(prefix)}
        for prefix in ("encoder.", "decoder.")
    )
    task = {key: tensor for key, tensor in whole.items() if not key.startswith(("encoder.", "decoder."))}
    provenance = {"source": "run", "step": checkpoint.step, "sha256": weights.sha256}
    provenance["data_digest"] = checkpoint.state()["data_digest"]
    preprocess = Preprocess.for_size(config.model.size, config.data.mean, config.data.std)
    on_note(f"weights of {checkpoint.path} (step {checkpoint.step})")
    sizes = vars(config.model)
    return Source(
        encoder,
        decoder,
        sizes,
        task=task,
        preprocess=preprocess,
        provenance=provenance,
        shards=config.shards,
        image=config.data.image,
    )


def _from_file(path: Path, model: str | None) -> Source:
    weights = read_weights(path)
    parts, description = from_reference(weights.tensors), weights.description
    provenance = {"source": "file", "file": path.name, "sha256": weights.sha256}
    if "timm_arguments" not in description:
        sizes = _told_by_weights(path, parts, model)
        preprocess = timm_preprocess(_pretrained_cfg(model), sizes["image_size"]) if model and "." in model else None
        return Source(*parts, sizes, preprocess=preprocess, provenance=provenance, is_named=False)
    try:
        arguments = description["timm_arguments"]
        sizes = _told_by_timm(description["model"], arguments, arguments["img_size"])
        preprocess = Preprocess.from_json(description["preprocess"])
    except _MALFORMED as error:
        raise InputError(f"{path}: its maekit metadata is damaged: {error!r}") from error
    provenance |= {key: description[key] for key in ("step", "data_digest") if key in description}
    return Source(*parts, sizes, preprocess=preprocess, provenance=provenance)


def _told_by_timm(name: str, arguments: Mapping[str, Any], image_size: Any) -> dict[str, Any]:
    """Convert the arguments that timm builds an encoder with to sizes."""
    sizes = {key: arguments[argument] for key, argument in TIMM_NAMES.items() if argument in arguments}
    if isinstance(image_size, (list, tuple)):
        height, width = map(int, image_size)
        sizes["image_size"] = height if height == width else (height, width)
    else:
        sizes["image_size"] = int(image_size)
    sizes |= {"name": str(name), "channels": int(arguments.get("in_chans", 3))}
    return sizes | {"class_token": arguments.get("class_token")}


def _told_by_weights(path: Path, parts: Parts, model: str | None) -> dict[str, Any]:
    """Infer the sizes of an encoder from the shapes of its weights."""
    weights = parts.encoder
    projection, positions = weights.get("patch_embed.proj.weight"), weights.get("pos_embed")
    if projection is None or positions is None or projection.ndim != 4 or positions.ndim != 3:
        some = ", ".join(list(weights)[:3])
        raise InputError(
            f"{path} holds no ViT encoder under timm's names: no patch_embed.proj.weight or pos_embed (it has {some})"
        )
    width, channels, patch, _ = map(int, projection.shape)
    tokens = int(positions.shape[1])
    if model:
        name = model.split(".")[0]
        with torch.device("meta"):
            donor = create_timm(name, {"num_classes": 0})
        prefix = 0 if getattr(donor, "no_embed_class", False) else getattr(donor, "num_prefix_tokens", 0)
        return {"name": name, "image_size": _side(path, tokens - prefix) * patch, "is_any_vit": True}
    if width not in _PUBLISHED:
        raise InputError(
            f"{path}: a width of {width} is none of the published ({', '.join(map(str, _PUBLISHED))}), and a file of "
            "weights does not tell the number of heads; name the architecture with `model`"
        )
    name, heads = _PUBLISHED[width]
    side = _side(path, tokens - 1)  # the class token's position comes before those of the patches
    sizes: dict[str, Any] = {"name": name, "image_size": side * patch, "patch_size": patch, "channels": channels}
    sizes |= {"width": width, "depth": _count_blocks(weights), "heads": heads}
    if parts.decoder:
        # No weight tells the number of heads: it is the published one.
        embed = parts.decoder.get("embed.weight", torch.zeros(()))
        sizes |= {"decoder_width": len(embed) if embed.ndim else ModelConfig.decoder_width}
        sizes |= {"decoder_depth": _count_blocks(parts.decoder), "decoder_heads": ModelConfig.decoder_heads}
    return sizes


def _side(path: Path, patches: int) -> int:
    """Return the side of a square grid with this number of patches.

    Raises:
        InputError: the number is not a square.
    """
    side = math.isqrt(max(patches, 0))
    if not side or side**2 != patches:
        raise InputError(f"{path} has positions for {patches} patches, which make no square of patches")
    return side


def _count_blocks(weights: Mapping[str, torch.Tensor]) -> int:
    return len({key.split(".")[1] for key in weights if key.startswith("blocks.")})


def _from_hugging_face(path: Path) -> Source:
    """Read a directory with config.json and weights, in the format of the hub."""
    config = _read_json(path / "config.json")
    file = next((path / name for name in _HUGGING_FACE_FILES if (path / name).is_file()), None)
    if file is None:
        raise InputError(f"{path} holds a config.json, and none of {', '.join(_HUGGING_FACE_FILES)} beside it")
    weights = read_weights(file)
    provenance = {"file": file.name, "sha256": weights.sha256}
    if isinstance(config.get("architecture"), str):
        provenance["source"] = "timm"
        return _from_timm_directory(path, config, weights.tensors, provenance)
    if config.get("model_type") != "vit_mae":
        raise InputError(
            f"{path}/config.json is of a model of type {config.get('model_type')!r}; known are vit_mae (transformers' "
            "ViTMAE) and timm's models"
        )
    parts = from_transformers(weights.tensors)
    try:
        if config.get("hidden_act", "gelu") != "gelu" or int(config.get("num_channels", 3)) != 3:
            raise InputError(f"{path}: only models of three channels with exact GELU are known")
        sizes: dict[str, Any] = {key: int(config[key]) for key in ("image_size", "patch_size")}
        for prefix in ("", "decoder_"):
            sizes |= {prefix + key: int(config[prefix + theirs]) for key, theirs in _VIT_MAE_NAMES.items()}
        sizes["name"], _ = _PUBLISHED.get(sizes["width"], (DEFAULT_MODEL, 0))
        sizes |= {"mask_ratio": float(config["mask_ratio"])}
        sizes |= {"target": "norm_pixel" if config["norm_pix_loss"] else "pixel"}
        eps = float(config["layer_norm_eps"])
        if not 0 < eps < 1:
            raise ValueError(f"layer_norm_eps {eps}")
    except _MALFORMED as error:
        raise InputError(f"{path}/config.json is no config of ViTMAE: {error!r}") from error
    file = path / "preprocessor_config.json"
    prepared = _read_json(file) if file.is_file() else {}
    preprocess = None
    if "image_mean" in prepared and "image_std" in prepared:
        try:
            mean, std = (tuple(map(float, prepared[key])) for key in ("image_mean", "image_std"))
            preprocess = Preprocess.for_size((sizes["image_size"], sizes["image_size"]), mean, std)
        except _MALFORMED as error:
            raise InputError(f"{file}: {error}") from error
    provenance = {"source": "transformers", **provenance}
    return Source(*parts, sizes, preprocess=preprocess, norm_eps=eps, provenance=provenance)


def _from_timm_directory(
    path: Path, config: Mapping[str, Any], weights: dict[str, torch.Tensor], provenance: dict[str, Any]
) -> Source:
    """Read a timm model in the format of its hub, which `export --format timm` writes too."""
    try:
        arguments = dict(config.get("model_args") or {})
        cfg = dict(config.get("pretrained_cfg") or {})
        sizes = _told_by_timm(config["architecture"], arguments, arguments.get("img_size") or cfg["input_size"][1:])
        image_size = sizes["image_size"]
        preprocess = timm_preprocess(cfg, image_size)
    except _MALFORMED as error:
        raise InputError(f"{path}/config.json is no config of a timm model: {error!r}") from error
    # Keep all arguments: the weights do not reveal, for example, the activation or the norm.
    img_size = image_size if isinstance(image_size, int) else list(image_size)
    timm_arguments = {**arguments, "img_size": img_size, "num_classes": 0}
    sizes["is_any_vit"] = True
    return Source(weights, {}, sizes, preprocess=preprocess, provenance=provenance, timm_arguments=timm_arguments)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object")
    return value


def fetch_timm(name: str, arguments: Mapping[str, Any], said: str) -> Any:
    """Return a timm model with its published weights.

    Raises:
        InputError: timm has no such model, or cannot get its weights.
    """
    _check_known(name, said)
    try:
        return timm.create_model(name, pretrained=True, **arguments)
    except Exception as error:  # the hub's client can raise anything: no network, no such tag, no such file
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise InputError(
            f"{said}: timm cannot get these weights ({first}); with no network, download the file elsewhere and name "
            "that instead"
        ) from error


def create_timm(name: str, arguments: Mapping[str, Any]) -> Any:
    """Build any timm model.

    Raises:
        InputError: timm has no such model, or cannot build it with these arguments.
    """
    _check_known(name, f"`model` {name}")
    try:
        return timm.create_model(name, pretrained=False, **arguments)
    except Exception as error:  # impossible sizes can raise anything
        raise InputError(f"timm cannot build {name} with {dict(arguments)}: {error}") from error


def _check_known(name: str, said: str) -> None:
    """Refuse a model that timm does not have; `said` begins the message."""
    if not timm.is_model(name):
        raise InputError(f"{said}: timm knows no such model")


def _pretrained_cfg(name: str) -> Mapping[str, Any]:
    _check_known(name, f"`model` {name}")
    try:
        cfg = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        raise InputError(f"`model` {name}: timm knows no such tag of {name.split('.')[0]}") from error
    return cfg.to_dict() if cfg is not None else {}


def timm_preprocess(cfg: Mapping[str, Any], image_size: int | tuple[int, int]) -> Preprocess:
    """Return the evaluation preprocessing from timm's pretrained config, for square or (height, width) images."""
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    height, width = (math.floor(side / float(cfg.get("crop_pct") or 1.0)) for side in size)
    # A one-channel model has one value. It is used for all three channels, whose luma is the model's input.
    mean, std = (tuple(map(float, cfg[key])) * (3 if len(cfg[key]) == 1 else 1) for key in ("mean", "std"))
    interpolation, crop_mode = str(cfg.get("interpolation") or "bicubic"), str(cfg.get("crop_mode") or "center")
    return Preprocess(size, (height, width), mean, std, interpolation, crop_mode)
