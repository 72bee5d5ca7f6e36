"""Weights files: read without running code from them, loaded strictly, written under timm's names."""

import argparse
import json
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from timm.models.vision_transformer import VisionTransformer

from maekit.system.errors import InputError

# Keys under which training scripts store the weights, beside optimiser state and arguments.
_WRAPPERS = ("model", "state_dict")


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file onto the CPU.

    Raises:
        InputError: the file cannot be read, or is no safetensors file.
    """
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"cannot read weights from {path}: {error}") from error


def read_pytorch(path: Path) -> dict[str, torch.Tensor]:
    """Read the weights of a PyTorch file onto the CPU; no code in it runs.

    Raises:
        InputError: the file cannot be read, needs code to be read, or holds no weights.
    """
    try:
        # Checkpoints of the reference implementation contain its arguments as a Namespace, which only holds values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message advises running the code.
        raise InputError(
            f"cannot read weights from {path}: no PyTorch file, or one that needs code to be read; none is run"
        ) from error
    except Exception as error:  # a damaged file can raise anything
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise InputError(f"cannot read weights from {path}: {first}") from error
    if isinstance(loaded, dict):
        loaded = next((loaded[key] for key in _WRAPPERS if isinstance(loaded.get(key), dict)), loaded)
        if loaded and all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in loaded.items()):
            return dict(loaded)
    raise InputError(f"{path} holds no dictionary of weights")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a weights file, safetensors or PyTorch, onto the CPU.

    Raises:
        InputError: the file cannot be read or holds no weights.
    """
    return read_safetensors(path) if path.suffix == ".safetensors" else read_pytorch(path)


def load_strictly(module: torch.nn.Module, weights: Mapping[str, torch.Tensor], source: str) -> None:
    """Load weights; every parameter must be present with its shape, and nothing else may be.

    Raises:
        InputError: names the tensors that are missing, unexpected, of another shape, or not finite.
    """
    wanted = module.state_dict()
    missing, unexpected = ([n for n in a if n not in b] for a, b in ((wanted, weights), (weights, wanted)))
    problems = [f"missing {name}" for name in _by_block(missing, wanted)]
    problems += [f"unexpected {name}" for name in _by_block(unexpected, weights)]
    reshaped = [name for name in wanted if name in weights and weights[name].shape != wanted[name].shape]
    problems += [f"{n} is {list(weights[n].shape)}, the model wants {list(wanted[n].shape)}" for n in reshaped]
    problems += [f"{name} {problem}" for name, tensor in weights.items() if (problem := _unfit(tensor))]
    if problems:
        raise InputError(f"{source} does not fit the model: {'; '.join(problems)}")
    module.load_state_dict(dict(weights))


def _unfit(tensor: torch.Tensor) -> str | None:
    """Return why a tensor cannot be a weight, or None."""
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        return "is no plain tensor of numbers"
    return None if bool(torch.isfinite(tensor).all()) else "holds values that are not finite"


def _by_block(names: Sequence[str], whole: Iterable[str]) -> list[str]:
    """Return the names in order; the names of a whole block are merged into one, `blocks.2.*`."""
    rest = {_block_of(name) for name in set(whole) - set(names)}
    shown = {f"{block}*" if (block := _block_of(name)) and block not in rest else name: None for name in names}
    return list(shown)


def _block_of(name: str) -> str:
    return "".join(re.findall(r"^blocks\.\d+\.", name))


def encoder_bytes(encoder: VisionTransformer, description: dict[str, Any]) -> bytes:
    """Return the encoder as a safetensors file under timm's names, with its description as JSON metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    return safetensors.torch.save(tensors, metadata={"maekit": json.dumps(description)})


def file_description(path: Path) -> dict[str, Any]:
    """Return the description that `encoder_bytes` stored in a file's metadata; empty for any other file."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {}).get("maekit", "{}"))
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError):
        return {}
    return description if isinstance(description, dict) else {}
