"""Chooses the device that PyTorch runs on, and turns its failures into one-line errors."""

import contextlib
from collections.abc import Iterator

import torch

from maekit.system.errors import InputError, MaekitError


def choose_device(asked: str) -> str:
    """Return `cpu` or `cuda` for `auto`, `cpu` or `cuda`.

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


@contextlib.contextmanager
def device_errors() -> Iterator[None]:
    """Re-raise out-of-memory and compiler errors as MaekitError with a one-line message."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = str(error).splitlines()[0]
        raise MaekitError(f"the device's memory is too small for this model, or taken by others: {said}") from error
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MaekitError(f"compiling the step failed: {said}; `compile=false` goes without") from error
