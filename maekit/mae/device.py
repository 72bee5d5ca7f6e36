"""Chooses the device that PyTorch runs on, and turns its failures into one-line errors."""

import contextlib
from collections.abc import Iterator

import torch

from maekit.system.errors import InputError, MaekitError
from maekit.system.machine import cores

_NO_KERNEL = "no kernel image"  # CUDA error 209
_GPU_FAILURES = ("CUDA error", "cuDNN error")


def choose_device(asked: str) -> str:
    """Return `cpu` or `cuda` for `auto`, `cpu` or `cuda`; CUDA has run a kernel, and the CPU's threads fit its cores.

    Raises:
        InputError: CUDA is requested but not available, or this torch cannot run on the GPU.
    """
    device = find_device(asked)
    run_kernel(torch.device(device))
    torch.set_num_threads(min(torch.get_num_threads(), cores()))  # torch knows of no quota
    return device


def find_device(asked: str) -> str:
    """Return `cpu` or `cuda` as `choose_device` does, without running anything.

    Raises:
        InputError: CUDA is requested but not available.
    """
    has_cuda = torch.cuda.is_available()
    if asked == "cuda" and not has_cuda:
        raise InputError(
            "`device` = cuda: PyTorch finds no CUDA device here; check `nvidia-smi` and that this is a CUDA build of "
            f"torch (it is {torch.__version__}), or use `device=cpu`"
        )
    return "cuda" if has_cuda and asked != "cpu" else "cpu"


def run_kernel(device: torch.device) -> None:
    """Multiply two small matrices on a GPU and look at the numbers; on a CPU, do nothing.

    Raises:
        InputError: this torch has no kernels for the GPU, or it computes something else; names what to install.
        MaekitError: the GPU fails.
    """
    if device.type != "cuda":
        return
    with torch.cuda.device(device), device_errors():
        rows = torch.arange(64, dtype=torch.float32).view(8, 8)
        if not torch.allclose((rows.to(device) @ rows.to(device)).cpu(), rows @ rows, rtol=0.01):  # TF32: three digits
            raise InputError(f"{torch.cuda.get_device_name(device)} gives wrong numbers in torch; see nvidia-smi -q")


@contextlib.contextmanager
def device_errors() -> Iterator[None]:
    """Re-raise failures of the device and of the compiler as errors of one line.

    Raises:
        InputError: this torch has no kernels for the GPU, so nothing was done yet.
        MaekitError: out of memory, a failure of the GPU, or of the compiler.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = str(error).splitlines()[0]
        raise MaekitError(f"the device's memory is too small for this model, or taken by others: {said}") from error
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, RuntimeError) and _NO_KERNEL in str(error):
            raise InputError(_without_kernels()) from error
        if isinstance(error, RuntimeError) and said.startswith(_GPU_FAILURES):
            raise MaekitError(f"the GPU failed: {said}; see nvidia-smi, and run the same command again") from error
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        raise MaekitError(f"compiling the step failed: {said}; `compile=false` goes without") from error


def _without_kernels() -> str:
    """Say which GPU this torch has no kernels for, and which build has some."""
    gpu, capability = "this GPU", (0, 0)
    with contextlib.suppress(RuntimeError, AssertionError):  # asking needs no kernel, but a driver
        capability = torch.cuda.get_device_capability()
        gpu = f"{torch.cuda.get_device_name()} (compute capability {capability[0]}.{capability[1]})"
    # The builds for CUDA 12.6 are the last for GPUs before Turing; those for 12.8 serve Turing to Blackwell.
    build = "cu126" if capability < (7, 5) else "cu128"
    return (
        f"torch {torch.__version__} has no kernels for {gpu}; pip install --force-reinstall torch torchvision "
        f"--index-url https://download.pytorch.org/whl/{build}, or hide the GPU: CUDA_VISIBLE_DEVICES= maekit ..."
    )
