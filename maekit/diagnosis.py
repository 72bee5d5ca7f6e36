"""What this machine is and what does not work on it, each problem with the command that fixes it; and how fast it is.

Nothing is believed from a list: a provider of ONNX Runtime counts when it has run nodes and the numbers are right, a
disk when it has taken a write.
"""

import ctypes
import functools
import importlib.metadata
import itertools
import math
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from maekit.config.check import DoctorConfig
from maekit.shards.read import ShardSet, open_shards
from maekit.shards.spec import find_shards
from maekit.system import files
from maekit.system.errors import ImageError, InputError
from maekit.system.machine import available_memory, cores, cpu_quota, first_core_and_count
from maekit.version import __version__

if TYPE_CHECKING:
    from maekit.embedding.session import EncoderSession
    from maekit.providers import Opened

Rates = dict[str, float | str]

_VECTOR_UNITS = {
    *("avx", "avx2", "avx_vnni", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni"),
    *("amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "asimdhp", "bf16", "i8mm", "sve", "sve2", "svebf16", "svei8mm", "sme"),
}
_LEAST_SHARED = 256_000_000  # bytes; Docker gives 64 MB
_LEAST_DISK = 1_000_000_000  # bytes
_LEAST_FILES = 1024
_NVIDIA_CARD = "0x10de 0x03"  # PCI: the vendor, and how the class of a graphics or compute card begins
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_TRY_TORCH = """
import torch
from maekit.mae.device import run_kernel
from maekit.system.errors import MaekitError

failure = ""
try:
    for number in range(torch.cuda.device_count()):
        run_kernel(torch.device("cuda", number))
except MaekitError as error:
    failure = str(error)
print(torch.cuda.is_available(), torch.version.cuda, failure)
"""
_TORCH_SECONDS = 120  # a first import of torch from a slow disk
_DECODE_SHARE, _SESSION_SHARE = 0.16, 0.4  # of the time for measuring; the rest is loading
_BATCH = 16  # images in one call of the model
_DECODED = 32  # images that a thread decodes before it looks at the clock
_BUSY = 0.75  # running threads per core
# Names both packages: pip only warns of one that is not installed.
_REINSTALL = "pip uninstall -y onnxruntime onnxruntime-gpu; pip install 'maekit[cuda]'"
_REINSTALL_TORCH = "pip uninstall -y torch torchvision; pip install 'maekit[train]'"


@dataclass(frozen=True)
class Finding:
    """One thing that was examined.

    Attributes:
        subject: what was examined.
        value: what was found.
        problem: what does not work; None if all is well.
        fix: what fixes the problem.
    """

    subject: str
    value: str
    problem: str | None = None
    fix: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        findings: in the order in which they are read best.
        rates: of a model, in images per second: `session`, and with shards `decode_one_core`, `decode_all_cores` and
            `limit`, which is that of embedding on this CPU, where both share the cores; with `cores`, `model` and
            `batch_size`. Empty without a model.
    """

    findings: list[Finding]
    rates: Rates = field(default_factory=dict)

    @property
    def problems(self) -> list[Finding]:
        """The findings that are problems."""
        return [finding for finding in self.findings if finding.problem]

    def summary(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "problems": [{"subject": f.subject, "problem": f.problem, "fix": f.fix} for f in self.problems],
            "findings": [{"subject": f.subject, "value": f.value} for f in self.findings],
            "rates": {key: round(value, 2) if isinstance(value, float) else value for key, value in self.rates.items()},
        }


def doctor(config: DoctorConfig | None = None) -> Diagnosis:
    """Examine this machine and run a few nodes on every provider; with a model, measure how fast it embeds here.

    Raises:
        InputError: `model` is no file that `maekit export` wrote, or `shards` hold no readable image.
    """
    config = config or DoctorConfig()
    config.validate()
    failure, session = _failure_of_runtime(), None
    # A wrong path is reported before anything takes its time.
    if config.model and not failure:
        from maekit.embedding.session import EncoderSession

        session = EncoderSession(Path(config.model), device="cpu")
    shards = _shards(config.shards) if config.shards else None
    driver = _driver()
    runtime = [failure] if failure else _runtime(driver)
    findings = [*_machine(), *_gpus(driver), *runtime, _torch(driver), _shared_memory(), *_disks(), _open_files()]
    if session is not None:
        findings.append(Finding("model", f"runs in {session.version} on the CPU"))
    return Diagnosis(findings, _rates(session, shards, config.seconds) if session else {})


def _unless(is_fine: bool, finding: Finding) -> Finding:
    """Return a finding that is no problem after all if `is_fine`."""
    return Finding(finding.subject, finding.value) if is_fine else finding


def _text(path: Path) -> str:
    """Return the text of a file of the kernel; empty if there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _machine() -> list[Finding]:
    # The first core of several; its lines are `name : value`.
    first = _text(Path("/proc/cpuinfo")).partition("\n\n")[0]
    about: dict[str, str] = dict(re.findall(r"^(.*?)\s*: (.*)$", first, re.MULTILINE))
    units = [unit for unit in about.get("flags", about.get("Features", "")).split() if unit in _VECTOR_UNITS]
    load = os.getloadavg()[0]
    remark = "; other work lowers the rates" if load > _BUSY * cores() else ""
    return [
        Finding("Python", f"{platform.python_version()}, maekit {__version__}"),
        Finding("system", f"{platform.system()} {platform.release()} on {platform.machine()}"),
        _cores(about.get("model name") or platform.processor() or platform.machine()),
        Finding("vector units", " ".join(units) or "none that matters here"),
        Finding("memory", f"{files.describe_bytes(available_memory())} available"),
        Finding("load", f"{load:.1f} in the last minute{remark}"),
    ]


def _cores(name: str) -> Finding:
    value, quota = f"{name}, {first_core_and_count()[1]} of {os.cpu_count()} cores", cpu_quota()
    return Finding("CPU", value if math.isinf(quota) else f"{value}, quota {quota:g}: maekit uses {cores()}")


class _Driver(NamedTuple):
    """The NVIDIA driver; without arguments, that there is none.

    Attributes:
        release: its version, empty if unknown.
        cuda: the newest version of CUDA that it can serve, such as 12.4; empty if there is no driver.
        gpus: (name, bytes of memory) of each GPU that it lets this process see.
        code: what its start returned, 0 for success.
        error: the same in words.
    """

    release: str = ""
    cuda: str = ""
    gpus: tuple[tuple[str, int], ...] = ()
    code: int = 0
    error: str = ""


def _driver() -> _Driver:
    """Ask the NVIDIA driver itself, because nvidia-smi is missing in many containers."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return _Driver()
    version, count, device, memory = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0), ctypes.c_size_t(0)
    name, error = ctypes.create_string_buffer(256), ctypes.c_char_p()
    library.cuDriverGetVersion(ctypes.byref(version))
    code = library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count))
    library.cuGetErrorString(code, ctypes.byref(error))
    gpus = []
    for number in range(count.value):
        library.cuDeviceGet(ctypes.byref(device), number)
        library.cuDeviceGetName(name, len(name), device)
        library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        gpus.append((name.value.decode(errors="replace"), memory.value))
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return _Driver(_text(Path("/sys/module/nvidia/version")), cuda, tuple(gpus), code, (error.value or b"").decode())


def _major(version: str) -> int:
    return int(version.partition(".")[0] or 0)


def _gpus(driver: _Driver) -> list[Finding]:
    if not driver.gpus:
        return [_no_gpu(driver, _cards())]
    found = {f"{name}, {files.describe_bytes(memory)}": count for (name, memory), count in Counter(driver.gpus).items()}
    rows = [f"{count} x {gpu} each" if count > 1 else gpu for gpu, count in found.items()]
    about = ", ".join(filter(None, [driver.release, f"CUDA up to {driver.cuda}"]))
    return [*(Finding("NVIDIA GPU", row) for row in rows), Finding("NVIDIA driver", about)]


def _cards() -> int:
    """Return how many NVIDIA cards are on the PCI bus, whether or not a driver serves them."""
    devices = Path("/sys/bus/pci/devices").glob("*")
    kinds = [_text(folder / "vendor") + " " + _text(folder / "class") for folder in devices]
    return sum(kind.startswith(_NVIDIA_CARD) for kind in kinds)


def _no_gpu(driver: _Driver, cards: int) -> Finding:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if driver.code not in (0, _NO_DEVICE):
        problem = f"the NVIDIA driver does not start: error {driver.code}, {driver.error}"
        return Finding("NVIDIA GPU", "out of reach", problem, "see nvidia-smi; after an update of the driver, reboot")
    if driver.cuda and hidden is not None:
        return Finding("NVIDIA GPU", f"none to be seen, CUDA_VISIBLE_DEVICES is {hidden!r}")
    if not cards:
        return Finding("NVIDIA GPU", "none here")
    what = "the driver sees none of them" if driver.cuda else "no driver (libcuda.so.1)"
    fix = "install the NVIDIA driver; a container gets GPUs and driver by docker run --gpus all"
    return Finding("NVIDIA GPU", f"{cards} out of reach", f"NVIDIA cards on the PCI bus: {cards}, but {what}", fix)


def _failure_of_runtime() -> Finding | None:
    try:
        import maekit.providers  # noqa: F401
    except Exception as error:  # a broken installation raises anything, AttributeError included
        said = traceback.format_exception_only(error)[-1].splitlines()[0]
        return Finding("ONNX Runtime", "does not load", f"import onnxruntime fails: {said}", _REINSTALL)
    return None


def _runtime(driver: _Driver) -> list[Finding]:
    """Examine the installed ONNX Runtime, and run nodes on its providers."""
    import onnxruntime

    from maekit import providers

    installed = providers.installed_runtimes()
    build = installed + [f"for CUDA {onnxruntime.cuda_version}"] * bool(onnxruntime.cuda_version)
    value = f"{onnxruntime.__version__} ({', '.join(build)})" if build else onnxruntime.__version__
    problem = f"{' and '.join(installed)} are installed together and overwrite each other's files"
    fix = providers.reinstall_command(installed)
    cpu_fix = f"pip install --force-reinstall --no-deps {(installed or ['onnxruntime'])[0]}"
    return [
        _unless(len(installed) < 2, Finding("ONNX Runtime", value, problem, fix)),
        _provider("CPU provider", lambda model: providers.open_cpu(model, threads=1), cpu_fix),
        _cuda_provider(driver, onnxruntime.cuda_version),
        _openvino(),
    ]


def _openvino() -> Finding:
    """Examine OpenVINO, which runs models on the CPU where it is installed."""
    from maekit import openvino_runtime

    if problem := openvino_runtime.problem():
        found = Finding("OpenVINO", "does not work", problem.what, problem.fix)
        return Finding("OpenVINO", f"not installed ({problem.fix})") if problem.is_absent else found
    native = " ".join(name for name in openvino_runtime.capabilities() if name in ("FP32", "BF16", "FP16", "INT8"))
    auto = "taken by `runtime=auto`" if openvino_runtime.is_faster() else "taken by `runtime=openvino` only"
    return Finding("OpenVINO", f"{openvino_runtime.version().split()[1]}, native {native}; {auto}")


def _cuda_provider(driver: _Driver, cuda: str) -> Finding:
    """Examine the CUDA provider of an ONNX Runtime that was built for a version of CUDA; empty if for none."""
    from maekit import providers

    subject, fix = "CUDA provider", "update the NVIDIA driver, or use `device=cpu`"
    if problem := providers.cuda_problem():
        value = "does not work" if driver.gpus else f"not tried, {problem.what}"
        return _unless(not driver.gpus, Finding(subject, value, problem.what, problem.fix))
    finding = _provider(subject, lambda model: providers.open_cuda(model, "cuda", threads=1), fix)
    if not finding.problem or not driver.cuda or _major(driver.cuda) >= _major(cuda):
        return finding
    what = f"it was built for CUDA {cuda}, and the NVIDIA driver ends at {driver.cuda}"
    return Finding(subject, finding.value, what, f"update the NVIDIA driver to one for CUDA {_major(cuda)}")


def _provider(subject: str, open_model: Callable[[bytes], "Opened"], fix: str) -> Finding:
    """Run a convolution and a matrix product on a provider and compare the numbers."""
    from maekit.providers import first_line

    model, inputs, expected = _probe()
    try:
        opened = open_model(model)
        if opened.problem:
            return Finding(subject, "does not work", opened.problem.what, opened.problem.fix)
        (got,) = opened.session.run(None, inputs)
    except Exception as error:  # onnxruntime's own exception types have no common base
        return Finding(subject, "does not work", first_line(error.__cause__ or error), fix)
    # TF32, which CUDA may use, has three digits.
    if not np.allclose(got, expected, rtol=0, atol=0.01 * np.abs(expected).max()):
        return Finding(subject, "gives wrong numbers", f"{opened.provider} gives wrong numbers", fix)
    nodes = opened.nodes.get(opened.provider, 0)
    return Finding(subject, f"works: ran {nodes} node{'s' if nodes != 1 else ''}, the numbers are right")


def _probe() -> tuple[bytes, dict[str, NDArray[np.float32]], NDArray[np.float32]]:
    """Return a model of two nodes, its inputs, and the expected output, computed without ONNX Runtime."""
    from onnx import parser

    # A kernel covers a column of the image: [2, 3, 32, 32] -> [2, 8, 1, 32], then [32, 5] -> [2, 8, 1, 5].
    model = parser.parse_model("""<ir_version: 10, opset_import: ["" : 20]>
        probe (float[2, 3, 32, 32] images, float[8, 3, 32, 1] kernels, float[32, 5] matrix) => (float[2, 8, 1, 5] out)
        { columns = Conv(images, kernels)  out = MatMul(columns, matrix) }""")
    random, shapes = np.random.default_rng(0), {"images": (2, 3, 32, 32), "kernels": (8, 3, 32, 1), "matrix": (32, 5)}
    inputs = {name: random.integers(-4, 5, shape).astype(np.float32) for name, shape in shapes.items()}
    return model.SerializeToString(), inputs, np.einsum("bchw,kchi,wn->bkin", *inputs.values())


def _torch(driver: _Driver) -> Finding:
    """Ask torch for CUDA, in a process of its own: embedding loads no torch, and a broken one may end the process."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return Finding("torch", "not installed: pretrain and export need pip install 'maekit[train]'")
    if not driver.gpus:
        return Finding("torch", version)
    try:
        command = [sys.executable, "-c", _TRY_TORCH]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=_TORCH_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        problem = f"importing torch takes more than {_TORCH_SECONDS} s"
        return Finding("torch", version, problem, "see whether nvidia-smi answers; reboot if it does not")
    if ran.returncode:
        said = (ran.stderr.strip().splitlines() or [f"exit {ran.returncode}"])[-1]
        return Finding("torch", version, f"it does not load: {said}", _REINSTALL_TORCH)
    works, cuda, failure = ran.stdout.splitlines()[-1].split(" ", 2)
    if failure:
        what, _, fix = failure.partition("; ")
        return Finding("torch", version, what, fix)
    if works == "True":
        return Finding("torch", f"{version}, works on CUDA: multiplied matrices, the numbers are right")
    if cuda == "None":
        return Finding("torch", version, "a build without CUDA, so pretrain would run on the CPU", _REINSTALL_TORCH)
    problem = f"it was built for CUDA {cuda} and finds no GPU; the NVIDIA driver ends at {driver.cuda}"
    return Finding("torch", version, problem, f"update the NVIDIA driver to one for CUDA {_major(cuda)}")


def _shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    fix = "docker run --shm-size=8g (or --ipc=host); elsewhere, mount -o remount,size=8g /dev/shm"
    try:
        room = shutil.disk_usage(folder)
    except OSError as error:
        if sys.platform != "linux":
            return Finding("shared memory", "not as a folder here")
        return Finding("shared memory", "none", f"{folder}: {error.strerror}; training's data workers need it", fix)
    value = f"{files.describe_bytes(room.free)} free of {files.describe_bytes(room.total)}"
    if room.total >= _LEAST_SHARED:
        fix = f"see what lies in {folder}; a run that was killed may have left it"
    problem = f"{value} is too little for training's data workers"
    return _unless(room.free >= _LEAST_SHARED, Finding("shared memory", value, problem, fix))


def _disks() -> list[Finding]:
    return [
        _disk("disk, this folder", Path.cwd, "work in a folder that has room"),
        _disk("disk, temporary", tempfile.gettempdir, "point TMPDIR to a folder that has room"),
        _disk("disk, cache", files.cache_directory, "point MAEKIT_CACHE to a folder that has room"),
    ]


def _disk(subject: str, find: Callable[[], str | Path], fix: str) -> Finding:
    """Write into a folder, or into the one where it would be created; the file has no name and is gone at once."""
    name = "its folder"
    try:
        folder = Path(find()).absolute()
        name = str(folder)
        existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
        free = shutil.disk_usage(existing).free
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"maekit")
    except OSError as error:
        return Finding(subject, name, f"{name} cannot be written: {error.strerror}", fix)
    value = f"{files.describe_bytes(free)} free in {name}"
    return _unless(free >= _LEAST_DISK, Finding(subject, value, f"only {value}", fix))


def _open_files() -> Finding:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (math.inf if limit == resource.RLIM_INFINITY else limit for limit in limits)
    value = "no limit" if soft == math.inf else f"{soft} at most"
    fix = f"ulimit -n {min(hard, 4 * _LEAST_FILES)}"
    if hard < _LEAST_FILES:
        fix = "raise the hard limit: docker run --ulimit nofile=4096, or /etc/security/limits.conf"
    problem = f"{value}: shards, workers and sockets need more"
    return _unless(soft >= _LEAST_FILES, Finding("open files", value, problem, fix))


def _shards(specs: tuple[str, ...]) -> ShardSet:
    """Open shards to measure decoding on.

    Raises:
        InputError: no shards there, or no image in them.
    """
    shards = open_shards(find_shards(specs), skip_damaged=True)
    if all(isinstance(image, ImageError) for image in shards.images(shards.spread(_DECODED), bytes)):
        raise InputError(f"{', '.join(specs)}: no image to measure decoding on")
    return shards


def _rates(session: "EncoderSession", shards: ShardSet | None, seconds: float) -> Rates:
    """Measure the session, and with shards also decoding and what both leave of the cores together."""
    preprocess, count = session.description.preprocess, cores()
    height, width = preprocess.size
    images = np.random.default_rng(0).integers(0, 256, (_BATCH, height, width, 3), np.uint8)
    session(images[:1])  # the first run allocates
    speed = _per_second(lambda: len(session(images[:1])), 0)
    batch = max(1, min(_BATCH, int(_SESSION_SHARE * seconds * speed)))  # smaller if the model is slow
    rate = _per_second(lambda: len(session(images[:batch])), _SESSION_SHARE * seconds)
    model = f"{session.description.path.name} at {height} x {width}"
    rates: Rates = {"cores": count, "model": model, "batch_size": batch, "session": rate}
    if shards is None:
        return rates

    def decode(threads: int) -> int:
        numbers = itertools.islice(itertools.cycle(shards.spread(_DECODED)), threads * _DECODED)
        return len(list(shards.images(numbers, preprocess, threads=threads)))

    one, every = (_per_second(functools.partial(decode, threads), _DECODE_SHARE * seconds) for threads in (1, count))
    return rates | {"decode_one_core": one, "decode_all_cores": every, "limit": 1 / (1 / every + 1 / rate)}


def _per_second(work: Callable[[], int], seconds: float) -> float:
    """Repeat `work`, which returns its number of images, for some time and at least once; return images per second."""
    started, count = time.perf_counter(), work()
    while time.perf_counter() < started + seconds:
        count += work()
    return count / (time.perf_counter() - started)
