"""Runs an exported file with ONNX Runtime on a chosen execution provider. Needs no torch."""

from pathlib import Path

from maekit.encoder_file import INPUT
from maekit.exporters.parity import Embeddings
from maekit.images import Pixels
from maekit.providers import check_device, first_line, open_cpu, open_cuda
from maekit.system.errors import InputError, MaekitError
from maekit.system.machine import cores
from maekit.system.model_file import ModelFile


class ExportedEncoder:
    """A model file, loaded for a device.

    Args:
        model: the ONNX file, or its bytes as they were read.
        output: name of its output.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Attributes:
        provider: execution provider of its nodes.

    Raises:
        InputError: ONNX Runtime cannot load the file, or the device does not work.
    """

    def __init__(self, model: Path | ModelFile, output: str, *, device: str) -> None:
        check_device(device)
        opened = None
        if device != "cpu":
            opened = open_cuda(model, "cuda" if device == "auto" else device, threads=cores())
            if opened.problem and device != "auto":
                raise InputError(f"`device` {device}: {opened.problem.what}; {opened.problem.fix}")
        if opened is None or opened.problem:
            opened = open_cpu(model, threads=cores())
        self._path = model.path if isinstance(model, ModelFile) else model
        self._output, self._session = output, opened.session
        self.provider = opened.provider

    def encode(self, images: Pixels) -> Embeddings:
        """Embed a batch: uint8 `[B, H, W, 3]` -> float32 `[B, D]`, or `[B, N, D]` for tokens.

        Raises:
            MaekitError: ONNX Runtime failed.
        """
        try:
            rows: Embeddings = self._session.run([self._output], {INPUT: images})[0]
        except Exception as error:  # onnxruntime's own exception types have no common base
            raise MaekitError(f"{self._path} failed on {self.provider}: {first_line(error)}") from error
        return rows
