"""The model file in ONNX Runtime or OpenVINO, on the requested provider and on no other."""

import ctypes
import json
import os
import re
import threading
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from maekit import openvino_runtime
from maekit.config.poolings import UNPOOLED
from maekit.encoder_file import EMBEDDINGS, INPUT, METADATA_KEY, EncoderDescription, check_digests, read_model
from maekit.encoder_probe import probe_images, rows_from_json
from maekit.images import Pixels
from maekit.openvino_runtime import OpenVinoModel
from maekit.providers import CUDA, OPENVINO, Problem, check_device, first_line, open_cpu, open_cuda
from maekit.system.errors import InputError, MaekitError
from maekit.system.machine import cores
from maekit.system.model_file import ModelFile

# Messages of ONNX Runtime, CUDA, cuBLAS and the C++ library when memory runs out.
_OUT_OF_MEMORY = re.compile(
    r"Failed to allocate memory|out of memory|bad_alloc|ALLOC_FAILED|Available memory of", re.IGNORECASE
)

# What OpenVINO may give for the images recorded at export: as a share of the largest value in fp32, and least cosines.
# Measured on trained encoders with whitening, which magnifies rounding: 4e-6 in fp32; 0.9996 in bf16 (on photographs
# 0.998); 0.9999 for int8, which rounds in other places.
_FP32_TOLERANCE, _BF16_COSINE, _OTHER_COSINE = 1e-4, 0.998, 0.999
_COMPARED = 2  # of these images; all eight would take a large model many seconds on one core

Embeddings = NDArray[np.float32]
Runtime = Literal["auto", "onnxruntime", "openvino"]
Precision = Literal["fp32", "bf16"]


class OutOfMemory(MaekitError):
    """A batch does not fit into the memory of the device."""


class EncoderSession:
    """An exported encoder, loaded and checked. May be called from several threads at once.

    `auto` takes CUDA if it works; on a CPU, OpenVINO if that is installed and the processor is of a kind on which it is
    faster; else ONNX Runtime. Nothing is measured, so a machine always chooses alike. In OpenVINO the file must first
    give the embeddings that it recorded at export.

    Pickled, it is reopened by its path, and in a forked process it opens the file anew; in both cases it refuses a file
    with another digest.

    Args:
        path: the ONNX file that `maekit export` wrote.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        threads: CPU threads for the model; None means one per core.
        provider_options: options of the CUDA provider that override the defaults.
        runtime: `auto`, `onnxruntime` or `openvino`.
        precision: `fp32` computes as the file says; `bf16` everything up to the pooled vector in bf16, in OpenVINO.
        calls: calls that may run at a time.

    Attributes:
        description: what the file states about itself.
        provider: the provider that really runs its nodes, or `OpenVINO`.
        reason: why this provider, in a few words.
        version: name and version of the runtime.
        registered: all providers of the session, first choice first.
        nodes: number of the model's nodes on each provider.

    Raises:
        InputError: no such file, not from maekit, the requested provider does not work, or OpenVINO gives other
            embeddings; names the fix.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str = "auto",
        threads: int | None = None,
        provider_options: Mapping[str, str] | None = None,
        runtime: Runtime = "auto",
        precision: Precision = "fp32",
        calls: int = 1,
    ) -> None:
        check_device(device)
        check_runtime(runtime, precision, device)
        if path.is_dir():
            raise InputError(f"{path} is a directory; ENCODER.ONNX is the file that `maekit export` wrote")
        if not path.is_file():
            raise InputError(f"{path}: no such file; `maekit export` writes one")
        self._path, self._device_asked, self._threads = Path(os.path.abspath(path)), device, threads
        self._provider_options, self._opening = provider_options, threading.Lock()
        self._runtime_asked, self._precision, self._calls = runtime, precision, calls
        model = read_model(path)
        # Hundreds of megabytes: hash them while ONNX Runtime loads the model.
        with ThreadPoolExecutor(1) as hashing:
            digest = hashing.submit(lambda: (model.external_sha256, model.sha256)[1])
            self._load(model)
            try:
                metadata = self._metadata()
            except UnicodeDecodeError as error:
                raise InputError(f"{path}: its {METADATA_KEY} metadata is damaged: {error}") from error
            self.description = EncoderDescription.from_metadata(path, metadata, digest.result())
        check_digests(self.description, model)
        _sessions.add(self)
        if self.description.pool == UNPOOLED:
            raise InputError(
                f"{path} gives the tokens of each image, not one vector; export it with another `pool` to embed with it"
            )
        if self.provider == OPENVINO:
            self._hold_against_record(model, json.loads(str(metadata)))

    def __reduce__(self) -> tuple[Any, ...]:
        options = {
            "device": self._device_asked,
            "threads": self._threads,
            "provider_options": dict(self._provider_options or {}),
            "runtime": self._runtime_asked,
            "precision": self._precision,
            "calls": self._calls,
        }
        return _again, (self._path, options, self.description.sha256)

    def _metadata(self) -> str | None:
        """Return what maekit wrote into the file.

        Raises:
            UnicodeDecodeError: it is no text.
        """
        if isinstance(self._session, OpenVinoModel):
            return self._session.metadata.get(METADATA_KEY)
        found: str | None = self._session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
        return found

    def _load(self, model: ModelFile) -> None:
        """Open the model on the device, or on the CPU if `auto` finds no working GPU."""
        path, device, provider_options = model.path, self._device_asked, self._provider_options
        threads = self._threads or cores()
        opened = None
        self.reason = "asked for"
        wants_openvino = self._runtime_asked == "openvino" or self._precision == "bf16"
        if device != "cpu" and not wants_openvino:
            opened = open_cuda(model, "cuda" if device == "auto" else device, threads=threads, options=provider_options)
            if opened.problem and device != "auto":
                raise InputError(f"`device` {device}: {opened.problem.what}; {opened.problem.fix}")
            if device == "auto":
                self.reason = f"chosen by auto: {_said(opened.problem)}"
        if (opened is None or opened.problem) and provider_options:
            raise InputError(f"`provider_options` is for the CUDA provider, and {path} runs on the CPU here")
        self._own, self._is_forked = threading.local(), False
        is_preferred = (opened is None or bool(opened.problem)) and self._prefers_openvino(model)
        if is_preferred:
            self.reason = "chosen by auto: faster here than ONNX Runtime"
        if is_preferred or wants_openvino:
            self._open_openvino(model, threads)
            return
        if opened is None or opened.problem:
            opened = open_cpu(model, threads=threads)
        self._session = opened.session
        self.provider, self.registered, self.nodes = opened.provider, opened.registered, opened.nodes
        self.version = f"onnxruntime {ort.__version__}"
        self._device = ("cuda", int(device.partition(":")[2] or 0)) if self.provider == CUDA else ("cpu", 0)

    def _prefers_openvino(self, model: ModelFile) -> bool:
        """Whether `auto` takes OpenVINO on this CPU."""
        return (
            self._runtime_asked == "auto"
            and openvino_runtime.is_faster()
            and not model.external
            and openvino_runtime.problem() is None
        )

    def _open_openvino(self, model: ModelFile, threads: int) -> None:
        is_bf16 = self._precision == "bf16"
        if problem := openvino_runtime.problem(bf16=is_bf16):
            asked = "`precision` bf16" if is_bf16 else "`runtime` openvino"
            raise InputError(f"{asked}: {problem.what}; {problem.fix}")
        self._session = OpenVinoModel(model, precision="bf16" if is_bf16 else "f32", threads=threads, calls=self._calls)
        self.provider, self.registered = OPENVINO, (OPENVINO,)
        self.nodes = {OPENVINO: self._session.nodes}
        self.version, self._device = openvino_runtime.version(), ("cpu", 0)

    def _hold_against_record(self, model: ModelFile, spec: dict[str, Any]) -> None:
        """Compare with the embeddings that the file recorded at export; those of ONNX Runtime, if it has none.

        Raises:
            InputError: they differ by more than rounding.
        """
        path, images = self.description.path, probe_images(self.description.preprocess.size)[:_COMPARED]
        try:
            expected = rows_from_json(spec["probe"])[:_COMPARED]
        except (KeyError, ValueError, TypeError):
            expected = open_cpu(model, threads=cores()).session.run([EMBEDDINGS], {INPUT: images})[0]
        found = self(images)
        if found.shape != expected.shape:
            raise InputError(f"{path}: its {METADATA_KEY} metadata is damaged: embeddings of shape {expected.shape}")
        difference = float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-12))
        norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
        cosine = float(((found * expected).sum(axis=1) / np.maximum(norms, 1e-12)).min())
        is_exact = self._precision == "fp32" and spec.get("precision", "fp32") == "fp32"
        least = _BF16_COSINE if self._precision == "bf16" else _OTHER_COSINE
        # Written so that NaN fails.
        if not (difference <= _FP32_TOLERANCE if is_exact else cosine >= least):
            fix = "`precision=fp32`" if self._precision == "bf16" else "`runtime=onnxruntime`"
            raise InputError(
                f"{path} gives other embeddings in OpenVINO than it recorded at export: up to {difference:.1e} of the "
                f"largest value, cosine at least {cosine:.4f}; use {fix}"
            )

    def _reopen(self) -> None:
        """Open the model anew in a forked process, which has the parent's session without its threads.

        Where `auto` chose OpenVINO, which cannot be started there, it opens in ONNX Runtime.

        Raises:
            MaekitError: the file is another one now, or the parent's session is on a GPU, or was asked for in OpenVINO.
        """
        with self._opening:
            if not self._is_forked:
                return
            path = self.description.path
            is_bound = self.provider == OPENVINO and (self._runtime_asked, self._precision) != ("auto", "fp32")
            if self.provider == CUDA or is_bound:
                runtime = "CUDA" if self.provider == CUDA else OPENVINO
                raise MaekitError(
                    f"{path} runs on {runtime}, which a forked process cannot use: start the processes by spawn "
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
            MaekitError: the runtime failed.
        """
        if self._is_forked:
            self._reopen()
        try:
            return self._run(images)
        except Exception as error:  # onnxruntime's own exception types have no common base
            message = f"{self._path} failed on {self.provider}: {first_line(error)}"
            if _OUT_OF_MEMORY.search(str(error)) or isinstance(error, MemoryError):
                raise OutOfMemory(message) from error
            raise MaekitError(message) from error

    def _run(self, images: Pixels) -> Embeddings:
        """Run on this thread's own buffers; in ONNX Runtime they stay bound, one set per batch size."""
        if isinstance(self._session, OpenVinoModel):
            return self._session(images)
        sets: dict[int, _Buffers] = self._own.__dict__.setdefault("sets", {})
        if len(images) not in sets:
            sets[len(images)] = _Buffers(self._session, images.shape, self.description.dim, self._device)
        return sets[len(images)].run(images)


_sessions: "weakref.WeakSet[EncoderSession]" = weakref.WeakSet()


def _disown_all() -> None:
    for session in _sessions:
        session.disown()


os.register_at_fork(after_in_child=_disown_all)


def _again(path: Path, options: dict[str, Any], sha256: str) -> EncoderSession:
    """Open the model of a session that was pickled."""
    session = EncoderSession(path, **options)
    _refuse_other_digest(path, session.description.sha256, sha256)
    return session


def check_runtime(runtime: str, precision: str, device: str) -> None:
    """Check that runtime, precision and device go together.

    Raises:
        InputError: they do not, or one of them is unknown.
    """
    if runtime not in ("auto", "onnxruntime", "openvino"):
        raise InputError(f"`runtime` {runtime}: must be auto, onnxruntime or openvino")
    if precision not in ("fp32", "bf16"):
        raise InputError(f"`precision` {precision}: must be fp32 or bf16")
    if precision == "bf16" and runtime == "onnxruntime":
        raise InputError("`precision` bf16 is computed by OpenVINO; leave out `runtime=onnxruntime`")
    if device.startswith("cuda") and (runtime == "openvino" or precision == "bf16"):
        asked = "`precision` bf16" if precision == "bf16" else "`runtime` openvino"
        raise InputError(f"{asked} is for the CPU, and `device` is {device}; on a GPU export with `precision=fp16`")


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
