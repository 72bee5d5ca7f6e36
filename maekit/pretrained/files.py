"""Weights files: read without running code from them, loaded strictly, written under timm's names."""

import argparse
import hashlib
import io
import json
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from timm.models.vision_transformer import VisionTransformer

from maekit.system.errors import InputError

# Keys under which training scripts store the weights, beside optimiser state and arguments.
_WRAPPERS = ("model", "state_dict")


@dataclass(frozen=True)
class WeightsFile:
    """A weights file, safetensors or PyTorch, read once: what is hashed is what is loaded, whatever replaces the file.

    Attributes:
        tensors: the weights, on the CPU.
        sha256: digest of the file, hexadecimal.
        description: what `encoder_bytes` stored beside the weights; empty for any other file.
    """

    tensors: dict[str, torch.Tensor]
    sha256: str
    description: dict[str, Any]


def read_weights(path: Path) -> WeightsFile:
    """Read a weights file; no code in it runs.

    Raises:
        InputError: the file cannot be read or holds no weights.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read weights from {path}: {error.strerror or error}") from error
    digest = hashlib.sha256(content).hexdigest()
    if path.suffix != ".safetensors":
        return WeightsFile(_pytorch(path, content), digest, {})
    try:
        return WeightsFile(safetensors.torch.load(content), digest, _description(content))
    except safetensors.SafetensorError as error:
        raise InputError(f"cannot read weights from {path}: {error}") from error


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file onto the CPU.

    Raises:
        InputError: the file cannot be read, or is no safetensors file.
    """
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"cannot read weights from {path}: {error}") from error


def _pytorch(path: Path, content: bytes) -> dict[str, torch.Tensor]:
    """Return the weights of a PyTorch file on the CPU; no code in it runs.

    Raises:
        InputError: the file needs code to be read, or holds no weights.
    """
    try:
        # Checkpoints of the reference implementation contain its arguments as a Namespace, which only holds values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
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


def _description(content: bytes) -> dict[str, Any]:
    """Return the description in the header of a safetensors file: its length in eight bytes, then JSON."""
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        description = json.loads(header.get("__metadata__", {}).get("maekit", "{}"))
    except (ValueError, RecursionError):
        return {}
    return description if isinstance(description, dict) else {}
