"""Checkpoints: written aside, made durable, the manifest last, then renamed. No pickle anywhere."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import maekit
from maekit import files
from maekit.mae.weights import load_strictly, read_safetensors
from maekit.runs import MANIFEST, MODEL, OPTIMIZER, STATE, Checkpoint, RunDirectory


def save(
    run: RunDirectory, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Checkpoint:
    """Write the checkpoint of `state["step"]`; it is there whole or not at all.

    Raises:
        MaekitError: the disk is full or the place is not writable; earlier checkpoints are intact.
    """
    checkpoint = run.checkpoint(state["step"])
    aside = run.checkpoints / f".{checkpoint.path.name}.{os.getpid()}.tmp"
    try:
        aside.mkdir(parents=True)
        safetensors.torch.save_file(_on_cpu(model.state_dict()), aside / MODEL)
        safetensors.torch.save_file(_on_cpu(_optimizer_tensors(optimizer)), aside / OPTIMIZER)
        (aside / STATE).write_text(json.dumps({"maekit": maekit.__version__, **state}), encoding="utf-8")
        digests = {}
        for name in (MODEL, OPTIMIZER, STATE):
            # safetensors writes files that only their owner may read, and leaves them to the page cache.
            (aside / name).chmod(0o644)
            files.fsync_file(aside / name)
            digests[name] = files.sha256_file(aside / name)
        files.write_atomically(aside / MANIFEST, json.dumps({"sha256": digests}, indent=1).encode())
        aside.rename(checkpoint.path)
        files.fsync_directory(run.checkpoints)
    except (OSError, safetensors.SafetensorError) as error:
        raise _failure(checkpoint.path, error) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return checkpoint


def discard_after(run: RunDirectory, step: int) -> None:
    """Delete the checkpoints behind the one that is resumed: they are damaged, or it would not be the newest."""
    for checkpoint in run.list_checkpoints():
        if checkpoint.step > step:
            _delete(checkpoint)


def prune(run: RunDirectory, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what killed runs left unfinished."""
    for checkpoint in run.list_checkpoints()[keep:]:
        _delete(checkpoint)
    for leftover in run.checkpoints.glob(".step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def _delete(checkpoint: Checkpoint) -> None:
    # Renamed first, so that a half-deleted directory is never taken for a checkpoint.
    doomed = checkpoint.path.with_name(f".{checkpoint.path.name}.old.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    try:
        checkpoint.path.rename(doomed)
    except OSError as error:
        raise files.write_failure(checkpoint.path, error) from error
    shutil.rmtree(doomed, ignore_errors=True)


def load(checkpoint: Checkpoint, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load model and optimiser in place; return the state.

    Raises:
        InputError: the files do not fit the model.
    """
    load_strictly(model, read_safetensors(checkpoint.path / MODEL), str(checkpoint.path))
    tensors = read_safetensors(checkpoint.path / OPTIMIZER)
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        by_name.setdefault(name, {})[kind] = tensor
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            optimizer.state[parameter] = {
                kind: tensor.to(parameter.device) for kind, tensor in by_name.get(name, {}).items()
            }
    return checkpoint.state()


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimiser's state as `KIND/PARAMETER` -> tensor."""
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            for kind, value in optimizer.state[parameter].items():
                tensors[f"{kind}/{name}"] = value
    return tensors


def _on_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _failure(path: Path, error: Exception) -> Exception:
    if isinstance(error, OSError):
        return files.write_failure(path, error)
    # safetensors reports a full disk as its own error, with the system's words in it.
    return files.write_failure(path, OSError(0, str(error)))
