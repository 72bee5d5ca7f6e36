"""The model file in ONNX Runtime, on the requested provider and on no other."""

import ctypes
import os
import re
import threading
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from maekit.config.poolings import UNPOOLED
from maekit.encoder_file import EMBEDDINGS, INPUT, METADATA_KEY, EncoderDescription, check_digests, read_model
from maekit.images import Pixels
from maekit.providers import CUDA, Problem, check_device, first_line, open_cpu, open_cuda
from maekit.system.errors import InputError, MaekitError
from maekit.system.machine import cores
from maekit.system.model_file import ModelFile

# Messages of ONNX Runtime, CUDA, cuBLAS and the C++ library when memory runs out.
_OUT_OF_MEMORY = re.compile(
    r"Failed to allocate memory|out of memory|bad_alloc|ALLOC_FAILED|Available memory of", re.IGNORECASE
)

Embeddings = NDArray[np.float32]


class OutOfMemory(MaekitError):
    """A batch does not fit into the memory of the device."""


class EncoderSession:
    """An exported encoder, loaded and checked. May be called from several threads at once.

    Pickled, it is reopened by its path, and in a forked process it opens the file anew; in both cases it refuses a file
    with another digest.

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
        self._path, self._device_asked, self._threads = Path(os.path.abspath(path)), device, threads
        self._provider_options, self._opening = provider_options, threading.Lock()
        model = read_model(path)
        # Hundreds of megabytes: hash them while ONNX Runtime loads the model.
        with ThreadPoolExecutor(1) as hashing:
            digest = hashing.submit(lambda: (model.external_sha256, model.sha256)[1])
            self._load(model)
            try:
                metadata = self._session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
            except UnicodeDecodeError as error:
                raise InputError(f"{path}: its {METADATA_KEY} metadata is damaged: {error}") from error
            self.description = EncoderDescription.from_metadata(path, metadata, digest.result())
        check_digests(self.description, model)
        _sessions.add(self)
        if self.description.pool == UNPOOLED:
            raise InputError(
                f"{path} gives the tokens of each image, not one vector; export it with another `pool` to embed with it"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        options = dict(self._provider_options or {})
        return _again, (self._path, self._device_asked, self._threads, options, self.description.sha256)

    def _load(self, model: ModelFile) -> None:
        """Open the model on the device, or on the CPU if `auto` finds no working GPU."""
        path, device, provider_options = model.path, self._device_asked, self._provider_options
        threads = self._threads or cores()
        opened = None
        self.reason = "asked for"
        if device != "cpu":
            opened = open_cuda(model, "cuda" if device == "auto" else device, threads=threads, options=provider_options)
            if opened.problem and device != "auto":
                raise InputError(f"`device` {device}: {opened.problem.what}; {opened.problem.fix}")
            if device == "auto":
                self.reason = f"chosen by auto: {_said(opened.problem)}"
        if opened is None or opened.problem:
            if provider_options:
                raise InputError(f"`provider_options` is for the CUDA provider, and {path} runs on the CPU here")
            opened = open_cpu(model, threads=threads)
        self._session = opened.session
        self.provider, self.registered, self.nodes = opened.provider, opened.registered, opened.nodes
        self._device = ("cuda", int(device.partition(":")[2] or 0)) if self.provider == CUDA else ("cpu", 0)
        self._own = threading.local()
        self._is_forked = False

    def _reopen(self) -> None:
        """Open the model anew in a forked process, which has the parent's session without its threads.

        Raises:
            MaekitError: the file is another one now, or the parent's session is on a GPU.
        """
        with self._opening:
            if not self._is_forked:
                return
            path = self.description.path
            if self.provider == CUDA:
                raise MaekitError(
                    f"{path} runs on CUDA, which a forked process cannot use: start the processes by spawn "
                    "(`multiprocessing_context='spawn'` of a DataLoader)"
                )
            model = read_model(self._path)
            _refuse_other_digest(path, model.sha256, self.description.sha256)
            check_digests(self.description, model)
            self._load(model)

    def disown(self) -> None:
        """Give up the session in a forked child without destroying it, which would wait for threads that it lacks."""
        for inherited in (self._session, self._own, *self._own.__dict__.values()):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))
        self._opening, self._is_forked = threading.Lock(), True

    def __call__(self, images: Pixels) -> Embeddings:
        """Embed a batch: uint8 `[B, H, W, 3]`, C order -> float32 `[B, dim]`.

        Raises:
            OutOfMemory: the batch is too large for the device.
            MaekitError: ONNX Runtime failed.
        """
        if self._is_forked:
            self._reopen()
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


_sessions: "weakref.WeakSet[EncoderSession]" = weakref.WeakSet()


def _disown_all() -> None:
    for session in _sessions:
        session.disown()


os.register_at_fork(after_in_child=_disown_all)


def _again(
    path: Path, device: str, threads: int | None, provider_options: dict[str, str], sha256: str
) -> EncoderSession:
    """Open the model of a session that was pickled."""
    session = EncoderSession(path, device=device, threads=threads, provider_options=provider_options)
    _refuse_other_digest(path, session.description.sha256, sha256)
    return session


def _refuse_other_digest(path: Path, there: str, wanted: str) -> None:
    if there != wanted:
        raise InputError(
            f"{path} is another file now: its SHA-256 begins with {there[:12]}, that of the one opened first with "
            f"{wanted[:12]}"
        )


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
