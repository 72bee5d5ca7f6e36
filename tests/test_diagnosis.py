"""`maekit doctor`: what works is found to work, and each thing that is broken here on purpose is found and mended."""

import dataclasses
import functools
import json
import math
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from support.errors import raises
from support.shards import write_shard

from maekit import diagnosis as module
from maekit import providers
from maekit.config.check import DoctorConfig
from maekit.diagnosis import Diagnosis, Finding, doctor
from maekit.providers import CPU, CUDA, Opened, Problem
from maekit.system.errors import InputError

pytestmark = pytest.mark.whole

LOOK = """
import json, sys
from maekit.diagnosis import doctor
from maekit.config.check import DoctorConfig
print(json.dumps(doctor(DoctorConfig()).summary()))
assert "torch" not in sys.modules
"""
STUB = """
#include <string.h>
int cuInit(unsigned flags) { return FAILURE; }
int cuDriverGetVersion(int *version) { *version = 12040; return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int number) { *device = number; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "NVIDIA Stub", size); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = 24000000000; return 0; }
int cuGetErrorString(int code, const char **said) { *said = "system has unsupported display driver"; return 0; }
"""
GPU = module._Driver("580.1", "13.0", (("NVIDIA Stub", 24 * 10**9),))


def of(diagnosis: Diagnosis, subject: str) -> Finding:
    (finding,) = [finding for finding in diagnosis.findings if finding.subject == subject]
    return finding


def look(cwd: Path, **environment: str) -> dict[str, dict[str, str]]:
    """Examine in a fresh process; return what was found, by subject, with what is a problem."""
    ran = subprocess.run(
        [sys.executable, "-c", LOOK],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    summary = json.loads(ran.stdout.splitlines()[-1])
    found = {row["subject"]: dict(row) for row in summary["findings"]}
    for row in summary["problems"]:
        found[row["subject"]] |= row
    return found


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command in this process and return its exit code."""
    from maekit.cli.app import main

    monkeypatch.setattr(sys, "argv", ["maekit", "doctor", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_this_machine() -> None:
    """ONNX Runtime works here, having run; rates are measured, and the limit is below both of its parts."""
    diagnosis = doctor()
    for subject in ("ONNX Runtime", "CPU provider"):
        assert of(diagnosis, subject).problem is None
    assert of(diagnosis, "CPU provider").value.startswith("works: ran ")
    assert diagnosis.rates == {}


def test_rates_of_a_model_and_real_images(trained: Path) -> None:
    """The limit lies below both of its parts, as they share the cores; without images the session is measured alone."""
    config = DoctorConfig(trained / "encoder.onnx", (trained / "shards",), seconds=0.05)
    rates = doctor(config).rates
    decode, session, limit = (float(rates[key]) for key in ("decode_all_cores", "session", "limit"))
    assert 0 < limit < min(decode, session)
    assert limit > min(decode, session) / 2.01
    assert float(rates["decode_one_core"]) > 0
    alone = doctor(DoctorConfig(trained / "encoder.onnx", seconds=0.05)).rates
    assert set(alone) == {"cores", "model", "batch_size", "session"}
    assert alone["model"] == rates["model"] == "encoder.onnx at 32 x 32"


def test_the_command_and_its_json(trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "encoder.onnx", tmp_path)
    ran = subprocess.run(
        [sys.executable, "-m", "maekit", "doctor", "encoder.onnx", str(trained / "shards"), "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    summary = json.loads(ran.stdout.splitlines()[-1])
    assert list(summary) == ["problems", "findings", "rates"]
    assert ran.returncode == bool(summary["problems"])
    assert ran.stderr == ""
    assert {"model", "cores", "batch_size", "decode_one_core", "decode_all_cores", "session", "limit"} == set(
        summary["rates"]
    )
    for row in summary["findings"]:
        assert f"{row['subject']}  " in ran.stdout  # the table is there as well
    assert str(tmp_path) in ran.stdout
    assert "images per second" in ran.stdout


def test_without_a_model_nothing_is_measured(monkeypatch, capsys) -> None:
    run_main(monkeypatch, "--json")
    *lines, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["rates"] == {}
    assert not any("images per second" in line for line in lines)


def test_shards_without_an_image_are_refused(trained: Path, make_shards) -> None:
    write_shard(folder := trained.parent / "empty" / "0.tar", {"a": {"txt": b"1"}})
    with raises(InputError, match="no image to measure"):
        doctor(DoctorConfig(trained / "encoder.onnx", (folder,)))
    with raises(InputError, match="name the file"):
        doctor(DoctorConfig(shards=(folder,)))


def test_two_runtimes_are_a_problem_with_its_command(monkeypatch, tmp_path: Path, capsys) -> None:
    (real,) = providers.installed_runtimes()
    other = "onnxruntime" if real == "onnxruntime-gpu" else "onnxruntime-gpu"
    folder = tmp_path / f"{other.replace('-', '_')}-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {other}\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(module, "doctor", lambda config: doctor(DoctorConfig(config.model)))
    assert run_main(monkeypatch, "--json") == 1
    *lines, last = capsys.readouterr().out.splitlines()
    fix = f"pip uninstall -y {' '.join(sorted([real, other]))}; pip install 'maekit[cuda]'"
    (number,) = [number for number, line in enumerate(lines) if line.startswith("problem  ONNX Runtime: ")]
    assert "overwrite each other" in lines[number]
    assert lines[number + 1] == f"    fix  {fix}"
    assert fix in [problem["fix"] for problem in json.loads(last)["problems"]]


@pytest.mark.parametrize("code", ["raise ImportError('libfoo.so.1: cannot open')", ""], ids=["raises", "empty"])
def test_an_onnxruntime_that_does_not_load(tmp_path: Path, code: str) -> None:
    """Removing one of two distributions leaves such an empty module behind."""
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text(code)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = look(tmp_path, PYTHONPATH=path)
    assert "import onnxruntime fails" in found["ONNX Runtime"]["problem"]
    assert found["ONNX Runtime"]["fix"].startswith("pip uninstall -y onnxruntime onnxruntime-gpu; pip install ")
    assert "problem" not in found["Python"]
    assert "CPU provider" not in found


class OffByOne:
    """A session whose numbers are right but for the first."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session

    def run(self, names: None, inputs: dict[str, NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        (numbers,) = self._session.run(names, inputs)
        numbers.flat[0] += 0.02 * abs(numbers).max()
        return [numbers]


def test_wrong_numbers_are_a_problem(monkeypatch) -> None:
    open_cpu = providers.open_cpu

    def opened(model: bytes, **options: int) -> Opened:
        right = open_cpu(model, **options)
        return dataclasses.replace(right, session=OffByOne(right.session))

    monkeypatch.setattr(providers, "open_cpu", opened)
    finding = of(doctor(), "CPU provider")
    assert finding.problem == f"{CPU} gives wrong numbers"
    assert str(finding.fix).startswith("pip install --force-reinstall")


def test_a_provider_that_fails_while_running_is_a_problem(monkeypatch) -> None:
    class Torn:
        def run(self, *_: object) -> list[object]:
            raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : CUBLAS failure 13\nmore")

    monkeypatch.setattr(providers, "cuda_problem", lambda number=0: None)
    monkeypatch.setattr(providers, "open_cuda", lambda *_, **__: Opened(Torn(), CUDA, (CUDA, CPU), {CUDA: 1}))
    finding = module._cuda_provider(GPU, "13.0")
    assert finding.problem == "[ONNXRuntimeError] : 1 : FAIL : CUBLAS failure 13"
    assert finding.fix


def test_cuda_that_is_listed_but_does_not_load(monkeypatch) -> None:
    """Where no GPU is, the real provider is made to load, which it cannot."""
    if module._driver().cuda or CUDA not in onnxruntime.get_available_providers():
        problem = Problem("the CUDA provider does not load (libcublas.so.13)", "pip install 'maekit[cuda]'")
        monkeypatch.setattr(providers, "open_cuda", lambda *_, **__: Opened(None, CPU, (CPU,), {}, problem))
    monkeypatch.setattr(providers, "cuda_problem", lambda number=0: None)
    finding = of(doctor(DoctorConfig()), "CUDA provider")
    assert "the CUDA provider does not load (lib" in str(finding.problem)
    assert "maekit[cuda]" in str(finding.fix)


def test_a_gpu_without_cuda_in_the_runtime_is_a_problem_and_no_gpu_is_none(monkeypatch) -> None:
    problem = Problem("this onnxruntime is a build without CUDA", "pip install 'maekit[cuda]'")
    monkeypatch.setattr(providers, "cuda_problem", lambda number=0: problem)
    finding = module._cuda_provider(GPU, "13.0")
    assert (finding.problem, finding.fix) == (problem.what, problem.fix)
    for driver in (module._Driver(), module._Driver(cuda="12.4", code=100)):
        assert module._cuda_provider(driver, "").problem is None


@pytest.fixture
def stub(tmp_path: Path) -> Callable[[int], str]:
    """Return a function that makes a driver whose start gives a code; its CUDA is 12.4, and it has two GPUs."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler")

    def make(code: int) -> str:
        (tmp_path / "stub.c").write_text(STUB)
        flags = ["-shared", "-fPIC", f"-DFAILURE={code}", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so.1"]
        subprocess.run([compiler, *flags, "stub.c"], cwd=tmp_path, check=True)
        return str(tmp_path)

    return make


def test_a_driver_that_is_too_old(stub, tmp_path: Path) -> None:
    if not onnxruntime.cuda_version or int(onnxruntime.cuda_version.split(".")[0]) < 13:
        pytest.skip("needs an ONNX Runtime for CUDA 13")
    found = look(tmp_path, LD_LIBRARY_PATH=stub(0))
    assert found["NVIDIA GPU"]["value"] == "2 x NVIDIA Stub, 24.0 GB each"
    assert "problem" not in found["NVIDIA GPU"]
    assert "CUDA up to 12.4" in found["NVIDIA driver"]["value"]
    assert "ends at 12.4" in found["CUDA provider"]["problem"]
    assert found["CUDA provider"]["fix"] == "update the NVIDIA driver to one for CUDA 13"
    assert "problem" not in found["CPU provider"]


def test_a_driver_that_does_not_start(stub, tmp_path: Path) -> None:
    found = look(tmp_path, LD_LIBRARY_PATH=stub(803))
    assert "error 803, system has unsupported display driver" in found["NVIDIA GPU"]["problem"]
    assert "reboot" in found["NVIDIA GPU"]["fix"]


def test_no_driver_is_a_problem_only_where_a_card_is(monkeypatch) -> None:
    no_device = module._Driver(cuda="13.0", code=100)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for driver in (module._Driver(), no_device):
        assert module._no_gpu(driver, 0) == Finding("NVIDIA GPU", "none here")
        assert "--gpus all" in str(module._no_gpu(driver, 1).fix)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert module._no_gpu(no_device, 1).problem is None


@pytest.mark.parametrize(
    ("code", "out", "said"),
    [
        (0, "True 13.0 ", None),
        (0, "some library's remark\nFalse None ", "without CUDA"),
        (0, "False 13.0 ", "built for CUDA 13.0"),
        (0, "True 13.0 torch 2.11 has no kernels for V100; pip install another", "no kernels for V100"),
        (1, "", "OSError: libc10.so"),
    ],
)
def test_torch_beside_a_gpu(monkeypatch, code: int, out: str, said: str | None) -> None:
    ran = subprocess.CompletedProcess([], code, out, "Traceback\nOSError: libc10.so")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ran)
    finding = module._torch(GPU)
    assert (said is None and finding.problem is None) or str(said) in str(finding.problem)
    assert bool(finding.fix) == bool(said)


def test_little_shared_memory(monkeypatch, tmp_path: Path) -> None:
    if sys.platform == "linux":
        assert "--shm-size" in str(module._shared_memory(tmp_path / "none").fix)
    usage = type(shutil.disk_usage(tmp_path))
    for total, free, fix in ((64 << 20, 64 << 20, "--shm-size=8g"), (8 << 30, 1 << 20, "see what lies in")):
        room = usage(total, total - free, free)
        monkeypatch.setattr(shutil, "disk_usage", functools.partial(lambda room, _: room, room))
        finding = module._shared_memory(tmp_path)
        assert "too little" in str(finding.problem)
        assert fix in str(finding.fix)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(8 << 30, 0, 8 << 30))
    assert module._shared_memory(tmp_path).problem is None


def test_disks_that_are_full_or_cannot_be_written(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MAEKIT_CACHE", "/proc/maekit")
    monkeypatch.chdir(tmp_path)
    here, _, cache = module._disks()
    assert "/proc/maekit cannot be written" in str(cache.problem)
    assert "MAEKIT_CACHE" in str(cache.fix)
    assert here.value.endswith(f"free in {tmp_path}")
    assert list(tmp_path.iterdir()) == []
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12 - 10**8, 10**8))
    assert "only 100.0 MB free" in str(module._disks()[0].problem)


def test_a_disk_that_takes_no_write(tmp_path: Path) -> None:
    """A quota shows only in writing: the file can be made, and no byte of it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        finding = module._disk("disk", lambda: tmp_path, "the fix")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in str(finding.problem)
    assert finding.fix == "the fix"


def test_few_open_files() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, limits[1]))
        finding = module._open_files()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert "512 at most" in str(finding.problem)
    assert "ulimit" in str(finding.fix)


def test_a_quota_of_cpu_time_is_said(monkeypatch) -> None:
    monkeypatch.setattr(module, "cpu_quota", lambda: math.inf)
    assert module._cores("CPU").value.endswith("cores")
    monkeypatch.setattr(module, "cpu_quota", lambda: 0.5)
    monkeypatch.setattr(module, "cores", lambda: 1)
    assert module._cores("CPU").value.endswith("cores, quota 0.5: maekit uses 1")


def test_a_model_that_is_none_exits_2_before_any_work(monkeypatch, tmp_path: Path, capsys) -> None:
    with raises(InputError, match="no such file"):
        doctor(DoctorConfig(str(tmp_path / "none.onnx")))
    (tmp_path / "some.onnx").write_bytes(b"not an onnx file")
    assert run_main(monkeypatch, str(tmp_path / "some.onnx")) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1


def test_help_has_no_markup_left(monkeypatch, capsys) -> None:
    assert run_main(monkeypatch, "--help") == 0
    assert "ENCODER.ONNX" in (said := capsys.readouterr().out)
    assert "[/" not in said
