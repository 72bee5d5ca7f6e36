"""The ONNX file on disk: whole or absent, with a second file for weights that do not fit into one.

A protobuf holds at most 2 GiB. Beyond, weights go into a file beside it, named after their digest: whatever is killed
when, a name never leads to other weights than it was written with.
"""

import contextlib
import glob
import hashlib
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx

from maekit.encoder_file import check_external_data
from maekit.system import files
from maekit.system.errors import InputError

MAX_BYTES = 2_000_000_000  # graph and metadata included, of 2 GiB
_SMALL = 1024  # bytes; smaller tensors stay in the graph
_ALIGNMENT = 4096  # bytes; lets ONNX Runtime map the file
_SUFFIX = ".onnx.data"
_LEFT_SECONDS = 3600.0  # what was not touched for so long belongs to no export that is under way


class ModelFile:
    """A model that is being written: can be loaded by its path, and gets its name when all is well.

    Attributes:
        path: where it can be loaded from, for now.
        external: digest of the file of weights beside it, by name; usually empty.
    """

    def __init__(self, path: Path, file: Any, external: dict[str, str]) -> None:
        self.path, self.external, self._file = path, external, file

    def write(self, proto: onnx.ModelProto) -> None:
        """Write the model, in place of what was written before."""
        self._file.seek(0)
        self._file.truncate()
        self._file.write(proto.SerializeToString(deterministic=True))
        self._file.flush()


@contextlib.contextmanager
def new_model(path: Path, proto: onnx.ModelProto) -> Iterator[ModelFile]:
    """Write a model that appears under its name when the block ends well, and leaves nothing behind when it does not.

    Args:
        path: the final name.
        proto: changed in place: large weights are taken out where all of it would not fit into one file.

    Raises:
        MaekitError: the disk is full or the place is not writable; names the path.
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
        # Of the old model where the new one has its name, of the new one where it has not.
        _remove_unused(path, {*replaced, *external})


def _weights_named_by(path: Path) -> set[str]:
    """Return the names of the files that a model keeps weights in; of anything else, none."""
    try:
        return {file.name for file in check_external_data(path)}
    except InputError:
        return set()


def _remove_leftovers(path: Path) -> None:
    """Remove what killed exports to this name left: unfinished files, and weights that no model ever named."""
    if not path.parent.is_dir():
        return
    old = time.time() - _LEFT_SECONDS
    for file in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if file.stat().st_mtime < old:
                file.unlink()
    with contextlib.suppress(OSError):
        _remove_unused(path, {f.name for f in _own_weights(path) if f.stat().st_mtime < old})


def _own_weights(path: Path) -> list[Path]:
    """Return the files of weights that exports to this name have written."""
    pattern = re.compile(re.escape(path.stem) + r"-[0-9a-f]{16}" + re.escape(_SUFFIX))
    return [file for file in path.parent.iterdir() if pattern.fullmatch(file.name)]


def _remove_unused(path: Path, names: set[str]) -> None:
    """Remove files of weights that exports to this name have written, unless some model in the folder needs them."""
    unused = [file for file in _own_weights(path) if file.name in names] if path.parent.is_dir() else []
    if not unused:
        return
    models = [*path.parent.glob("*.onnx"), *path.parent.glob(".*.onnx.*.tmp")]  # copies, and exports under way
    needed = set().union(*(_weights_named_by(model) for model in models))
    for file in unused:
        if file.name not in needed:
            with contextlib.suppress(OSError):
                file.unlink()


def _write_weights(path: Path, proto: onnx.ModelProto) -> dict[str, str]:
    """Take the large weights out of the model, into a file of their own; return its digest by its name."""
    large = [tensor for tensor in proto.graph.initializer if len(tensor.raw_data) >= _SMALL]
    digest, offset, places = hashlib.sha256(), 0, []
    for padding, tensor in _padded(large):
        digest.update(padding)
        digest.update(tensor.raw_data)
        places.append((offset + len(padding), len(tensor.raw_data)))
        offset = sum(places[-1])
    name = f"{path.stem}-{digest.hexdigest()[:16]}{_SUFFIX}"
    with files.atomic_file(path.with_name(name)) as file:
        for padding, tensor in _padded(large):
            file.write(padding)
            file.write(tensor.raw_data)
    for tensor, (start, length) in zip(large, places, strict=True):
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", name), ("offset", str(start)), ("length", str(length))):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
    return {name: digest.hexdigest()}


def _padded(tensors: Sequence[onnx.TensorProto]) -> Iterator[tuple[bytes, onnx.TensorProto]]:
    """Yield each tensor with the zeros that stand before it, so that it begins at a page."""
    offset = 0
    for tensor in tensors:
        padding = bytes(-offset % _ALIGNMENT)
        yield padding, tensor
        offset += len(padding) + len(tensor.raw_data)


def _size(proto: onnx.ModelProto) -> int:
    """Return about how many bytes a model has; protobuf itself cannot say it of one that is too large."""
    return sum(len(tensor.raw_data) + 256 for tensor in proto.graph.initializer) + (1 << 20)
