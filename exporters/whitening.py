"""The whitening of an exported graph: the initializer names of matrix and bias, and how to read them back."""

from pathlib import Path
from typing import Any

import numpy as np
from onnx import numpy_helper

from maekit.vectors.whitening import Whitening

MATRIX, BIAS = "whitening.weight", "whitening.bias"


def read_whitening(proto: Any, folder: Path, about: dict[str, Any] | None) -> Whitening | None:
    """Read the whitening from an exported graph; None if it has none.

    Args:
        proto: onnx's ModelProto.
        folder: directory of its external data files.
        about: the value of `Whitening.to_json`.
    """
    if about is None:
        return None
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    matrix, bias = (np.array(numpy_helper.to_array(tensors[name], str(folder))) for name in (MATRIX, BIAS))
    return Whitening(matrix, bias, about["explained_variance"], about["images"], about["sample_sha256"])
