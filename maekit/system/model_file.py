"""An ONNX file read once, so that the bytes that are hashed are the bytes that run, whatever replaces the file."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True)
class ModelFile:
    """The bytes of a model.

    Attributes:
        path: where they were read; for messages.
        content: the ONNX file.
        external: each external weight file, by name; usually none.
    """

    path: Path
    content: bytes
    external: dict[str, bytes] = field(default_factory=dict)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the ONNX file, hexadecimal."""
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def external_sha256(self) -> dict[str, str]:
        """SHA-256 of each external weight file, by name."""
        return {name: hashlib.sha256(content).hexdigest() for name, content in self.external.items()}

    @property
    def digest(self) -> str:
        """SHA-256 of the ONNX file; of all digests, if it has external weight files."""
        if not self.external:
            return self.sha256
        return hashlib.sha256(" ".join([self.sha256, *self.external_sha256.values()]).encode()).hexdigest()
