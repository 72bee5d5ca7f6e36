"""Autoencoders of every kind, and a tokenizer for them."""

from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper

from maekit.config import ModelConfig
from maekit.mae.autoencoder import MaskedAutoencoder, build_autoencoder

SIZES = {
    "name": "vit_tiny_patch16_224",
    "image_size": (32, 48),
    "patch_size": 8,
    "width": 48,
    "depth": 3,
    "heads": 3,
    "decoder_width": 32,
    "decoder_depth": 2,
    "decoder_heads": 4,
}


PATCHES = 24


def build(**changes) -> MaskedAutoencoder:
    """Build a tiny autoencoder with nothing trivial in it: norms and biases are disturbed."""
    config = ModelConfig(**{**SIZES, **changes})
    config.validate()
    model = build_autoencoder(config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return model


def brightness_tokenizer(path: Path, *, size=(32, 48), first: str = "last", dtype=TensorProto.UINT8, batch="batch"):
    """Write a tokenizer whose token of a patch is its mean, in steps of 32 levels; at half the size, its patch is 4."""
    height, width = size
    rows, columns = 4, 6
    shape = [batch, 3, height, width] if first == "first" else [batch, height, width, 3]
    nodes = [helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT)]
    if first != "first":
        nodes.append(helper.make_node("Transpose", ["x"], ["y"], perm=[0, 3, 1, 2]))
    side = [height // rows, width // columns]
    scale = 32.0 if dtype == TensorProto.UINT8 else 32 / 255
    nodes += [
        helper.make_node(
            "AveragePool", ["x" if first == "first" else "y"], ["pooled"], kernel_shape=side, strides=side
        ),
        helper.make_node("ReduceMean", ["pooled", "axis"], ["mean"], keepdims=0),
        helper.make_node("Div", ["mean", "scale"], ["steps"]),
        helper.make_node("Cast", ["steps"], ["tokens"], to=TensorProto.INT64),
    ]
    constants = [
        helper.make_tensor("axis", TensorProto.INT64, [1], [1]),
        helper.make_tensor("scale", TensorProto.FLOAT, [], [scale]),
    ]
    graph = helper.make_graph(
        nodes,
        "brightness",
        [helper.make_tensor_value_info("images", dtype, shape)],
        [helper.make_tensor_value_info("tokens", TensorProto.INT64, [batch, rows, columns])],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path
