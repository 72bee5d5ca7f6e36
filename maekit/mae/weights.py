"""Weights in and out: a trained model from its run, and the encoder's start from other people's weights."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from timm.models.vision_transformer import VisionTransformer

from maekit import runs
from maekit.config import ModelConfig, PretrainConfig
from maekit.errors import InputError
from maekit.mae.autoencoder import MaskedAutoencoder, build_autoencoder
from maekit.mae.encoder import DEFAULT_MODEL, timm_arguments

TIMM_PREFIX = "timm:"
_TIMM_NAMES = {"patch_size": "patch_size", "width": "embed_dim", "depth": "depth", "heads": "num_heads"}
# timm's classifier; an encoder has none.
_HEAD = ("head.", "fc_norm.")


@dataclass(frozen=True)
class TrainedModel:
    """A model with the weights of one checkpoint.

    Attributes:
        model: on the CPU, in evaluation mode.
        config: of its run.
        checkpoint: where the weights come from.
    """

    model: MaskedAutoencoder
    config: PretrainConfig
    checkpoint: runs.Checkpoint


def load_trained(path: Path, on_damage: Callable[[str], None] = lambda text: None) -> TrainedModel:
    """Load the model of a run (its newest valid checkpoint) or of one checkpoint directory.

    Raises:
        InputError: no run, no valid checkpoint, or weights that do not fit the run's config.
    """
    run, checkpoint = runs.find_checkpoint(path, on_damage)
    config = run.config()
    model = build_autoencoder(config.model, seed=config.seed)
    load_strictly(model, read_safetensors(checkpoint.path / runs.MODEL), str(checkpoint.path))
    return TrainedModel(model.eval(), config, checkpoint)


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file onto the CPU.

    Raises:
        InputError: the file cannot be read or is none.
    """
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"cannot read weights from {path}: {error}") from error


def load_strictly(module: torch.nn.Module, weights: Mapping[str, torch.Tensor], source: str) -> None:
    """Load weights; every parameter must be there with its shape, and nothing else.

    Raises:
        InputError: names what is missing, left over, or of another shape.
    """
    wanted = module.state_dict()
    problems = [f"missing {name}" for name in wanted if name not in weights]
    problems += [f"unexpected {name}" for name in weights if name not in wanted]
    problems += [
        f"{name} is {list(weights[name].shape)}, the model wants {list(wanted[name].shape)}"
        for name in wanted
        if name in weights and weights[name].shape != wanted[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise InputError(f"{source} does not fit the model: {'; '.join(problems[:4])}{more}")
    module.load_state_dict(dict(weights))


def resolve_model(config: ModelConfig) -> None:
    """Fill in what `init_from` says of the encoder and the config leaves open: name, patch size, width, depth, heads.

    A run and maekit's own files say all of it, `timm:NAME` the name; without either the name is the default.
    """
    source = config.init_from
    if source is not None:
        path = Path(source)
        if source.startswith(TIMM_PREFIX):
            config.name = config.name or source.removeprefix(TIMM_PREFIX).split(".")[0]
        elif path.is_dir():
            donor = runs.find_checkpoint(path)[0].config().model
            fill_in(config, vars(donor))
        else:
            description = _file_description(path)
            arguments = description.get("timm_arguments", {})
            sizes = {name: arguments.get(argument) for name, argument in _TIMM_NAMES.items()}
            fill_in(config, {"name": description.get("model"), **sizes})
    config.name = config.name or DEFAULT_MODEL


def fill_in(config: ModelConfig, donor: Mapping[str, Any]) -> None:
    """Take the sizes that `config` leaves open from a donor of the same name."""
    if config.name not in (None, donor["name"]):
        return  # another model was asked for; whether the weights fit it shows when they are loaded
    for name in ("name", *_TIMM_NAMES):
        if getattr(config, name) is None:
            setattr(config, name, donor[name])


def initialize_encoder(encoder: VisionTransformer, source: str, config: ModelConfig) -> None:
    """Give the encoder the weights that `--init-from` names, its positions included.

    Args:
        encoder: changed in place.
        source: `timm:NAME` (published weights, fetched by timm), a run or checkpoint directory, or a file of weights
            under timm's names (safetensors, or a PyTorch file that needs no code to load).
        config: of the model that is built.

    Raises:
        InputError: not there, or it does not fit.
    """
    if source.startswith(TIMM_PREFIX):
        weights = _from_timm(source.removeprefix(TIMM_PREFIX), config)
    elif (path := Path(source)).is_dir():
        _, checkpoint = runs.find_checkpoint(path)
        whole = read_safetensors(checkpoint.path / runs.MODEL)
        weights = {name.removeprefix("encoder."): w for name, w in whole.items() if name.startswith("encoder.")}
    elif path.is_file():
        weights = read_safetensors(path) if path.suffix == ".safetensors" else _from_pytorch(path)
    else:
        raise InputError(f"--init-from {source}: no such run or file; published weights are named timm:NAME")
    load_strictly(encoder, {n: w for n, w in weights.items() if not n.startswith(_HEAD)}, f"--init-from {source}")


def _from_timm(name: str, config: ModelConfig) -> dict[str, torch.Tensor]:
    import timm

    if not timm.is_model(name.split(".")[0]):
        raise InputError(f"--init-from {TIMM_PREFIX}{name}: timm knows no such model")
    try:
        donor = timm.create_model(name, pretrained=True, **timm_arguments(config))
    except Exception as error:  # whatever the hub's client raises: no network, no such tag, no such file
        first = str(error).strip().split("\n")[0]
        raise InputError(
            f"--init-from {TIMM_PREFIX}{name}: timm cannot get these weights ({first}); with no network, "
            "download the file elsewhere and name it: --init-from FILE"
        ) from error
    return dict(donor.state_dict())


def _from_pytorch(path: Path) -> dict[str, torch.Tensor]:
    try:
        # weights_only: no code in the file runs.
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise InputError(f"cannot read weights from {path}: {first}") from error
    if isinstance(loaded, dict) and isinstance(loaded.get("model"), dict):
        loaded = loaded["model"]
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise InputError(f"{path} holds no dictionary of weights")
    return loaded


def encoder_bytes(encoder: VisionTransformer, description: dict[str, Any]) -> bytes:
    """Return the encoder as a safetensors file under timm's names, its description as JSON in the metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    return safetensors.torch.save(tensors, metadata={"maekit": json.dumps(description)})


def _file_description(path: Path) -> dict[str, Any]:
    """Return what `encoder_bytes` wrote into the metadata of a file; nothing for any other file."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(json.loads((file.metadata() or {}).get("maekit", "{}")))
    except (OSError, safetensors.SafetensorError):
        return {}
