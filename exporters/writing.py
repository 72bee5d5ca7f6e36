"""The ONNX file on disk: whole or absent, with a second file for weights that do not fit into one.

A protobuf holds at most 2 GiB. Beyond, weights go into a file beside it, named after their digest: whatever is killed
when, a name never leads to other weights than it was written with.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx

from maekit import files
from maekit.encoder_file import check_external_data
from maekit.errors import InputError

MAX_BYTES = 2_000_000_000  # graph and metadata included, of 2 GiB
_SMALL = 1024  # bytes; smaller tensors stay in the graph
_ALIGNMENT = 4096  # bytes; lets ONNX Runtime map the file
_SUFFIX = ".onnx.data"


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
    before = _weights_of(path)
    weights = _Weights(path, proto) if _size(proto) > MAX_BYTES else None
    external = {}
    if weights is not None:
        external = weights.write()
    try:
        with files.atomic_file(path) as file:
            model = ModelFile(Path(file.name), file, external)
            model.write(proto)
            yield model
    except BaseException:
        if weights is not None:
            weights.remove()
        raise
    for stale in before:
        if stale.name not in external:
            with contextlib.suppress(OSError):
                stale.unlink()


def _weights_of(path: Path) -> list[Path]:
    """Return the files of weights that the model under this name has now, as far as they are maekit's."""
    if not path.is_file():
        return []
    try:
        return [file for file in check_external_data(path) if file.name.endswith(_SUFFIX)]
    except InputError:
        return []  # no model, or none of ours: it is replaced, and what lies beside it stays


def _size(proto: onnx.ModelProto) -> int:
    """Return about how many bytes a model has; protobuf itself cannot say it of one that is too large."""
    return sum(len(tensor.raw_data) + 256 for tensor in proto.graph.initializer) + (1 << 20)


class _Weights:
    """The large weights of a model, in a file of their own."""

    def __init__(self, path: Path, proto: onnx.ModelProto) -> None:
        self._path, self._proto = path, proto
        self._written: Path | None = None

    def write(self) -> dict[str, str]:
        """Write the file, take the weights out of the model, and return the file's digest by its name."""
        large = [tensor for tensor in self._proto.graph.initializer if len(tensor.raw_data) >= _SMALL]
        pieces: list[bytes] = []
        places, offset = [], 0
        for tensor in large:
            padding = bytes(-offset % _ALIGNMENT)
            places.append((offset + len(padding), len(tensor.raw_data)))
            pieces += [padding, tensor.raw_data]
            offset = sum(places[-1])
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
        name = f"{self._path.stem}-{digest.hexdigest()[:16]}{_SUFFIX}"
        final = self._path.with_name(name)
        is_new = not final.exists()
        with files.atomic_file(final) as file:
            file.writelines(pieces)
        self._written = final if is_new else None
        for tensor, (start, length) in zip(large, places, strict=True):
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", name), ("offset", str(start)), ("length", str(length))):
                entry = tensor.external_data.add()
                entry.key, entry.value = key, value
        return {name: digest.hexdigest()}

    def remove(self) -> None:
        """Remove what was written, unless it was there before."""
        if self._written is not None:
            with contextlib.suppress(OSError):
                self._written.unlink()
