"""An exported encoder in OpenVINO, on the CPU: the same file as in ONNX Runtime, compiled by another maker.

Of bf16 only the encoder is computed, up to the pooled vector: OpenVINO itself keeps everything behind the last matrix
product in float32, and a whitening is one. So a whitened file becomes two compiled models, and the second, whitening
and L2 norm, is always in float32.
"""

import functools
import importlib.metadata
import importlib.util
import io
import os
import re
import threading
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from maekit.images import Pixels
from maekit.providers import Problem
from maekit.system.errors import InputError
from maekit.system.model_file import ModelFile

# Name of the constant in the graph; exporters/whitening.py writes it.
WHITENING = "whitening.weight"
# Releases before 2026.1 do not know Attention of opset 23; 2026.1 and 2026.2 compute something else (cosine 0.7).
_LOWEST = (2026, 3)
Arithmetic = Literal["f32", "bf16"]
Rows = NDArray[np.float32]


def problem(*, bf16: bool = False) -> Problem | None:
    """Return why OpenVINO cannot run a model here, in bf16 if asked; None if it can."""
    if importlib.util.find_spec("openvino") is None:
        return Problem("OpenVINO is not installed", "pip install 'maekit[openvino]'", is_absent=True)
    if _was_started_before_fork:
        return Problem(
            "this process was forked from one that had started OpenVINO, whose threads it lacks",
            "start it by spawn, or use `runtime=onnxruntime`",
        )
    if _release() < _LOWEST:
        return Problem(f"{version()} does not compute Attention rightly", "pip install -U 'maekit[openvino]'")
    try:
        found = capabilities()
    except Exception as error:  # its libraries do not load, or it finds no CPU
        return Problem(f"OpenVINO does not start: {_said(error)}", "pip install -U 'maekit[openvino]'")
    if bf16 and "BF16" not in found:
        return Problem(
            "this processor has no bf16 arithmetic (AVX512_BF16 or AMX), and would be far slower in it than in fp32",
            "use `precision=fp32`",
        )
    return None


@functools.cache
def capabilities() -> tuple[str, ...]:
    """Return what this CPU computes natively, such as `FP32`, `BF16` and `INT8`."""
    return tuple(_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


@functools.cache
def _core() -> Any:
    import openvino

    return openvino.Core()


_was_started_before_fork = False


def _note_fork() -> None:
    """Remember in a forked child that OpenVINO would hang there: its scheduler waits for threads of the parent."""
    global _was_started_before_fork
    _was_started_before_fork = _was_started_before_fork or _core.cache_info().currsize > 0


os.register_at_fork(after_in_child=_note_fork)


def is_faster() -> bool:
    """Whether OpenVINO is expected to be faster here than ONNX Runtime, as on processors with AVX-512.

    Measured: 1.06 to 1.19 times as fast, but 0.92 for one small model in fp32 (docs/export.md).
    """
    try:
        return "avx512f" in Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return False


def version() -> str:
    """Return the name and version of OpenVINO, as commit records state them."""
    return f"openvino {importlib.metadata.version('openvino')}"


def _release() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version("openvino"))[:2])


def _said(error: BaseException) -> str:
    """Return the last line of an error, which says what is wrong; those before name places in OpenVINO's source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


class OpenVinoModel:
    """A compiled encoder. May be called from several threads at once.

    Args:
        model: the file, as it was read.
        precision: arithmetic of the encoder, `f32` or `bf16`.
        threads: threads of one call.
        calls: calls that may run at a time; each has its own threads.

    Attributes:
        nodes: number of operations in the file, before OpenVINO's own optimisation.
        metadata: the metadata of the ONNX file.

    Raises:
        InputError: OpenVINO cannot load the file.
    """

    def __init__(self, model: ModelFile, *, precision: Arithmetic, threads: int, calls: int) -> None:
        if model.external:
            raise InputError(
                f"{model.path} keeps weights in a second file, which OpenVINO would read anew, unchecked; "
                "use `runtime=onnxruntime`"
            )
        options = {
            "INFERENCE_PRECISION_HINT": precision,  # its own default is bf16 where the processor has it
            "INFERENCE_NUM_THREADS": threads * calls,
            "NUM_STREAMS": calls,
            # Threads stay free to move: decoding shares the cores.
            "ENABLE_CPU_PINNING": False,
        }
        try:
            graph = _core().read_model(io.BytesIO(model.content))
            self.nodes = len(graph.get_ops())
            self.metadata = {name: str(value.value) for name, value in _framework(graph).items()}
            parts = [graph] if precision == "f32" else _split_at_whitening(graph)
            hints: list[Arithmetic] = [precision, "f32"]
            self._parts = [
                _core().compile_model(part, "CPU", {**options, "INFERENCE_PRECISION_HINT": hint})
                for part, hint in zip(parts, hints, strict=False)
            ]
        except RuntimeError as error:
            raise InputError(f"{model.path}: OpenVINO cannot load this file: {_said(error)}") from error
        self._own = threading.local()

    def __call__(self, images: Pixels) -> Rows:
        """Run a batch: uint8 `[B, H, W, 3]` -> float32 `[B, dim]`.

        Raises:
            RuntimeError: OpenVINO failed.
        """
        if not hasattr(self._own, "requests"):
            self._own.requests = [part.create_infer_request() for part in self._parts]
        value: Any = images
        for request in self._own.requests:
            value = request.infer({0: value}, share_inputs=True)[0]  # read in place; what comes out is a copy
        rows: Rows = value
        return rows


def _framework(graph: Any) -> dict[str, Any]:
    """Return the metadata of the ONNX file that OpenVINO keeps with a graph."""
    about = graph.get_rt_info()
    if "framework" not in about:  # it has no `get`
        return {}
    found: dict[str, Any] = about["framework"]
    return found


def _split_at_whitening(graph: Any) -> list[Any]:
    """Return the graph as two, images -> pooled vector and pooled vector -> embedding; unwhitened, as it is."""
    import openvino

    if _whitening(graph) is None:
        return [graph]
    encoder, head = graph.clone(), graph.clone()
    pooled = _whitening(encoder).input(0).get_source_output()
    product = _whitening(head)
    parameter = openvino.opset13.parameter(pooled.partial_shape, np.float32, name="pooled")
    product.input(0).replace_source_output(parameter.output(0))
    return [
        openvino.Model([pooled], encoder.get_parameters(), "encoder"),
        openvino.Model(head.get_results(), [parameter], "head"),
    ]


def _whitening(graph: Any) -> Any:
    """Return the matrix product of the whitening, or None if the graph has none."""
    node = next((node for node in graph.get_ops() if node.get_friendly_name() == WHITENING), None)
    while node is not None and node.get_type_name() != "MatMul":  # a transposition may stand between
        users = list(node.output(0).get_target_inputs())
        node = users[0].get_node() if users else None
    return node
