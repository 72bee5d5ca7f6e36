"""Runs an exported file with ONNX Runtime on a chosen execution provider. Needs no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from maekit.encoder_file import INPUT
from maekit.exporters.parity import Embeddings
from maekit.images import Pixels
from maekit.providers import Opened, check_device, first_line, open_cpu, open_cuda
from maekit.system.errors import InputError, MaekitError
from maekit.system.machine import cores


@dataclass(frozen=True)
class OpenedEncoder:
    """A loaded model file.

    Attributes:
        encode: images, uint8 `[B, H, W, 3]` -> float32 `[B, D]`, or `[B, N, D]` for tokens.
        provider: execution provider of its nodes.
    """

    encode: Callable[[Pixels], Embeddings]
    provider: str


def open_encoder(path: Path, output: str, *, device: str) -> OpenedEncoder:
    """Load a model for a device.

    Args:
        path: the ONNX file.
        output: name of its output.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        InputError: ONNX Runtime cannot load the file, or the device does not work.
    """
    check_device(device)
    opened = _open(path, device)

    def encode(images: Pixels) -> Embeddings:
        try:
            rows: Embeddings = opened.session.run([output], {INPUT: images})[0]
        except Exception as error:  # onnxruntime's own exception types have no common base
            raise MaekitError(f"{path} failed on {opened.provider}: {first_line(error)}") from error
        return rows

    return OpenedEncoder(encode, opened.provider)


def _open(path: Path, device: str) -> Opened:
    if device != "cpu":
        opened = open_cuda(path, "cuda" if device == "auto" else device, threads=cores())
        if opened.problem is None:
            return opened
        if device != "auto":
            raise InputError(f"`device` {device}: {opened.problem.what}; {opened.problem.fix}")
    return open_cpu(path, threads=cores())
