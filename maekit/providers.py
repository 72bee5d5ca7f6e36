"""Execution providers of ONNX Runtime: which of them really work here, and the fix for one that does not.

ONNX Runtime lists providers that cannot load, and a session that requests one silently runs on the CPU. Here a session
runs on the requested provider, or the result says why not.
"""

import contextlib
import ctypes
import importlib.metadata
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort

from maekit.system.errors import InputError
from maekit.system.model_file import ModelFile

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
OPENVINO = "OpenVINO"  # no provider of ONNX Runtime but a runtime of its own; it runs on the CPU
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_NO_KERNEL = "no kernel image"  # CUDA error 209, in words
_TYPES = {"tensor(uint8)": "uint8", "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}
_QUIET, _USUAL = 4, 2  # ONNX Runtime's log severities: fatal only; warnings
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_RUNTIME = re.compile(r"onnxruntime|ort[-_]nightly", re.IGNORECASE)
# Without the heuristic search, the first batch of each size tries every convolution algorithm.
_CUDA_OPTIONS = {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "1"}

# Send nothing about the user's images or machine anywhere.
ort.disable_telemetry_events()

Model = Path | bytes | ModelFile


class Problem(NamedTuple):
    """Why a provider does not work here, and how to fix it.

    Attributes:
        what: the problem, in words.
        fix: the fix, in words or as a command.
        is_absent: whether this machine simply seems to have no such hardware.
    """

    what: str
    fix: str
    is_absent: bool = False


@dataclass(frozen=True)
class Opened:
    """A session and the providers it runs on.

    Attributes:
        session: session of ONNX Runtime; None if the model was not opened.
        provider: the requested provider if it works, else the CPU's.
        registered: the session's providers, first choice first.
        nodes: number of the model's nodes on each provider.
        problem: why the session is not on the requested provider; None if it is.
    """

    session: Any = None
    provider: str = CPU
    registered: tuple[str, ...] = ()
    nodes: dict[str, int] = field(default_factory=dict)
    problem: Problem | None = None


def runs_on_cpu(provider: str) -> bool:
    """Whether what runs the model shares the cores with decoding."""
    return provider in (CPU, OPENVINO)


def check_device(device: str) -> None:
    """Check that a device name is valid.

    Raises:
        InputError: it is not valid.
    """
    if not _DEVICE.fullmatch(device):
        raise InputError(f"`device` {device}: must be auto, cpu, cuda, or cuda:N for the N-th GPU")


def open_cpu(model: Model, *, threads: int) -> Opened:
    """Load a model for the CPU.

    Raises:
        InputError: ONNX Runtime cannot load the model.
    """
    return _opened(_load(model, [CPU], threads))


def open_cuda(model: Model, device: str, *, threads: int, options: Mapping[str, str] | None = None) -> Opened:
    """Load a model for a CUDA device; if that fails, the result has no session and says why.

    Args:
        model: an ONNX file, its bytes, or both as they were read.
        device: `cuda` or `cuda:N`.
        threads: CPU threads for the nodes that stay on the CPU.
        options: options of the CUDA provider that override the defaults.

    Raises:
        InputError: ONNX Runtime cannot load the model, or the provider rejects one of the options.
    """
    number = int(device.partition(":")[2] or 0)
    if problem := cuda_problem(number):
        return Opened(problem=problem)
    chosen = {"device_id": str(number), **_CUDA_OPTIONS, **(options or {})}
    try:
        with _quiet():
            ort.preload_dlls()
            opened = _opened(_load(model, [(CUDA, chosen), CPU], threads))
    except InputError as error:
        open_cpu(model, threads=threads)  # raises if the model itself is the problem
        if options and any(key in str(error) for key in options):
            raise
        said = str(error).rpartition("load this file: ")[2]
        if _NO_KERNEL in said:
            return Opened(problem=_without_kernels(number))
        return Opened(problem=Problem(f"the CUDA provider fails: {said}", "update the NVIDIA driver"))
    if opened.provider != CUDA:
        library = _missing_library()
        is_driver = "libcuda.so" in library or "undefined symbol: cu" in library
        fix = "update the NVIDIA driver" if is_driver else "pip install 'maekit[cuda]' brings the CUDA libraries"
        return Opened(problem=Problem(f"the CUDA provider does not load ({library})", fix))
    if not opened.nodes.get(CUDA):
        return Opened(problem=Problem("the CUDA provider loads but takes no node of this model", "use `device=cpu`"))
    if _NO_KERNEL in _failure(opened.session):
        return Opened(problem=_without_kernels(number))
    return opened


def cuda_problem(number: int = 0) -> Problem | None:
    """Return why CUDA cannot work here; None if checks without loading the provider find no problem."""
    if CUDA not in ort.get_available_providers():
        installed = installed_runtimes()
        if len(installed) > 1:
            return Problem(f"{' and '.join(installed)} overwrite each other's files", reinstall_command(installed))
        return Problem("this onnxruntime is a build without CUDA", reinstall_command(installed))
    try:
        count = gpu_count()
    except OSError:
        fix = "install the driver, or use `device=cpu`"
        return Problem("no NVIDIA driver here (libcuda.so.1 is missing)", fix, is_absent=True)
    if count is None:
        return Problem("the NVIDIA driver does not start", "nvidia-smi says why; update or restart the driver")
    if not count:
        return Problem(
            "the NVIDIA driver sees no device", "check nvidia-smi and CUDA_VISIBLE_DEVICES, or use `device=cpu`"
        )
    if number >= count:
        return Problem(f"there is no GPU number {number}", f"this machine has {count}, numbered from 0")
    return None


def _failure(session: Any) -> str:
    """Run a model on zeros, one where a size is open, and return what failed; most GPUs' faults show there first."""
    inputs = {
        value.name: np.zeros([size if isinstance(size, int) else 1 for size in value.shape], _TYPES[value.type])
        for value in session.get_inputs()
        if value.type in _TYPES
    }
    try:
        session.run(None, inputs)
    except Exception as error:  # onnxruntime's own exception types have no common base
        return str(error)
    return ""


def _without_kernels(number: int) -> Problem:
    """Return the problem of a GPU that this ONNX Runtime was not built for."""
    driver, device, parts, name = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0), [], ctypes.create_string_buffer(256)
    driver.cuDeviceGet(ctypes.byref(device), number)
    driver.cuDeviceGetName(name, len(name), device)
    for attribute in _CAPABILITY:
        part = ctypes.c_int(0)
        driver.cuDeviceGetAttribute(ctypes.byref(part), attribute, device)
        parts.append(part.value)
    gpu = f"{name.value.decode(errors='replace')} (compute capability {parts[0]}.{parts[1]})"
    fix = f"install {'a newer' if parts[0] >= 10 else 'an older'} release of onnxruntime-gpu, or use `device=cpu`"
    return Problem(f"onnxruntime {ort.__version__} has no kernels for {gpu}", fix)


def gpu_count() -> int | None:
    """Return how many GPUs the NVIDIA driver shows this process; None if the driver does not start.

    Raises:
        OSError: no driver is installed.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    count = ctypes.c_int(0)
    if (code := driver.cuInit(0)) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0 if code == _NO_DEVICE else None
    return count.value


def installed_runtimes() -> list[str]:
    """Return the installed distributions that provide the module `onnxruntime`; two of them break each other."""
    names = {str(found.metadata["Name"]) for found in importlib.metadata.distributions() if found.metadata["Name"]}
    return sorted(name for name in names if _RUNTIME.match(name) and not name.lower().startswith("onnxruntime-ext"))


def reinstall_command(installed: list[str]) -> str:
    """Return the commands that replace the installed runtimes with a single one with CUDA."""
    return f"pip uninstall -y {' '.join(installed)}; pip install 'maekit[cuda]'"


def _load(model: Model, providers: list[Any], threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that spin while waiting would take the cores from decoding.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.log_severity_level = 3
    try:
        if isinstance(model, ModelFile):
            if model.external:  # must stay alive until the session is created
                buffers = list(model.external.values())
                options.add_external_initializers_from_files_in_memory(
                    list(model.external), buffers, list(map(len, buffers))
                )
            return ort.InferenceSession(model.content, options, providers=providers, enable_fallback=0)
        return ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime's own exception types have no common base
        name = "the model" if isinstance(model, bytes) else getattr(model, "path", model)
        raise InputError(f"{name}: ONNX Runtime cannot load this file: {first_line(error)}") from error


def _opened(session: Any) -> Opened:
    registered = tuple(session.get_providers())
    nodes: Counter[str] = Counter()
    for subgraph in session.get_provider_graph_assignment_info():
        nodes[subgraph.ep_name] += len(subgraph.get_nodes())
    return Opened(session, registered[0], registered, dict(nodes))


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
        with contextlib.redirect_stdout(io.StringIO()):  # preload_dlls prints the libraries it does not find
            yield
    finally:
        ort.set_default_logger_severity(_USUAL)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
