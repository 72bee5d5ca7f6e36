"""int8 for CPUs: static quantisation of every linear layer, in standard ONNX operators.

Each Gemm becomes QuantizeLinear -> DequantizeLinear -> Gemm over int8 weights and an int32 bias. ONNX Runtime fuses
these into one integer Gemm with float output. LayerNorm, attention, GELU, pooling, whitening and L2 stay in fp32 (Jacob
et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", section 2).

Activations have one scale per tensor, from calibration images. A row therefore does not depend on the rest of its
batch, as it would with dynamic scales. Weights have one scale per output and 7 bits: on CPUs without VNNI, ONNX Runtime
adds pairs of products in 16 bits, and products of 8-bit weights overflow them. The mean rounding error of a layer's
output is subtracted from its bias (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias
Correction", section 4.2). Otherwise all embeddings shift in one direction, and whitening magnifies the shift.
"""

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from maekit.encoder_file import INPUT
from maekit.exporters.whitening import MATRIX
from maekit.exporters.writing import new_model
from maekit.images import Pixels
from maekit.providers import open_cpu
from maekit.system.errors import InputError
from maekit.system.machine import cores

_WEIGHT_LIMIT = 63
_LEVELS = 255
_VALUES = 200_000  # sampled per tensor; enough to estimate its range
_BATCH = 2  # images; all their intermediate tensors are in memory at once: 0.3 GB for ViT-L
_MAX_BIAS = 2.0**30  # below the int32 limit, leaving room for the sum that the bias is added to

Floats = NDArray[np.float32]
Means = NDArray[np.float64]


@dataclass(frozen=True)
class Activation:
    """Quantisation parameters of a linear layer's input, and its means over the calibration images.

    Attributes:
        scale: size of one integer step.
        zero_point: the integer that represents 0.
        mean: mean of each channel, `[K]`.
        rounded_mean: mean of each channel after rounding, `[K]`.
    """

    scale: float
    zero_point: int
    mean: Means
    rounded_mean: Means


def quantize(proto: onnx.ModelProto, images: Pixels) -> onnx.ModelProto:
    """Return the graph with its linear layers in int8.

    Args:
        proto: graph of an fp32 encoder, from `to_onnx`.
        images: calibration images, uint8 `[n, H, W, 3]`.

    Raises:
        InputError: the graph has linear layers in an unknown form.
    """
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    if any(node.op_type == "MatMul" and node.input[1] in weights for node in proto.graph.node):
        raise InputError("`precision` int8: this model has blocks whose linear layers are not known here")
    # The patches are cast from uint8 to float: input of each Cast by its output.
    casts = {node.output[0]: node.input[0] for node in proto.graph.node if node.op_type == "Cast"}
    inputs = list(dict.fromkeys(node.input[0] for node in proto.graph.node if _is_linear(node, weights)))
    activations = _observe(proto, inputs, casts, images)
    nodes: list[Any] = []
    tensors: list[Any] = []
    for node in proto.graph.node:
        if not _is_linear(node, weights):
            nodes.append(node)
            continue
        name = node.input[0]
        if name in inputs:  # several layers may share one input, which is rounded once
            inputs.remove(name)
            nodes += _round_input(name, casts.get(name), activations[name], tensors)
        nodes += _integer_gemm(node, weights, activations[name], tensors)
    return _with_nodes(proto, nodes, tensors)


def best_range(values: Floats) -> tuple[float, float]:
    """Return the range whose 256 levels have the smallest mean squared rounding error over some values.

    It is the full range or a fraction of it: clipping a few outliers can cost less than coarser steps for all others.
    """
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    if low == high:
        return low, high
    errors = {}
    for part in np.linspace(0.3, 1.0, 36):
        scale = (high - low) * part / _LEVELS
        rounded = _rounded(values, scale, round(-low * part / scale))
        errors[part] = float(np.mean((rounded - values) ** 2))
    best = min(errors, key=lambda part: (errors[part], -part))
    return low * best, high * best


def _rounded(values: Floats, scale: float, zero_point: int) -> Floats:
    """Return the values after QuantizeLinear and DequantizeLinear."""
    levels = np.clip(np.rint(values / np.float32(scale)) + zero_point, 0, _LEVELS)
    rounded: Floats = ((levels - zero_point) * np.float32(scale)).astype(np.float32)
    return rounded


def _observe(
    proto: onnx.ModelProto, inputs: list[str], casts: Mapping[str, str], images: Pixels
) -> dict[str, Activation]:
    """Measure scale and means of every linear layer's input, in two passes over the images."""
    picked: dict[str, list[Floats]] = {name: [] for name in inputs}
    share = -(-_VALUES // -(-len(images) // _BATCH))
    for batch in _run(proto, inputs, images):
        for name, values in batch.items():
            flat = values.ravel()
            # Sample evenly over all channels, and always keep the extremes.
            step = max(1, len(flat) // share)
            while math.gcd(step, values.shape[-1]) > 1:
                step += 1
            picked[name] += [flat[::step].copy(), np.array([flat.min(), flat.max()])]
    steps = {name: _steps(*best_range(np.concatenate(parts))) for name, parts in picked.items()}
    steps |= dict.fromkeys(casts.keys() & inputs, (1.0, 0))  # patches are uint8 already, so this is exact
    count, sums = dict.fromkeys(inputs, 0), dict.fromkeys(inputs, np.zeros(()))
    for batch in _run(proto, inputs, images):
        for name, values in batch.items():
            both = (values, _rounded(values, *steps[name]))
            sums[name] = sums[name] + np.stack([kind.sum(axis=0, dtype=np.float64) for kind in both])
            count[name] += len(values)
    return {name: Activation(*steps[name], *(sums[name] / count[name])) for name in inputs}


def _steps(low: float, high: float) -> tuple[float, int]:
    scale = (high - low) / _LEVELS or 1.0
    return scale, int(np.clip(round(-low / scale), 0, _LEVELS))


def _run(proto: onnx.ModelProto, names: list[str], images: Pixels) -> Iterator[dict[str, Floats]]:
    """Yield the values of the named intermediate tensors by name, for each batch of images."""
    observed = onnx.ModelProto()
    observed.CopyFrom(proto)
    observed.graph.output.extend(helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names)
    with tempfile.TemporaryDirectory() as folder, new_model(Path(folder) / "observed.onnx", observed) as model:
        session = open_cpu(model.path, threads=cores()).session
        for start in range(0, len(images), _BATCH):
            yield dict(zip(names, session.run(names, {INPUT: images[start : start + _BATCH]}), strict=True))


def _is_linear(node: Any, weights: Mapping[str, Any]) -> bool:
    """Whether a node is a linear layer of the encoder; the whitening is not, and stays in fp32."""
    return node.op_type == "Gemm" and node.input[1] in weights and node.input[1] != MATRIX


def _round_input(name: str, raw: str | None, x: Activation, tensors: list[Any]) -> list[Any]:
    """Return the nodes that round a tensor; `raw` names the uint8 tensor it was cast from. Adds their initializers."""
    steps = {"scale": np.array(x.scale, np.float32), "zero_point": np.array(x.zero_point, np.uint8)}
    dequantize = _dequantize(name, steps, tensors, integers=[raw or f"{name}.integers"])
    if raw is not None:
        return [dequantize]
    integers, *scale = dequantize.input
    quantize = helper.make_node("QuantizeLinear", [name, *scale], [integers], name=f"{name}.quantize")
    return [quantize, dequantize]


def _dequantize(
    name: str, arrays: Mapping[str, Any], tensors: list[Any], *, integers: Sequence[str] = (), axis: int | None = None
) -> Any:
    """Return the node that computes `NAME.dequantized`. Adds its initializers; `integers` names inputs before them."""
    tensors += [numpy_helper.from_array(array, f"{name}.{part}") for part, array in arrays.items()]
    inputs, output = [*integers, *(f"{name}.{part}" for part in arrays)], f"{name}.dequantized"
    return helper.make_node("DequantizeLinear", inputs, [output], name=f"{name}.dequantize", axis=axis)


def _integer_gemm(node: Any, weights: Mapping[str, Any], x: Activation, tensors: list[Any]) -> list[Any]:
    """Return the nodes of one linear layer with int8 weights. Adds their initializers."""
    matrix = numpy_helper.to_array(weights[node.input[1]]).T  # [N, K] -> [K, N]
    has_bias = len(node.input) > 2 and node.input[2]
    bias = numpy_helper.to_array(weights[node.input[2]]) if has_bias else np.zeros(matrix.shape[1], np.float32)
    # The bias is an integer in units of the weight scale. Where weights are nearly 0, a minimum scale keeps the bias
    # within int32; those weights round to 0.
    shift = np.abs(bias) + np.abs(x.mean @ matrix.astype(np.float64))
    smallest = np.maximum(shift / (_MAX_BIAS * x.scale), 1e-30)
    scales = np.maximum(np.abs(matrix).max(axis=0) / _WEIGHT_LIMIT, smallest).astype(np.float32)
    integers = np.rint(matrix / scales).astype(np.int8)
    moved = x.mean @ matrix.astype(np.float64) - x.rounded_mean @ (integers * scales.astype(np.float64))
    # The bias is added to integer sums; their unit is the product of both scales.
    bias_scales = (scales * np.float32(x.scale)).astype(np.float32)
    bias_integers = np.rint((bias + moved) / bias_scales).astype(np.int32)
    nodes = []
    name = node.input[1].removesuffix(".weight")
    for kind, values, scale, axis in (("weight", integers, scales, 1), ("bias", bias_integers, bias_scales, 0)):
        arrays = {"integers": values, "scale": scale, "zero_point": np.zeros(len(scale), values.dtype)}
        nodes.append(_dequantize(f"{name}.{kind}", arrays, tensors, axis=axis))
    inputs = [f"{node.input[0]}.dequantized", *(dequantize.output[0] for dequantize in nodes)]
    return [*nodes, helper.make_node("Gemm", inputs, list(node.output), name=node.name)]


def _with_nodes(proto: onnx.ModelProto, nodes: list[Any], tensors: list[Any]) -> onnx.ModelProto:
    """Replace the nodes of a graph and add initializers; drop unused nodes and initializers."""
    used, needed = {value.name for value in proto.graph.output}, []
    for node in reversed(nodes):  # users come after what they use
        if used & set(node.output):
            needed.append(node)
            used |= set(node.input)
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    del result.graph.node[:], result.graph.initializer[:], result.graph.value_info[:]
    result.graph.node.extend(reversed(needed))
    result.graph.initializer.extend(t for t in (*proto.graph.initializer, *tensors) if t.name in used)
    return result
