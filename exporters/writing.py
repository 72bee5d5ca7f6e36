"""Writes the ONNX file atomically, with a second file for weights that do not fit into one.

A protobuf holds at most 2 GiB. Larger models keep their weights in a file beside it, named after their digest. So a
model never refers to weights other than its own, even if an export is killed at any point.
"""

import contextlib
import glob
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from onnx.external_data_helper import set_external_data

from maekit.encoder_file import check_external_data
from maekit.system import files
from maekit.system.errors import InputError

MAX_BYTES = 2_000_000_000  # with graph and metadata; protobuf's limit is 2 GiB
_SMALL = 1024  # bytes; smaller tensors stay in the graph
_ALIGNMENT = 4096  # bytes; lets ONNX Runtime map the file
_SUFFIX = ".onnx.data"
_LEFT_SECONDS = 3600.0  # a file not modified for this long belongs to no running export


class ModelFile:
    """A model being written: loadable from a temporary path, and renamed when the block of `new_model` succeeds.

    Attributes:
        path: the temporary path.
        external: digest of each external weights file, by name; usually empty.
    """

    def __init__(self, path: Path, file: Any, external: dict[str, str]) -> None:
        self.path, self.external, self._file = path, external, file

    def write(self, proto: onnx.ModelProto) -> None:
        """Write the model, overwriting an earlier write."""
        self._file.seek(0)
        self._file.truncate()
        self._file.write(proto.SerializeToString(deterministic=True))
        self._file.flush()


@contextlib.contextmanager
def new_model(path: Path, proto: onnx.ModelProto) -> Iterator[ModelFile]:
    """Write a model that gets its final name if the block succeeds; if it raises, nothing is left behind.

    Args:
        path: the final name.
        proto: changed in place: large weights are moved out if the model does not fit into one file.

    Raises:
        MaekitError: the disk is full or the path is not writable; names the path.
    """
    _remove_leftovers(path)
    replaced = _weights_named_by(path)
    external = _write_weights(path, proto) if _size(proto) > MAX_BYTES else {}
    try:
        with files.atomic_file(path) as file:
            model = ModelFile(Path(file.name), file, external)
            model.write(proto)
            yield model
    finally:
        # On success, removes the old model's weights; on failure, the new one's.
        _remove_unused(path, {*replaced, *external})


def _weights_named_by(path: Path) -> set[str]:
    """Return the names of a model's external weights files; an empty set if it is no model."""
    try:
        return {file.name for file in check_external_data(path)}
    except InputError:
        return set()


def _remove_leftovers(path: Path) -> None:
    """Remove leftovers of killed exports to this name: temporary files, and weights that no model refers to."""
    old = time.time() - _LEFT_SECONDS
    for file in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if file.stat().st_mtime < old:
                file.unlink()
    with contextlib.suppress(OSError):
        _remove_unused(path, {f.name for f in _own_weights(path) if f.stat().st_mtime < old})


def _own_weights(path: Path) -> list[Path]:
    """Return the external weights files written by exports to this name."""
    return sorted(path.parent.glob(f"{glob.escape(path.stem)}-{'[0-9a-f]' * 16}{_SUFFIX}"))


def _remove_unused(path: Path, names: set[str]) -> None:
    """Remove external weights files of this export name, except those that a model in the folder refers to."""
    if not (unused := [file for file in _own_weights(path) if file.name in names]):
        return
    models = [*path.parent.glob("*.onnx"), *path.parent.glob(".*.onnx.*.tmp")]  # including copies and running exports
    needed = set().union(*(_weights_named_by(model) for model in models))
    for file in unused:
        if file.name not in needed:
            with contextlib.suppress(OSError):
                file.unlink()


def _write_weights(path: Path, proto: onnx.ModelProto) -> dict[str, str]:
    """Move the large weights from the model to an external file; return the file's digest by its name."""
    large = [tensor for tensor in proto.graph.initializer if len(tensor.raw_data) >= _SMALL]
    digest, end, offsets = hashlib.sha256(), 0, []
    for tensor in large:
        padding = bytes(-end % _ALIGNMENT)
        digest.update(padding)
        digest.update(tensor.raw_data)
        offsets.append(end + len(padding))
        end = offsets[-1] + len(tensor.raw_data)
    name = f"{path.stem}-{digest.hexdigest()[:16]}{_SUFFIX}"
    with files.atomic_file(path.with_name(name)) as file:
        for tensor, offset in zip(large, offsets, strict=True):
            file.seek(offset)  # what is skipped reads as zeros: the padding
            file.write(tensor.raw_data)
            set_external_data(tensor, name, offset, len(tensor.raw_data))
            tensor.ClearField("raw_data")
    return {name: digest.hexdigest()}


def _size(proto: onnx.ModelProto) -> int:
    """Estimate a model's size in bytes; protobuf itself cannot compute it above its limit."""
    return sum(len(tensor.raw_data) + 256 for tensor in proto.graph.initializer) + (1 << 20)
