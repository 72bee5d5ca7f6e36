"""Failures of a GPU are one line each; one without kernels is refused before any work."""

import contextlib

import pytest
import torch
from support.errors import raises

from maekit.mae.device import choose_device, device_errors, run_kernel
from maekit.system.errors import InputError, MaekitError

NO_KERNEL = "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be reported"


def failing(error: Exception) -> None:
    with device_errors():
        raise error


@pytest.mark.parametrize(("capability", "build"), [((7, 0), "cu126"), ((12, 0), "cu128")])
def test_a_gpu_without_kernels_is_named_with_the_build_to_take(monkeypatch, capability: tuple[int, int], build: str):
    def lack(*_: object) -> None:
        raise torch.AcceleratorError(NO_KERNEL)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "to", lack)
    said = rf"no kernels for V100 \(compute capability {capability[0]}.0\); pip install .*/{build}, or hide the GPU"
    with raises(InputError, match=said):
        choose_device("auto")
    assert choose_device("cpu") == "cpu"
    run_kernel(torch.device("cpu"))


def test_other_failures_of_a_gpu_are_one_line() -> None:
    with raises(InputError, match="has no kernels for this GPU"):
        failing(torch.AcceleratorError(NO_KERNEL))
    with raises(MaekitError, match="^the GPU failed: CUDA error: an illegal memory access; see nvidia-smi"):
        failing(torch.AcceleratorError("CUDA error: an illegal memory access\nmore"))
    with raises(MaekitError, match="memory is too small"):
        failing(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError, match="shapes"):
        failing(RuntimeError("shapes differ"))
