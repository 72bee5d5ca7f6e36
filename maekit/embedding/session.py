"""The model file in ONNX Runtime, on the requested provider and on no other."""

import re
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from maekit.config.poolings import UNPOOLED
from maekit.encoder_file import EMBEDDINGS, INPUT, METADATA_KEY, EncoderDescription, check_digests, check_external_data
from maekit.images import Pixels
from maekit.providers import CUDA, Problem, check_device, first_line, open_cpu, open_cuda
from maekit.system import files
from maekit.system.errors import InputError, MaekitError
from maekit.system.machine import cores

# Messages of ONNX Runtime, CUDA, cuBLAS and the C++ library when memory runs out.
_OUT_OF_MEMORY = re.compile(
    r"Failed to allocate memory|out of memory|bad_alloc|ALLOC_FAILED|Available memory of", re.IGNORECASE
)

Embeddings = NDArray[np.float32]


class OutOfMemory(MaekitError):
    """A batch does not fit into the memory of the device."""


class EncoderSession:
    """An exported encoder, loaded and checked. May be called from several threads at once.

    Args:
        path: the ONNX file that `maekit export` wrote.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        threads: CPU threads for the model; None means one per core.
        provider_options: options of the CUDA provider that override the defaults.

    Attributes:
        description: what the file states about itself.
        provider: the provider that really runs its nodes.
        reason: why this provider, in a few words.
        registered: all providers of the session, first choice first.
        nodes: number of the model's nodes on each provider.

    Raises:
        InputError: no such file, not from maekit, or the requested provider does not work; names the fix.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str = "auto",
        threads: int | None = None,
        provider_options: Mapping[str, str] | None = None,
    ) -> None:
        check_device(device)
        if path.is_dir():
            raise InputError(f"{path} is a directory; ENCODER.ONNX is the file that `maekit export` wrote")
        if not path.is_file():
            raise InputError(f"{path}: no such file; `maekit export` writes one")
        threads = threads or cores()
        external = check_external_data(path)
        # Hundreds of megabytes: hash them while ONNX Runtime loads the model.
        with ThreadPoolExecutor(1) as hashing:
            digest = hashing.submit(files.sha256_file, path)
            self._load(path, device, threads=threads, provider_options=provider_options)
            try:
                metadata = self._session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
            except UnicodeDecodeError as error:
                raise InputError(f"{path}: its {METADATA_KEY} metadata is damaged: {error}") from error
            self.description = EncoderDescription.from_metadata(path, metadata, digest.result())
        check_digests(self.description, external)
        if self.description.pool == UNPOOLED:
            raise InputError(
                f"{path} gives the tokens of each image, not one vector; export it with another `pool` to embed with it"
            )

    def _load(self, path: Path, device: str, *, threads: int, provider_options: Mapping[str, str] | None) -> None:
        """Open the model on the device, or on the CPU if `auto` finds no working GPU."""
        opened = None
        self.reason = "asked for"
        if device != "cpu":
            opened = open_cuda(path, "cuda" if device == "auto" else device, threads=threads, options=provider_options)
            if opened.problem and device != "auto":
                raise InputError(f"`device` {device}: {opened.problem.what}; {opened.problem.fix}")
            if device == "auto":
                self.reason = f"chosen by auto: {_said(opened.problem)}"
        if opened is None or opened.problem:
            if provider_options:
                raise InputError(f"`provider_options` is for the CUDA provider, and {path} runs on the CPU here")
            opened = open_cpu(path, threads=threads)
        self._session = opened.session
        self.provider, self.registered, self.nodes = opened.provider, opened.registered, opened.nodes
        self._device = ("cuda", int(device.partition(":")[2] or 0)) if self.provider == CUDA else ("cpu", 0)
        self._own = threading.local()

    def __call__(self, images: Pixels) -> Embeddings:
        """Embed a batch: uint8 `[B, H, W, 3]`, C order -> float32 `[B, dim]`.

        Raises:
            OutOfMemory: the batch is too large for the device.
            MaekitError: ONNX Runtime failed.
        """
        try:
            return self._run(images)
        except Exception as error:  # onnxruntime's own exception types have no common base
            message = f"{self.description.path} failed on {self.provider}: {first_line(error)}"
            if _OUT_OF_MEMORY.search(str(error)) or isinstance(error, MemoryError):
                raise OutOfMemory(message) from error
            raise MaekitError(message) from error

    def _run(self, images: Pixels) -> Embeddings:
        """Run on this thread's own buffers; they stay bound, one set per batch size."""
        sets: dict[int, _Buffers] = self._own.__dict__.setdefault("sets", {})
        if len(images) not in sets:
            sets[len(images)] = _Buffers(self._session, images.shape, self.description.dim, self._device)
        return sets[len(images)].run(images)


class _Buffers:
    """Input and output of one batch size in device memory, bound to the session once and reused."""

    def __init__(self, session: Any, shape: tuple[int, ...], dim: int, device: tuple[str, int]) -> None:
        self._session, self._binding, self._is_cpu = session, session.io_binding(), device[0] == "cpu"
        if not self._is_cpu:
            self._input = ort.OrtValue.ortvalue_from_shape_and_type(list(shape), np.uint8, *device)
            self._binding.bind_ortvalue_input(INPUT, self._input)
        self._output = ort.OrtValue.ortvalue_from_shape_and_type([shape[0], dim], np.float32, *device)
        self._binding.bind_ortvalue_output(EMBEDDINGS, self._output)

    def run(self, images: Pixels) -> Embeddings:
        if self._is_cpu:
            self._binding.bind_cpu_input(INPUT, images)  # read in place, without a copy
        else:
            self._input.update_inplace(images)
            self._binding.synchronize_inputs()
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()
        rows: Embeddings = self._output.numpy()
        return rows.copy() if self._is_cpu else rows  # on the CPU `rows` is a view of the buffer


def _said(problem: Problem | None) -> str:
    """Return why `auto` chose its provider, with the fix unless there simply is no GPU."""
    if problem is None:
        return "a CUDA device works here"
    return problem.what if problem.is_absent else f"{problem.what}; {problem.fix}"
