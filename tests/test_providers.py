"""Execution providers: asked for CUDA means on CUDA, or a refusal that says how to mend it."""

from pathlib import Path

import onnxruntime
import pytest
import torch
from models import embed_config

from maekit.embedding.run import embed
from maekit.errors import InputError


def test_cuda_asked_for_and_not_there_is_refused_with_the_fix(trained: Path, tmp_path: Path, monkeypatch) -> None:
    import maekit.embedding.providers as module
    from maekit.embedding.session import EncoderSession

    class NoDevice:
        def cuInit(self, flags):
            return 100

    for sabotage, said in (
        (lambda m: m.setattr(module.ort, "get_available_providers", lambda: [module.CPU]), r"maekit\[cuda\]"),
        (lambda m: m.setattr(module.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name))), "driver"),
        (lambda m: m.setattr(module.ctypes, "CDLL", lambda name: NoDevice()), "nvidia-smi"),
    ):
        with monkeypatch.context() as patch:
            sabotage(patch)
            with pytest.raises(InputError, match=said):
                embed(embed_config(trained, tmp_path / "out", device="cuda"))
            session = EncoderSession(trained / "encoder.onnx", device="auto")
            assert session.provider == module.CPU
            assert "auto" in session.reason


def test_cuda_that_silently_became_cpu_is_caught(trained: Path, monkeypatch) -> None:
    """The driver is fine, the provider's libraries are not: ONNX Runtime gives a CPU session without a word."""
    import maekit.embedding.providers as module
    from maekit.embedding.session import EncoderSession

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers() or torch.cuda.is_available():
        pytest.skip("needs an onnxruntime-gpu whose CUDA provider cannot work")
    monkeypatch.setattr(module, "cuda_problem", lambda number: None)
    with pytest.raises(InputError, match="CUDA provider does not load"):
        EncoderSession(trained / "encoder.onnx", device="cuda")
