"""Checkpoints: written to a temporary directory, the manifest last, synced, then renamed. No pickle anywhere.

The loop pays only for copying the tensors off the device (on CUDA: for queueing that copy); a thread does the rest.
"""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from maekit.pretrained.files import load_strictly, read_safetensors
from maekit.runs import MANIFEST, MODEL, OPTIMIZER, STATE, Checkpoint, RunDirectory
from maekit.system import files
from maekit.system.errors import MaekitError
from maekit.version import __version__

Tensors = dict[str, torch.Tensor]

# safetensors' names of the dtypes that occur here.
_TYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time; a context manager that waits for the last one.

    Args:
        run: the run directory.
        model: the model whose weights are saved.
        optimizer: the optimiser whose state is saved.
        retain: whether the checkpoint of a step is never deleted.
        keep: number of newest checkpoints to keep.
    """

    def __init__(
        self,
        run: RunDirectory,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        keep: int,
        retain: Callable[[int], bool] = lambda step: False,
    ) -> None:
        self._run, self._model, self._optimizer = run, model, optimizer
        self._keep, self._retain = keep, retain
        self._copies: dict[str, Tensors] = {MODEL: {}, OPTIMIZER: {}}
        self._thread: threading.Thread | None = None
        self._error: MaekitError | None = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._join()

    def save(self, state: Mapping[str, Any]) -> None:
        """Copy the current tensors, and start writing the checkpoint of `state["step"]`."""
        self._join()  # the copies may still be in use
        self._copy(MODEL, self._model.state_dict())
        self._copy(OPTIMIZER, optimizer_tensors(self._optimizer))
        copied: torch.cuda.Event | None = None
        if next(self._model.parameters()).is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self._thread = threading.Thread(target=self._write, args=(dict(state), copied), name="checkpoint")
        self._thread.start()

    def failure(self) -> MaekitError | None:
        """Return the error of the background thread so far, or None."""
        return self._error

    def finish(self) -> None:
        """Wait until everything is on disk.

        Raises:
            MaekitError: the disk is full or the directory is not writable; earlier checkpoints are intact.
        """
        self._join()
        if self._error is not None:
            raise self._error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _copy(self, name: str, tensors: Tensors) -> None:
        """Copy into host memory that is reused by later saves; on CUDA it is pinned and the copy is asynchronous."""
        copies = self._copies[name]
        for key, tensor in tensors.items():
            if key not in copies or copies[key].shape != tensor.shape:
                copies[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copies[key].copy_(tensor.detach(), non_blocking=True)

    def _write(self, state: dict[str, Any], copied: "torch.cuda.Event | None") -> None:
        try:
            if copied is not None:
                copied.synchronize()
            # The last step may have made weights infinite before any loss shows it.
            broken = [key for copies in self._copies.values() for key, copy in copies.items() if not _is_finite(copy)]
            if broken:
                raise MaekitError(
                    f"{broken[0]} is not finite after step {state['step']}; no checkpoint holds it. A lower `lr`, a "
                    "longer warm-up or `precision=fp32` usually help"
                )
            write(self._run, self._copies[MODEL], self._copies[OPTIMIZER], state)
            prune(self._run, self._keep, self._retain)
        except MaekitError as error:
            self._error = error
        except Exception as error:  # otherwise the user would see a thread's traceback, and the run would continue
            self._error = MaekitError(f"saving step {state['step']} failed: {type(error).__name__}: {error}")


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def write(run: RunDirectory, model: Tensors, optimizer: Tensors, state: Mapping[str, Any]) -> Checkpoint:
    """Write the checkpoint of `state["step"]` atomically.

    Raises:
        MaekitError: the disk is full or the directory is not writable; earlier checkpoints are intact.
    """
    checkpoint = run.checkpoint(state["step"])
    aside = run.checkpoints / f".{checkpoint.path.name}.{os.getpid()}.tmp"
    contents: dict[str, Iterable[bytes | memoryview]] = {
        MODEL: serialize(model),
        OPTIMIZER: serialize(optimizer),
        STATE: [json.dumps({"maekit": __version__, **state}).encode()],
    }
    try:
        with files.writing(checkpoint.path):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            digests = {name: _write_durably(aside / name, blocks) for name, blocks in contents.items()}
            _write_durably(aside / MANIFEST, [json.dumps({"sha256": digests}, indent=1).encode()])
            files.fsync_directory(aside)
            files.rename(aside, checkpoint.path)
            files.fsync_directory(run.checkpoints)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return checkpoint


def serialize(tensors: Tensors) -> Iterable[bytes | memoryview]:
    """Yield the bytes of a safetensors file, block by block (https://github.com/huggingface/safetensors, "Format").

    The library's own writer holds the GIL, which would stop the loop, and reports a full disk only as text.

    Args:
        tensors: contiguous, on the CPU.
    """
    header, end = {}, 0
    # The safetensors library sorts by element size, then by name, so that all tensors are aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    for key, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    yield len(text).to_bytes(8, "little")
    yield text
    for _, tensor in ordered:
        if tensor.numel():
            yield tensor.reshape(-1).view(torch.uint8).numpy().data


def _write_durably(path: Path, blocks: Iterable[bytes | memoryview]) -> str:
    """Write a file and return its SHA-256; writing, hashing and syncing all release the GIL."""
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as file:
        for block in blocks:
            digest.update(block)
            rest = memoryview(block)
            while rest:
                rest = rest[file.write(rest) :]
        files.fsync(file)
    return digest.hexdigest()


def discard_after(run: RunDirectory, step: int) -> None:
    """Delete the checkpoints after the resumed one: they must be damaged, since the newest valid one was chosen."""
    for checkpoint in run.list_checkpoints():
        if checkpoint.step > step:
            _delete(checkpoint)


def prune(run: RunDirectory, keep: int, retain: Callable[[int], bool] = lambda step: False) -> None:
    """Delete all but the newest `keep` checkpoints and those to retain, and unfinished ones of killed runs."""
    for checkpoint in run.list_checkpoints()[keep:]:
        if not retain(checkpoint.step):
            _delete(checkpoint)
    for leftover in run.checkpoints.glob(".step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def _delete(checkpoint: Checkpoint) -> None:
    # Renamed first, so that a half-deleted directory is never taken for a checkpoint.
    doomed = checkpoint.path.with_name(f".{checkpoint.path.name}.old.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    with files.writing(checkpoint.path):
        files.rename(checkpoint.path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def load(checkpoint: Checkpoint, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load model and optimiser in place; return the state.

    Raises:
        InputError: the files do not fit the model.
    """
    load_strictly(model, read_safetensors(checkpoint.path / MODEL), str(checkpoint.path))
    load_optimizer(optimizer, read_safetensors(checkpoint.path / OPTIMIZER))
    return checkpoint.state()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """Return the optimiser's state as `KIND/PARAMETER` -> tensor."""
    return {
        f"{kind}/{name}": value
        for name, parameter in _named_parameters(optimizer)
        for kind, value in optimizer.state[parameter].items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Restore the state that `optimizer_tensors` returned."""
    by_name: dict[str, Tensors] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        by_name.setdefault(name, {})[kind] = tensor
    for name, parameter in _named_parameters(optimizer):
        optimizer.state[parameter] = {kind: t.to(parameter.device) for kind, t in by_name.get(name, {}).items()}


def _named_parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for group in optimizer.param_groups:
        yield from zip(group["param_names"], group["params"], strict=True)
