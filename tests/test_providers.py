"""Execution providers: asked for CUDA means on CUDA, or a refusal that says how to mend it."""

from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest
import torch
from support.errors import raises
from support.models import embed_config

import maekit.providers as module
from maekit.embedding.embed import embed
from maekit.embedding.session import EncoderSession
from maekit.system.errors import InputError

pytestmark = pytest.mark.whole


class Driver:
    """A stand-in for libcuda.so.1."""

    def __init__(self, code: int, devices: int) -> None:
        self._code, self._devices = code, devices

    def cuInit(self, flags: int) -> int:
        return self._code

    def cuDeviceGetCount(self, count) -> int:
        count._obj.value = self._devices
        return 0

    def cuDeviceGet(self, device, number: int) -> None:
        device._obj.value = number

    def cuDeviceGetName(self, name, size: int, device) -> None:
        name.value = b"V100"

    def cuDeviceGetAttribute(self, value, attribute: int, device) -> None:
        value._obj.value = {75: 7, 76: 0}[attribute]


class Session:
    """A real session that says other things of itself."""

    def __init__(self, session, providers: list[str]) -> None:
        self._session, self._providers = session, providers

    def get_providers(self) -> list[str]:
        return self._providers

    def __getattr__(self, name: str):
        return getattr(self._session, name)


def with_driver(patch, code: int = 0, devices: int = 1) -> None:
    patch.setattr(module.ort, "get_available_providers", lambda: [module.CUDA, module.CPU])
    plain = module.ctypes.CDLL
    patch.setattr(module.ctypes, "CDLL", lambda name: Driver(code, devices) if "libcuda" in str(name) else plain(name))


def without_cuda(patch) -> None:
    patch.setattr(module.ort, "get_available_providers", lambda: [module.CPU])
    patch.setattr(module, "installed_runtimes", lambda: ["onnxruntime"])


def two_packages(patch) -> None:
    patch.setattr(module.ort, "get_available_providers", lambda: [module.CPU])
    patch.setattr(module, "installed_runtimes", lambda: ["onnxruntime", "onnxruntime-gpu"])


def no_driver(patch) -> None:
    def missing(name):
        raise OSError(name)

    with_driver(patch)
    patch.setattr(module.ctypes, "CDLL", missing)


def opening(patch, open_) -> None:
    """Have a model opened for CUDA by `open_`, and for the CPU as ever."""
    load = module._load
    with_driver(patch)
    patch.setattr(module, "_load", lambda model, providers, threads: open_(load, model, providers, threads))


def silently_cpu(patch) -> None:
    opening(patch, lambda load, model, providers, threads: load(model, [module.CPU], threads))


def no_node(patch) -> None:
    def open_(load, model, providers, threads):
        session = load(model, [module.CPU], threads)
        return session if providers == [module.CPU] else Session(session, [module.CUDA, module.CPU])

    opening(patch, open_)


def old_driver(patch) -> None:
    def open_(load, model, providers, threads):
        if providers == [module.CPU]:
            return load(model, providers, threads)
        raise InputError(f"{model}: ONNX Runtime cannot load this file: CUDA failure 35: the driver is too old")

    opening(patch, open_)


class Kernelless(Session):
    """A session on a GPU that the build has no kernels for."""

    def get_provider_graph_assignment_info(self):
        found = self._session.get_provider_graph_assignment_info()
        return [SimpleNamespace(ep_name=module.CUDA, get_nodes=subgraph.get_nodes) for subgraph in found]

    def run(self, *args):
        raise RuntimeError("CUDA failure 209: no kernel image is available for execution on the device ; GPU=0")


def no_kernels(patch) -> None:
    def open_(load, model, providers, threads):
        session = load(model, [module.CPU], threads)
        return session if providers == [module.CPU] else Kernelless(session, [module.CUDA, module.CPU])

    opening(patch, open_)


SABOTAGE = {
    "a build without CUDA": (
        without_cuda,
        r"build without CUDA; pip uninstall -y onnxruntime; pip install 'maekit",
    ),
    "two packages": (
        two_packages,
        "onnxruntime and onnxruntime-gpu overwrite each other's files; pip unins",
    ),
    "no driver": (no_driver, r"no NVIDIA driver here \(libcuda.so.1 is missing\); install the driver"),
    "a driver that does not start": (lambda patch: with_driver(patch, code=803), "does not start; nvidia-smi says why"),
    "no device": (lambda patch: with_driver(patch, code=100), "sees no device; check nvidia-smi and CUDA_VISIBLE"),
    "another number of devices": (with_driver, "there is no GPU number 3; this machine has 1"),
    "libraries that are missing": (silently_cpu, "the CUDA provider does not load"),
    "no node": (no_node, "takes no node of this model; use --device cpu"),
    "no kernels": (no_kernels, r"has no kernels for V100 \(compute capability 7.0\); install an older release of"),
    "an old driver": (old_driver, "CUDA failure 35: the driver is too old; update the NVIDIA driver"),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_cuda_asked_for_and_not_there_is_refused_with_the_fix(
    trained: Path, tmp_path: Path, monkeypatch, name: str
) -> None:
    """Asked for CUDA, it exits with 2 and the fix before anything is written; auto runs on the CPU and says why."""
    sabotage, said = SABOTAGE[name]
    sabotage(monkeypatch)
    device = "cuda:3" if "number" in name else "cuda"
    with raises(InputError, match=said):
        embed(embed_config(trained, tmp_path / "out", device=device))
    assert not (tmp_path / "out").exists()
    if "number" in name:
        return
    session = EncoderSession(trained / "encoder.onnx", device="auto")
    assert session.provider == module.CPU
    assert session.reason.startswith("chosen by auto: ")
    assert said.replace("\\", "").partition(";")[0][:20] in session.reason


def test_cuda_that_silently_became_cpu_is_caught(trained: Path, monkeypatch) -> None:
    """The driver is fine, the provider's libraries are not: ONNX Runtime gives a CPU session without a word."""
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers() or torch.cuda.is_available():
        pytest.skip("needs an onnxruntime-gpu whose CUDA provider cannot work")
    monkeypatch.setattr(module, "cuda_problem", lambda number: None)
    with raises(InputError, match="CUDA provider does not load"):
        EncoderSession(trained / "encoder.onnx", device="cuda")
