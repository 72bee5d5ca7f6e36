"""What this machine is and what does not work on it, each problem with the command that mends it; and how fast it is.

Nothing is believed from a list: a provider of ONNX Runtime counts when it has run nodes and the numbers are right, a
disk when it has taken a write.
"""

import contextlib
import importlib.metadata
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from maekit.config.check import DoctorConfig
from maekit.images import Preprocess
from maekit.shards.read import open_shards
from maekit.shards.spec import find_shards
from maekit.system import files
from maekit.system.errors import ImageError, InputError
from maekit.system.machine import available_memory, cores
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
_NVIDIA, _DISPLAY = "0x10de", "0x03"  # PCI: the vendor, and how the class of a graphics or compute card begins
_NO_DEVICE = 100  # of the CUDA driver
_TORCH_SECONDS = 120  # a first import of torch from a slow disk
_DECODE_SHARE, _SESSION_SHARE = 0.16, 0.4  # of the time for measuring; the rest is loading
_BATCH, _IMAGES = 16, 64
_BUSY = 0.75  # running threads per core
# Names both: pip only warns of one that is not installed.
_REINSTALL = "pip uninstall -y onnxruntime onnxruntime-gpu; pip install 'maekit[cuda]'"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: what.
        value: what was found.
        problem: what does not work; None where all is well.
        fix: what mends the problem.
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
    """Look at this machine and run a few nodes on every provider; with a model, measure how fast it embeds here.

    Raises:
        InputError: `model` is no file that `maekit export` wrote, or `shards` hold no readable image.
    """
    config = config or DoctorConfig()
    config.validate()
    runtime, finding = _runtime()
    # A wrong path is told before anything takes its time.
    session = _session(config.model) if config.model and runtime else None
    images = _first_images(config.shards)
    driver = _driver()
    findings = [*_machine(), *_gpu(driver), finding]
    if runtime:
        findings += [_cpu_provider(runtime), _cuda_provider(runtime, driver)]
    findings += [_torch(driver), _shared_memory(), *_disks(), _open_files()]
    return Diagnosis(findings, _rates(session, images, config.seconds) if session else {})


def _machine() -> list[Finding]:
    here = f"{platform.python_version()}, maekit {__version__}"
    system = f"{platform.system()} {platform.release()} on {platform.machine()}"
    name, units = _cpu()
    return [
        Finding("Python", here),
        Finding("system", system),
        _cores(name),
        Finding("vector units", " ".join(units) or "none that matters here"),
        Finding("memory", f"{files.describe_bytes(available_memory())} available"),
        _load(),
    ]


def _cpu() -> tuple[str, list[str]]:
    """Return the name of the CPU and its vector units."""
    lines: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            lines.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    units = (lines.get("flags") or lines.get("Features") or "").split()
    name = lines.get("model name") or platform.processor() or platform.machine()
    return name, [unit for unit in units if unit in _VECTOR_UNITS]


def _cores(name: str) -> Finding:
    count = cores()
    value = f"{name}, {count} of {os.cpu_count()} cores"
    quota = _cpu_quota()
    if quota is None or math.ceil(quota) >= count:
        return Finding("CPU", value)
    several = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[: math.ceil(quota)])
    return Finding(
        "CPU",
        f"{value}, with the time of {quota:g}",
        f"the control group grants the time of {quota:g} of {count} cores, so threads for all of them are held up",
        f"taskset -c {several} maekit ..., or give a container whole cores: docker run --cpuset-cpus",
    )


def _load() -> Finding:
    load = os.getloadavg()[0]
    remark = "; other work lowers the rates" if load > _BUSY * cores() else ""
    return Finding("load", f"{load:.1f} in the last minute{remark}")


def _cpu_quota(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Return how many cores' time the control groups (version 2) of this process grant, or None for no limit."""
    try:
        (path,) = [line.split("::")[1] for line in own.read_text().splitlines() if "::" in line]
    except (OSError, ValueError):
        return None
    quotas = []
    folder = root / path.lstrip("/")
    for group in (folder, *folder.parents):
        try:
            quota, period = (group / "cpu.max").read_text().split()
            quotas.append(int(quota) / int(period))
        except (OSError, ValueError):  # no such group; or `max`, which is no number
            continue
    return min(quotas, default=None)


@dataclass(frozen=True)
class _Driver:
    """The NVIDIA driver.

    Attributes:
        release: its version, empty where it is not told.
        cuda: the newest (major, minor) version of CUDA that it can serve.
        gpus: (name, bytes of memory) of each GPU that it lets this process see.
        code: what its start gave, 0 for success.
        error: the same in words.
    """

    release: str
    cuda: tuple[int, int]
    gpus: list[tuple[str, int]]
    code: int = 0
    error: str = ""


def _driver() -> _Driver | None:
    """Ask the NVIDIA driver itself, since nvidia-smi is missing in many containers; None where there is no driver."""
    import ctypes

    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    library.cuDriverGetVersion(ctypes.byref(version))
    cuda = (version.value // 1000, version.value % 1000 // 10)
    code = library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count))
    if code:
        said = ctypes.c_char_p()
        library.cuGetErrorString(code, ctypes.byref(said))
        return _Driver(_driver_release(), cuda, [], code, (said.value or b"").decode(errors="replace"))
    gpus = []
    for number in range(count.value):
        device, name, memory = ctypes.c_int(0), ctypes.create_string_buffer(256), ctypes.c_size_t(0)
        library.cuDeviceGet(ctypes.byref(device), number)
        library.cuDeviceGetName(name, len(name), device)
        library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        gpus.append((name.value.decode(errors="replace"), memory.value))
    return _Driver(_driver_release(), cuda, gpus)


def _driver_release() -> str:
    try:
        return Path("/sys/module/nvidia/version").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _cards() -> int:
    """Return how many NVIDIA cards are on the PCI bus, whether or not a driver serves them."""
    count = 0
    for folder in Path("/sys/bus/pci/devices").glob("*"):
        try:
            vendor, kind = ((folder / name).read_text(encoding="ascii").strip() for name in ("vendor", "class"))
        except OSError:
            continue
        count += vendor == _NVIDIA and kind.startswith(_DISPLAY)
    return count


def _gpu(driver: _Driver | None) -> list[Finding]:
    if driver is None or not driver.gpus:
        return [_no_gpu(driver, _cards())]
    rows = [
        f"{count} x {name}, {files.describe_bytes(memory)} each"
        if count > 1
        else f"{name}, {files.describe_bytes(memory)}"
        for (name, memory), count in Counter(driver.gpus).items()
    ]
    about = f"CUDA up to {driver.cuda[0]}.{driver.cuda[1]}"
    value = f"{driver.release}, {about}" if driver.release else about
    return [*(Finding("NVIDIA GPU", row) for row in rows), Finding("NVIDIA driver", value)]


def _no_gpu(driver: _Driver | None, cards: int) -> Finding:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if driver is not None and driver.code not in (0, _NO_DEVICE):
        problem = f"the NVIDIA driver does not start: error {driver.code}, {driver.error}"
        return Finding("NVIDIA GPU", "out of reach", problem, "see nvidia-smi; after an update of the driver, reboot")
    if driver is not None and hidden is not None:
        return Finding("NVIDIA GPU", f"none to be seen, CUDA_VISIBLE_DEVICES is {hidden!r}")
    if not cards:
        return Finding("NVIDIA GPU", "none here")
    what = "no driver (libcuda.so.1)" if driver is None else "the driver sees none of them"
    fix = "install the NVIDIA driver; a container gets GPUs and driver by docker run --gpus all"
    return Finding("NVIDIA GPU", f"{cards} out of reach", f"NVIDIA cards on the PCI bus: {cards}, but {what}", fix)


def _runtime() -> tuple[ModuleType | None, Finding]:
    """Return maekit's module of providers, or None where ONNX Runtime does not load, and what was found."""
    try:
        import onnxruntime

        from maekit import providers
    except Exception as error:  # a torn installation fails in whatever way it likes, AttributeError included
        said = f"import onnxruntime fails: {type(error).__name__}: {_first_line(error)}"
        return None, Finding("ONNX Runtime", "does not load", said, _REINSTALL)
    installed = providers.installed_runtimes()
    build = [*installed, *([f"for CUDA {cuda}"] if (cuda := _cuda_of_runtime()) else [])]
    value = f"{onnxruntime.__version__} ({', '.join(build)})" if build else str(onnxruntime.__version__)
    if len(installed) < 2:
        return providers, Finding("ONNX Runtime", value)
    problem = f"{' and '.join(installed)} are installed together and overwrite each other's files"
    return providers, Finding("ONNX Runtime", value, problem, providers.reinstall_command(installed))


def _cuda_of_runtime() -> str:
    """Return the version of CUDA that ONNX Runtime was built for, empty where it was built for none."""
    try:
        from onnxruntime.capi import build_and_package_info
    except ImportError:
        return ""
    return str(getattr(build_and_package_info, "cuda_version", "") or "")


def _cpu_provider(runtime: ModuleType) -> Finding:
    installed = runtime.installed_runtimes() or ["onnxruntime"]
    fix = f"pip install --force-reinstall --no-deps {installed[0]}"
    return _provider("CPU provider", lambda model: runtime.open_cpu(model, threads=1), fix)


def _cuda_provider(runtime: ModuleType, driver: _Driver | None) -> Finding:
    subject = "CUDA provider"
    has_gpu = driver is not None and bool(driver.gpus)
    if problem := runtime.cuda_problem():
        if has_gpu:
            return Finding(subject, "does not work", problem.what, problem.fix)
        return Finding(subject, f"not tried, {problem.what}")
    fix = "update the NVIDIA driver, or use `device=cpu`"
    finding = _provider(subject, lambda model: runtime.open_cuda(model, "cuda", threads=1), fix)
    needs = int(_cuda_of_runtime().partition(".")[0] or 0)
    if finding.problem and driver is not None and driver.cuda[0] < needs:
        offered = f"{driver.cuda[0]}.{driver.cuda[1]}"
        problem = f"it was built for CUDA {_cuda_of_runtime()}, and the NVIDIA driver ends at {offered}"
        return Finding(subject, finding.value, problem, f"update the NVIDIA driver to one for CUDA {needs}")
    return finding


def _provider(subject: str, open_model: Callable[[bytes], "Opened"], fix: str) -> Finding:
    """Run a convolution and a matrix product on a provider and compare the numbers."""
    model, images, expected = _probe()
    try:
        opened = open_model(model)
        if opened.problem:
            return Finding(subject, "does not work", opened.problem.what, opened.problem.fix)
        (got,) = opened.session.run(None, {"images": images})
    except Exception as error:  # onnxruntime's own exception types have no common base
        return Finding(subject, "does not work", _first_line(error.__cause__ or error), fix)
    # TF32, which CUDA may use, has three digits.
    if not np.allclose(got, expected, rtol=0, atol=0.01 * np.abs(expected).max()):
        return Finding(subject, "gives wrong numbers", f"{opened.provider} gives wrong numbers", fix)
    nodes = opened.nodes.get(opened.provider, 0)
    return Finding(subject, f"works: ran {nodes} node{'s' if nodes != 1 else ''}, the numbers are right")


def _probe() -> tuple[bytes, NDArray[np.float32], NDArray[np.float32]]:
    """Return a model of a few nodes, an input, and the expected output, computed without ONNX Runtime."""
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    images, kernels, matrix = (
        random.integers(-4, 5, shape).astype(np.float32) for shape in ((2, 3, 32, 32), (8, 3, 32, 32), (8, 5))
    )
    expected = np.einsum("bchw,kchw->bk", images, kernels) @ matrix
    nodes = [
        helper.make_node("Conv", ["images", "kernels"], ["patches"]),
        helper.make_node("Reshape", ["patches", "shape"], ["tokens"]),
        helper.make_node("MatMul", ["tokens", "matrix"], ["out"]),
    ]
    constants: dict[str, NDArray[Any]] = {"kernels": kernels, "matrix": matrix, "shape": np.array([-1, 8], np.int64)}
    graph = helper.make_graph(
        nodes,
        "probe",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, images.shape)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, expected.shape)],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString()), images, expected


def _torch(driver: _Driver | None) -> Finding:
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return Finding("torch", "not installed: pretrain and export need pip install 'maekit[train]'")
    if driver is None or not driver.gpus:
        return Finding("torch", version)
    # In a process of its own: maekit's embedding loads no torch, and a torn installation may end the process.
    script = "import torch; print(torch.cuda.is_available(), torch.version.cuda)"
    command = [sys.executable, "-c", script]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=_TORCH_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        problem = f"importing torch takes more than {_TORCH_SECONDS} s"
        return Finding("torch", version, problem, "see whether nvidia-smi answers; reboot if it does not")
    return _torch_on_gpu(version, driver, ran)


def _torch_on_gpu(version: str, driver: _Driver, ran: "subprocess.CompletedProcess[str]") -> Finding:
    """Return what the process that asked torch for CUDA found."""
    anew = "pip uninstall -y torch torchvision; pip install 'maekit[train]'"
    if ran.returncode:
        said = (ran.stderr.strip().splitlines() or [f"exit {ran.returncode}"])[-1]
        return Finding("torch", version, f"it does not load: {said}", anew)
    works, cuda = ran.stdout.split()[-2:]
    if works == "True":
        return Finding("torch", f"{version}, works on CUDA")
    if cuda == "None":
        return Finding("torch", version, "a build without CUDA, so pretrain would run on the CPU", anew)
    offered = f"{driver.cuda[0]}.{driver.cuda[1]}"
    problem = f"it was built for CUDA {cuda} and finds no GPU; the NVIDIA driver ends at {offered}"
    return Finding("torch", version, problem, f"update the NVIDIA driver to one for CUDA {cuda.partition('.')[0]}")


def _shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    fix = "docker run --shm-size=8g (or --ipc=host); elsewhere, mount -o remount,size=8g /dev/shm"
    try:
        room = shutil.disk_usage(folder)
    except OSError as error:
        if sys.platform != "linux":
            return Finding("shared memory", "not as a folder here")
        return Finding("shared memory", "none", f"{folder}: {error.strerror}; training's data workers need it", fix)
    free, total = files.describe_bytes(room.free), files.describe_bytes(room.total)
    value = f"{free} free of {total}"
    if room.free >= _LEAST_SHARED:
        return Finding("shared memory", value)
    if room.total >= _LEAST_SHARED:
        fix = f"see what lies in {folder}; a run that was killed may have left it"
    return Finding("shared memory", value, f"{value} is too little for training's data workers", fix)


def _disks() -> list[Finding]:
    findings = [_disk("disk, this folder", Path("."), "work in a folder that has room")]
    try:
        folder = Path(tempfile.gettempdir())
        findings.append(_disk("disk, temporary", folder, "point TMPDIR to a folder that has room"))
    except OSError as error:
        problem = f"there is no folder for temporary files: {error.strerror}"
        findings.append(Finding("disk, temporary", "none", problem, "point TMPDIR to a folder that can be written"))
    cache = files.cache_directory().absolute()
    existing = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    findings.append(_disk("disk, cache", existing, "point MAEKIT_CACHE to a folder that has room", shown=cache))
    return findings


def _disk(subject: str, folder: Path, fix: str, *, shown: Path | None = None) -> Finding:
    """Look at the room in a folder by writing into it; the file has no name and is gone at once."""
    try:
        name = str(shown or folder.absolute())
        room = shutil.disk_usage(folder)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"maekit")
    except OSError as error:
        return Finding(subject, f"{shown or folder}", f"{shown or folder} cannot be written: {error.strerror}", fix)
    value = f"{files.describe_bytes(room.free)} free in {name}"
    if room.free < _LEAST_DISK:
        return Finding(subject, value, f"only {value}", fix)
    return Finding(subject, value)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return Finding("open files", "no limit")
    value = f"{soft} at most"
    if soft >= _LEAST_FILES:
        return Finding("open files", value)
    reach = 4 * _LEAST_FILES if hard == resource.RLIM_INFINITY else min(hard, 4 * _LEAST_FILES)
    fix = f"ulimit -n {reach}"
    if reach < _LEAST_FILES:
        fix = "raise the hard limit: docker run --ulimit nofile=4096, or /etc/security/limits.conf"
    return Finding("open files", value, f"{value}: shards, workers and sockets need more", fix)


def _session(model: str) -> "EncoderSession":
    """Load a file that `maekit export` wrote, for the CPU.

    Raises:
        InputError: it is none.
    """
    from maekit.embedding.session import EncoderSession

    return EncoderSession(Path(model), device="cpu")


def _first_images(specs: Sequence[str]) -> list[bytes]:
    """Return the bytes of a few images, evenly spread over shards.

    Raises:
        InputError: no shards there, or no image in them.
    """
    if not specs:
        return []
    shards = open_shards(find_shards(tuple(specs)), skip_damaged=True)
    found = shards.images(shards.spread(_IMAGES), bytes)
    images = [image for image in found if not isinstance(image, ImageError)]
    if not images:
        raise InputError(f"{', '.join(specs)}: no image to measure decoding on")
    return images


def _rates(session: "EncoderSession", images: list[bytes], seconds: float) -> Rates:
    """Measure the session, and with images also decoding and what both leave of the cores together."""
    preprocess, count = session.description.preprocess, cores()
    height, width = preprocess.size
    rate, batch = _session_rate(session, preprocess, _SESSION_SHARE * seconds)
    rates: Rates = {"cores": count, "model": f"{session.description.path.name} at {height} x {width}"}
    rates |= {"batch_size": batch, "session": rate}
    if images:
        one = _decode_rate(images, preprocess, 1, _DECODE_SHARE * seconds)
        every = _decode_rate(images, preprocess, count, _DECODE_SHARE * seconds) if count > 1 else one
        rates |= {"decode_one_core": one, "decode_all_cores": every, "limit": 1 / (1 / every + 1 / rate)}
    return rates


def _decode_rate(images: list[bytes], preprocess: Preprocess, threads: int, seconds: float) -> float:
    """Return the images a second that some threads decode and prepare; what cannot be decoded takes its time, too."""
    started = time.perf_counter()

    def work() -> int:
        count = 0
        while not count or time.perf_counter() < started + seconds:
            with contextlib.suppress(ImageError):
                preprocess(images[count % len(images)])
            count += 1
        return count

    with ThreadPoolExecutor(threads) as pool:
        counts = [future.result() for future in [pool.submit(work) for _ in range(threads)]]
    return sum(counts) / (time.perf_counter() - started)


def _session_rate(session: "EncoderSession", preprocess: Preprocess, seconds: float) -> tuple[float, int]:
    """Return the images a second that a session embeds, and its batch size: smaller where it is slow."""
    images = np.random.default_rng(0).integers(0, 256, (_BATCH, *preprocess.size, 3), np.uint8)
    session(images[:1])  # the first run allocates
    before = time.perf_counter()
    session(images[:1])
    batch = max(1, min(_BATCH, int(seconds / (time.perf_counter() - before))))
    count, started = 0, time.perf_counter()
    while not count or time.perf_counter() < started + seconds:
        session(images[:batch])
        count += batch
    return count / (time.perf_counter() - started), batch


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
