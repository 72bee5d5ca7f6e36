"""Builds models and loads the weights of a source: for export, for reconstruction, or to start training from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from maekit.config import IMAGENET_MEAN, IMAGENET_STD, ModelConfig
from maekit.config.settings import set_value
from maekit.images import Preprocess
from maekit.mae.autoencoder import MaskedAutoencoder, build_autoencoder
from maekit.mae.encoder import DEFAULT_MODEL, TIMM_NAMES, build_encoder, timm_arguments
from maekit.pretrained.files import load_strictly
from maekit.pretrained.resize import POSITIONS, PROJECTION, resized_encoder, resized_positions
from maekit.pretrained.sources import TIMM_PREFIX, Note, create_timm, fetch_timm, read_source, timm_preprocess
from maekit.system.errors import InputError

# timm's classifier. An encoder has none, and it has a norm after its pooling only if it has none before.
_HEAD = ("head.", "fc_norm.")


@dataclass(frozen=True)
class TrainedEncoder:
    """An encoder ready for use, and its description.

    Attributes:
        encoder: the encoder, on the CPU, in evaluation mode.
        name: timm's name of the model.
        preprocess: preprocessing from a decoded image to the model's input.
        arguments: keyword arguments with which `timm.create_model(name, …)` builds it.
        provenance: JSON values that identify the weights.
        shards: the training shards, if known.
        image: which member of a sample was its image in the training (maekit/shards/image_choice.py).
    """

    encoder: VisionTransformer
    name: str
    preprocess: Preprocess
    arguments: dict[str, Any]
    provenance: dict[str, Any]
    shards: tuple[str, ...] = ()
    image: str | None = None


@dataclass(frozen=True)
class TrainedAutoencoder:
    """An autoencoder ready for use, and its description.

    Attributes:
        model: the autoencoder, on the CPU, in evaluation mode.
        preprocess: preprocessing from a decoded image to the model's input.
        masking: kind of masks it was trained with.
    """

    model: MaskedAutoencoder
    preprocess: Preprocess
    masking: str


def load_encoder(
    name: str,
    *,
    model: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    on_note: Note = lambda text: None,
) -> TrainedEncoder:
    """Load the encoder that a source names.

    Args:
        name: the source; `maekit.pretrained.sources` lists the kinds.
        model: timm's name of the architecture, for a weights file: any plain ViT, with or without a tag. A tag
            (`vit_base_patch16_224.mae`) also selects the preprocessing. Without it, the weights' shapes decide.
        image_size: input of the encoder in pixels, or (height, width); by default the one it was trained at. The
            positions are resized (maekit/pretrained/resize.py).
        on_note: receives notes on damaged checkpoints, omitted weights, assumptions and resized positions.

    Raises:
        InputError: no such source, or it does not fit the model.
    """
    source = None if name.startswith(TIMM_PREFIX) else read_source(name, model=model, on_note=on_note)
    if model and (source is None or source.is_named):
        raise InputError(f"`model` {model}: {name} says itself which model it is")
    if source is None:
        return _published(name.removeprefix(TIMM_PREFIX), image_size, on_note)
    config = source.config()
    config.name = config.name or DEFAULT_MODEL
    trained_size = config.size
    arguments = source.timm_arguments or timm_arguments(config)
    if image_size is not None and ModelConfig(image_size=image_size).size != trained_size:
        config.image_size = image_size
        arguments = {**arguments, "img_size": timm_arguments(config)["img_size"]}
    encoder = create_timm(config.name, arguments) if source.sizes.get("is_any_vit") else build_encoder(config)
    weights = _resized(encoder, source.encoder, trained_size, name, on_note)
    _load_encoder(encoder, weights, name, on_note)
    set_norm_eps(encoder, source.norm_eps)
    preprocess = source.preprocess
    if preprocess is None:
        on_note(f"{name} does not say how its images were normalised: taken are ImageNet's mean and std")
        preprocess = Preprocess.for_size(trained_size, IMAGENET_MEAN, IMAGENET_STD)
    if config.size != preprocess.size:
        preprocess = preprocess.at(config.size)
    return TrainedEncoder(
        encoder.eval(), config.name, preprocess, arguments, source.provenance, source.shards, source.image
    )


def load_autoencoder(name: str, *, target: str | None = None, on_note: Note = lambda text: None) -> TrainedAutoencoder:
    """Load the whole autoencoder that a source names.

    Args:
        name: the source; `maekit.pretrained.sources` lists the kinds.
        target: prediction target, `norm_pixel` or `pixel`, for a file that does not give it.
        on_note: receives notes on damaged checkpoints and assumptions.

    Raises:
        InputError: no such source, it holds no decoder, or it does not fit the model.
    """
    source = None if name.startswith(TIMM_PREFIX) else read_source(name, on_note=on_note)
    if source is None or not source.decoder:
        raise InputError(f"{name} holds no decoder")
    config = source.config()
    if "target" not in source.sizes:
        set_value(config, "target", target or config.target)
        if target is None:
            on_note(f"{name} does not say what it predicts: assumed is {config.target}; `target` says otherwise")
    elif target not in (None, config.target):
        raise InputError(f"`target` {target}: {name} says itself that it predicts {config.target}")
    model = build_autoencoder(config, seed=0)
    load_strictly(model.encoder, source.encoder, name)
    load_strictly(model.decoder, source.decoder, f"the decoder of {name}")
    _load_task(model, source.task, name)
    set_norm_eps(model, source.norm_eps)
    preprocess = source.preprocess or Preprocess.for_size(config.size, IMAGENET_MEAN, IMAGENET_STD)
    return TrainedAutoencoder(model.eval(), preprocess, config.masking)


def _load_encoder(
    encoder: VisionTransformer, weights: Mapping[str, torch.Tensor], said: str, on_note: Note = lambda text: None
) -> None:
    """Load all weights but a classifier's, if the encoder has no classifier; `on_note` receives the omitted names."""
    known = encoder.state_dict()
    left_out = sorted(key for key in weights if key.startswith(_HEAD) and key not in known)
    if left_out:
        on_note(f"left out, a classifier: {', '.join(left_out)}")
    load_strictly(encoder, {key: tensor for key, tensor in weights.items() if key not in left_out}, said)


def _resized(
    encoder: VisionTransformer, weights: dict[str, torch.Tensor], size: tuple[int, int], said: str, on_note: Note
) -> dict[str, torch.Tensor]:
    """Return weights that were trained at images of `size` (height, width), for the sizes of this encoder."""
    if POSITIONS not in weights or PROJECTION not in weights or weights[PROJECTION].ndim != 4:
        return weights  # loading says what does not fit
    patch = weights[PROJECTION].shape[-1]
    old = (size[0] // patch, size[1] // patch)
    prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
    if weights[POSITIONS].shape[:2] != (1, prefix + old[0] * old[1]) or weights[POSITIONS].ndim != 3:
        return weights
    grid, patch_size = encoder.patch_embed.grid_size, encoder.patch_embed.patch_size[0]
    fitted, done = resized_encoder(weights, old=old, new=(grid[0], grid[1]), patch_size=patch_size)
    if done:
        on_note(f"{said}: {done}")
    return fitted


def _load_task(model: MaskedAutoencoder, weights: Mapping[str, torch.Tensor], name: str) -> None:
    """Load the weights outside encoder and decoder."""
    tensors = {key: p for key, p in model.named_parameters() if not key.startswith(("encoder.", "decoder."))}
    if {key: p.shape for key, p in tensors.items()} != {key: tensor.shape for key, tensor in weights.items()}:
        wanted, there = (", ".join(names) or "nothing" for names in (tensors, weights))
        raise InputError(f"{name} does not fit the model: besides encoder and decoder it wants {wanted}, not {there}")
    with torch.no_grad():
        for key, parameter in tensors.items():
            parameter.copy_(weights[key])


def initialize_from(model: MaskedAutoencoder, name: str, config: ModelConfig, on_note: Note = lambda text: None) -> str:
    """Load the weights that `--init-from` names: the encoder's, and the decoder's if the decoders are the same.

    Weights of another image or patch size are resized (maekit/pretrained/resize.py).

    Args:
        model: changed in place; its positions are also replaced by the source's.
        name: the source; `maekit.pretrained.sources` lists the kinds.
        config: config of the model being built.
        on_note: receives a note on what was resized.

    Returns:
        a sentence that says what was loaded.

    Raises:
        InputError: no such source, or it does not fit the model.
    """
    said = f"`init_from` {name}"
    if name.startswith(TIMM_PREFIX):
        # At their own sizes: timm would interpolate sine-cosine positions, too.
        kept = {key: value for key, value in timm_arguments(config).items() if key not in ("img_size", "patch_size")}
        donor = fetch_timm(name.removeprefix(TIMM_PREFIX), kept, said)
        weights = _resized(model.encoder, donor.state_dict(), donor.patch_embed.img_size, said, on_note)
        _load_encoder(model.encoder, weights, said)
        return f"the encoder starts from {name}"
    source = read_source(name, model=config.name)
    if (channels := source.sizes.get("channels", 3)) != config.channels:
        raise InputError(f"{said} sees {channels} channel{'s' * (channels > 1)}, as `channels={channels}` does")
    plain, ours = {*TIMM_NAMES.values(), "img_size", "num_classes"}, timm_arguments(config)
    theirs = source.timm_arguments or {}
    if unknown := [key for key in theirs if key not in plain and ours.get(key) != theirs[key]]:
        raise InputError(f"{said} was built with {', '.join(unknown)}; pretrain builds plain ViTs only")
    trained = source.config()
    _load_encoder(model.encoder, _resized(model.encoder, source.encoder, trained.size, said, on_note), said)
    if not source.decoder:
        return f"the encoder starts from {name}"
    own = vars(config)
    kinds = ("decoder_heads", "decoder", "mask_tokens", "target", "tokenizer_sha256")
    differing = [key for key in kinds if source.sizes.get(key, own[key]) != own[key]]
    decoder = dict(source.decoder)
    patch = source.encoder[PROJECTION].shape[-1]
    grid = (trained.size[0] // patch, trained.size[1] // patch)
    if grid != model.grid and patch == model.patch_size and POSITIONS in decoder:
        decoder[POSITIONS], _ = resized_positions(decoder[POSITIONS], grid, model.grid)
    shapes = {key: tensor.shape for key, tensor in model.decoder.state_dict().items()}
    if differing or shapes != {key: tensor.shape for key, tensor in decoder.items()}:
        return f"the encoder starts from {name}, the decoder anew: it is not the one of these settings"
    load_strictly(model.decoder, decoder, said)
    _load_task(model, source.task, said)
    basis = ", with its basis of principal components" if source.task and config.target == "pca" else ""
    return f"encoder and decoder start from {name}{basis}"


def resolve_model(config: ModelConfig) -> None:
    """Fill in encoder settings that the config leaves open, from the source that `init_from` names.

    These are name, class token, patch size, width, depth and heads. `timm:NAME` gives only the name. Without a source,
    the name is the default.
    """
    if config.init_from is not None:
        if config.init_from.startswith(TIMM_PREFIX):
            config.name = config.name or config.init_from.removeprefix(TIMM_PREFIX).split(".")[0]
        else:
            fill_in(config, read_source(config.init_from, model=config.name).sizes)
    config.name = config.name or DEFAULT_MODEL


def fill_in(config: ModelConfig, donor: Mapping[str, Any]) -> None:
    """Fill in the settings that `config` leaves open from a donor with the same model name."""
    if config.name not in (None, donor.get("name")):
        return  # another model was requested; loading checks whether the weights fit it
    for name in ("name", "class_token", *TIMM_NAMES):
        if getattr(config, name) is None:
            setattr(config, name, donor.get(name))


def norm_eps(module: torch.nn.Module) -> float | None:
    """Return the epsilon of the first LayerNorm; None if there is none."""
    return next((float(part.eps) for part in module.modules() if isinstance(part, torch.nn.LayerNorm)), None)


def set_norm_eps(module: torch.nn.Module, eps: float | None) -> None:
    """Set the epsilon of every LayerNorm; None leaves them unchanged."""
    for part in module.modules():
        if eps is not None and isinstance(part, torch.nn.LayerNorm):
            part.eps = eps


def _published(name: str, image_size: int | tuple[int, int] | None, on_note: Note) -> TrainedEncoder:
    """Fetch published weights with timm, in the model they were published for, or that model for another image size."""
    encoder = fetch_timm(name, {"num_classes": 0}, f"{TIMM_PREFIX}{name}")
    kind = type(encoder)
    if kind is not VisionTransformer:
        raise InputError(f"{TIMM_PREFIX}{name} is a {kind.__name__}; VisionTransformers are known")
    cfg = encoder.pretrained_cfg
    arguments = {"img_size": encoder.patch_embed.img_size[0], "num_classes": 0}
    provenance = {"source": "timm", "name": name, "hub": cfg.get("hf_hub_id"), "license": cfg.get("license")}
    preprocess = timm_preprocess(cfg, arguments["img_size"])
    if image_size is not None:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        arguments["img_size"] = image_size if isinstance(image_size, int) else [height, width]
        resized = create_timm(name, arguments)
        weights = _resized(resized, encoder.state_dict(), encoder.patch_embed.img_size, name, on_note)
        load_strictly(resized, weights, name)
        encoder, preprocess = resized, preprocess.at((height, width))
    return TrainedEncoder(encoder.eval(), name.split(".")[0], preprocess, arguments, provenance)
