"""Traces the module to an ONNX graph with PyTorch's exporter, and strips local paths from the graph."""

import io
import logging
import warnings
from collections import Counter
from contextlib import redirect_stdout

import onnx
import torch

from maekit.encoder_file import INPUT
from maekit.exporters.graph import EmbeddingModule
from maekit.images import Pixels


def to_onnx(module: EmbeddingModule, images: Pixels, *, opset: int, output: str) -> onnx.ModelProto:
    """Trace the module and return its graph; the batch is the only dynamic dimension.

    Args:
        module: the module, in evaluation mode.
        images: two or more, uint8 `[B, H, W, 3]`.
        opset: opset of the graph.
        output: name of the graph's output.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # the exporter prints its progress
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            (torch.from_numpy(images[:2]),),
            dynamo=True,
            opset_version=opset,
            input_names=[INPUT],
            output_names=[output],
            dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
            external_data=False,
            verbose=False,
        )
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    # The exporter records each node's source location: local paths, useless to anyone who runs the file.
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for part in (proto, proto.graph, *proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        del part.metadata_props[:]
    return proto


def node_census(proto: onnx.ModelProto) -> dict[str, int]:
    """Return the number of nodes per operator, most frequent first."""
    counts = Counter(node.op_type for node in proto.graph.node)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
