"""The exported ONNX file as a contract: its names, its metadata, and the checks before it is loaded.

Needs no torch. onnx itself is imported only for the rare file with weights in a second file.
"""

import errno
import hashlib
import json
import mmap
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maekit.config import poolings
from maekit.images import Preprocess
from maekit.system import files
from maekit.system.errors import InputError
from maekit.system.model_file import ModelFile

METADATA_KEY = "maekit"
DIGEST = "metadata_sha256"  # within it; files of earlier versions have none
INPUT = "images"
EMBEDDINGS, TOKENS = "embeddings", "tokens"
# Every external tensor stores the name of its file under this key (onnx.proto, TensorProto.external_data). A protobuf
# stores the bytes of a string contiguously, so a file that does not contain them has no external tensor.
_LOCATION = b"location"
# Exceptions that malformed metadata can raise.
_MALFORMED = (ValueError, KeyError, TypeError, IndexError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class EncoderDescription:
    """What an exported file states about itself.

    Attributes:
        path: the file.
        sha256: its digest, hexadecimal; it identifies the model in every output.
        preprocess: turns a decoded image into the input.
        dim: length of an embedding.
        pool: how tokens become an embedding; `tokens` means no pooling.
        normalize: whether embeddings have unit length.
        external: SHA-256 of each external weight file, by name.
        whitened: whether the graph includes a whitening.
    """

    path: Path
    sha256: str
    preprocess: Preprocess
    dim: int
    pool: str
    normalize: bool
    external: dict[str, str]
    whitened: bool = False

    @property
    def output(self) -> str:
        """Name of the graph's output."""
        return TOKENS if self.pool == poolings.UNPOOLED else EMBEDDINGS

    @classmethod
    def from_metadata(cls, path: Path, metadata: str | None, sha256: str) -> "EncoderDescription":
        """Parse the metadata that `maekit export` wrote into a file.

        Raises:
            InputError: the file is not from maekit, or its metadata is damaged.
        """
        if metadata is None:
            raise InputError(f"{path}: not written by `maekit export` (no {METADATA_KEY} entry in its metadata)")
        try:
            spec = json.loads(metadata)
            poolings.check_pool("pool", str(spec["pool"]), also=(poolings.UNPOOLED,), layers=True)
            return cls(
                path,
                sha256,
                Preprocess.from_json(spec["preprocess"]),
                int(spec["dim"]),
                str(spec["pool"]),
                bool(spec["normalize"]),
                {str(name): str(digest) for name, digest in spec.get("external_data", {}).items()},
                spec.get("whitening") is not None,
            )
        except (*_MALFORMED, InputError) as error:
            raise InputError(f"{path}: its {METADATA_KEY} metadata is damaged: {error!r}") from error


def metadata_digest(spec: dict[str, Any]) -> str:
    """Return the SHA-256 over all fields of an exported file's metadata but the digest itself."""
    fields = {key: value for key, value in spec.items() if key != DIGEST}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def check_external_data(path: Path) -> list[Path]:
    """Return a model's external weight files, each a plain file beside it; usually none.

    ONNX Runtime itself rejects symbolic links and names that lead out of the folder, but follows hard links.

    Raises:
        InputError: the file cannot be read, is no ONNX file, or names anything but a plain file beside it.
    """
    try:
        with open(path, "rb") as file:
            if not file.seek(0, 2):
                raise InputError(f"{path} is no ONNX file: it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                if content.find(_LOCATION) < 0:
                    return []
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    names = list(dict.fromkeys(_locations(load_graph(path))))
    for name in names:
        os.close(_open_beside(path, name))
    return [path.parent / name for name in names]


def read_model(path: Path) -> ModelFile:
    """Read a model and its external weight files, once.

    Raises:
        InputError: as `check_external_data`.
    """
    with files.reading(path, InputError):
        content = path.read_bytes()
    if not content:
        raise InputError(f"{path} is no ONNX file: it is empty")
    external = {}
    if _LOCATION in content:
        for name in dict.fromkeys(_locations(load_graph(path, content))):
            with open(_open_beside(path, name), "rb") as file, files.reading(path.parent / name, InputError):
                external[name] = file.read()
    return ModelFile(path, content, external)


def _open_beside(path: Path, name: str) -> int:
    """Return a descriptor of an external weight file.

    Raises:
        InputError: it is anything but a plain file beside the model.
    """
    if not name or name != Path(name).name or name in (".", ".."):
        raise InputError(f"{path} keeps weights in {name!r}, which is no name of a file beside it")
    try:
        descriptor = os.open(path.parent / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            raise InputError(f"{path} keeps weights in {name!r}, which is a link or no plain file") from error
        raise InputError(f"{path} keeps weights in {name!r}, and there is no such file beside it") from error
    there = os.fstat(descriptor)
    if not stat.S_ISREG(there.st_mode) or there.st_nlink != 1:
        os.close(descriptor)
        raise InputError(f"{path} keeps weights in {name!r}, which is a link or no plain file")
    return descriptor


def check_digests(description: EncoderDescription, model: ModelFile) -> None:
    """Check that a model's external weight files are those it was exported with.

    Raises:
        InputError: one of them has a different digest.
    """
    for name, digest in model.external_sha256.items():
        if digest != description.external.get(name):
            beside = model.path.parent / name
            raise InputError(f"{beside} is not the file that {description.path} was exported with")


def load_graph(path: Path, content: bytes | None = None) -> Any:
    """Return the graph of an ONNX file as onnx's ModelProto, without loading tensors from other files.

    Args:
        path: the file.
        content: its bytes, if they have been read.

    Raises:
        InputError: the file cannot be read or is no ONNX file.
    """
    import onnx

    try:
        if content is not None:
            proto = onnx.load_model_from_string(content)
        else:
            proto = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # protobuf's decode error has no public name
        raise InputError(f"{path} is no ONNX file: {str(error).splitlines()[0]}") from error
    if not proto.graph.node:
        raise InputError(f"{path} is no ONNX file: it holds no graph")
    return proto


def _locations(message: Any) -> Iterator[str]:
    """Yield the file name of every external tensor in a protobuf message."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield from (entry.value for entry in message.external_data if entry.key == "location")
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "DESCRIPTOR") else value:
                yield from _locations(part)
