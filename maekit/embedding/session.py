"""The model file in ONNX Runtime, on the provider that was asked for and on no other."""

import contextlib
import ctypes
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from maekit import files
from maekit.errors import InputError, MaekitError
from maekit.images import Pixels, Preprocess
from maekit.machine import cores

METADATA_KEY = "maekit"
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_QUIET, _USUAL = 4, 2  # ONNX Runtime's log severities: fatal only; warnings

Embeddings = NDArray[np.float32]

# Nothing about other people's images or machines is sent anywhere.
ort.disable_telemetry_events()


@dataclass(frozen=True)
class ModelDescription:
    """What an exported file says of itself.

    Attributes:
        path: the file.
        sha256: its digest, hexadecimal: it names the model in every output.
        preprocess: from a decoded image to the input.
        dim: length of an embedding.
        pool: how tokens become an embedding.
        normalize: whether embeddings have unit length.
    """

    path: Path
    sha256: str
    preprocess: Preprocess
    dim: int
    pool: str
    normalize: bool


class EncoderSession:
    """An exported encoder, loaded and checked.

    Args:
        path: the ONNX file that `maekit export` wrote.
        device: `auto`, `cpu` or `cuda`.
        threads: CPU threads for the model; None is one per core.

    Attributes:
        description: what the file says of itself.
        provider: where its nodes really run.
        reason: why this provider, in a few words.

    Raises:
        InputError: no such file, not from maekit, or the provider asked for does not work; says how to mend it.
    """

    def __init__(self, path: Path, *, device: str = "auto", threads: int | None = None) -> None:
        if device not in ("auto", "cpu", "cuda"):
            raise InputError(f"--device {device}: must be auto, cpu or cuda")
        if path.is_dir():
            raise InputError(f"{path} is a directory; ENCODER.ONNX is the file that `maekit export` wrote")
        if not path.is_file():
            raise InputError(f"{path}: no such file; `maekit export RUN --out encoder.onnx` writes one")
        session = None
        problem = None
        if device != "cpu":
            problem = _cuda_problem()
            if problem is None:
                session, problem = _open_cuda(path, threads)
            if problem and device == "cuda":
                raise InputError(f"--device cuda: {problem.what}; {problem.fix}")
        if session is None or problem:
            self._session = _open(path, CPU, threads)
            self.reason = f"chosen by auto: {problem.what}" if problem else "asked for"
        else:
            self._session = session
            self.reason = "a CUDA device works here"
        self.provider: str = self._session.get_providers()[0]
        self.description = _describe(path, self._session)

    def __call__(self, images: Pixels) -> Embeddings:
        """Embed a batch: uint8 `[B, H, W, 3]` -> float32 `[B, dim]`.

        Raises:
            MaekitError: ONNX Runtime failed.
        """
        try:
            result: Embeddings = self._session.run(None, {"images": images})[0]
        except Exception as error:  # onnxruntime's own exception types have no common base
            raise MaekitError(f"{self.description.path} failed on {self.provider}: {_first_line(error)}") from error
        return result


class _Problem(NamedTuple):
    what: str
    fix: str


def _open(path: Path, provider: str, threads: int | None) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or cores()
    # Threads that spin while they wait would take the cores from decoding.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.log_severity_level = 3
    providers: list[Any] = [provider]
    if provider == CUDA:
        # Without the heuristic search the first batch of each size tries out every convolution algorithm.
        providers = [(CUDA, {"cudnn_conv_algo_search": "HEURISTIC"}), CPU]
    try:
        return ort.InferenceSession(path, options, providers=providers, enable_fallback=0)
    except Exception as error:
        raise InputError(f"{path}: ONNX Runtime cannot load this file: {_first_line(error)}") from error


def _open_cuda(path: Path, threads: int | None) -> tuple[Any, _Problem | None]:
    """Return a session, and why it does not run on CUDA; ONNX Runtime itself falls back to the CPU in silence."""
    ort.preload_dlls()
    with _quiet():
        session = _open(path, CUDA, threads)
    if session.get_providers()[0] != CUDA:
        return session, _Problem(
            f"the CUDA provider does not load ({_missing_library()})", "pip install 'maekit[cuda]'"
        )
    on_cuda = sum(
        len(part.get_nodes()) for part in session.get_provider_graph_assignment_info() if part.ep_name == CUDA
    )
    if not on_cuda:
        return session, _Problem("the CUDA provider loads but takes no node of this model", "use --device cpu")
    return session, None


def _cuda_problem() -> _Problem | None:
    """Return why CUDA cannot work here, as far as that shows without loading the provider; None if nothing shows."""
    if CUDA not in ort.get_available_providers():
        fix = "pip uninstall onnxruntime onnxruntime-gpu, then pip install 'maekit[cuda]'"
        return _Problem("this onnxruntime is a build without CUDA", fix)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return _Problem("no NVIDIA driver here (libcuda.so.1 is missing)", "install the driver, or use --device cpu")
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        fix = "check nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu"
        return _Problem("the NVIDIA driver sees no device", fix)
    return None


def _missing_library() -> str:
    provider = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    try:
        ctypes.CDLL(str(provider))
    except OSError as error:
        return str(error)
    return "no reason given"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    ort.set_default_logger_severity(_QUIET)
    try:
        yield
    finally:
        ort.set_default_logger_severity(_USUAL)


def _describe(path: Path, session: Any) -> ModelDescription:
    raw = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    if raw is None:
        raise InputError(f"{path}: not written by `maekit export` (no {METADATA_KEY} entry in its metadata)")
    try:
        spec = json.loads(raw)
        return ModelDescription(
            path,
            files.sha256_file(path),
            Preprocess.from_json(spec["preprocess"]),
            int(spec["dim"]),
            str(spec["pool"]),
            bool(spec["normalize"]),
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"{path}: its {METADATA_KEY} metadata is damaged: {error!r}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
