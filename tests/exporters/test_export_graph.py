"""The graph: every size, pooling, precision and opset against timm's own forward pass, and what nodes it has."""

import itertools
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from support.errors import raises
from torch.nn import functional

from maekit.config import IMAGENET_MEAN, IMAGENET_STD
from maekit.exporters.graph import EmbeddingModule, check_exportable
from maekit.exporters.quantization import best_range, quantize
from maekit.exporters.trace import node_census, to_onnx
from maekit.exporters.whitening import read_whitening
from maekit.images import Preprocess
from maekit.pretrained.load import TrainedEncoder
from maekit.pretrained.torch_embedder import reference_embeddings
from maekit.system.errors import InputError
from maekit.vectors.whitening import Whitening

PREPROCESS = Preprocess.for_size((32, 32), IMAGENET_MEAN, IMAGENET_STD)
# What the encoder of a file may differ from PyTorch by: the least cosine of any image, and the largest difference.
CLOSE = {"fp32": (1 - 1e-6, 1e-5), "fp16": (0.9999, 2e-2), "int8": (0.99, 0.2)}


def vit(name: str = "vit_tiny_patch16_224", **arguments):
    """A ViT of timm at 32 pixels, of two blocks; no weight is left at the zero or one that it starts with."""
    settings = {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 0, **arguments}
    encoder = timm.create_model(name, **settings).eval()
    for number, parameter in enumerate(encoder.parameters()):
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    return encoder


def pictures(count: int, size: int = 32) -> np.ndarray:
    """Smooth ones, as real images are: neighbouring pixels are alike."""
    noise = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(count))
    smooth = functional.interpolate(noise, (size, size), mode="bicubic").clamp(0, 1)
    return (smooth * 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


def oracle(encoder, images: np.ndarray, pool: str, *, normalize: bool = True) -> np.ndarray:
    """Embeddings by timm's forward pass, in double precision."""
    double = timm_copy(encoder).double()
    mean, std = (torch.tensor(v).double().view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        tokens = double.forward_features((torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255 - mean) / std)
    patches = tokens[:, encoder.num_prefix_tokens :]
    spread = patches.std(1, correction=0)
    by_name = {"avg": patches.mean(1), "cls": tokens[:, 0], "std": spread, "tokens": patches}
    by_name["avg2x2"] = (
        functional.adaptive_avg_pool2d(patches.transpose(1, 2).unflatten(2, encoder.patch_embed.grid_size), 2)
        .permute(0, 2, 3, 1)
        .flatten(1)
    )  # [B, N, D] -> [B, D, rows, columns] -> [B, 4·D]
    rows = torch.cat([by_name[name] for name in pool.split("+")], dim=-1)
    return (rows / rows.norm(dim=-1, keepdim=True) if normalize else rows).numpy()


def timm_copy(encoder):
    import copy

    return copy.deepcopy(encoder)


def export(encoder, *, opset: int = 23, precision: str = "fp32", **options) -> onnx.ModelProto:
    module = EmbeddingModule(encoder, PREPROCESS, opset=opset, half=precision == "fp16", **options).eval()
    proto = to_onnx(module, pictures(2), opset=opset, output="embeddings")
    return quantize(proto, pictures(32)) if precision == "int8" else proto


def run(proto: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})[0]


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


POOLINGS = ("avg", "cls", "avg+cls", "avg+std", "avg2x2", "tokens")
# Each size meets each precision, each pooling each opset; all combinations are in bench/export_parity.py.
MATRIX = [
    (size, POOLINGS[(number + number // 6) % 6], precision, (23, 20)[number // 6])
    for number, (size, precision) in enumerate(
        itertools.product(("tiny", "small", "base", "large"), ("fp32", "fp16", "int8"))
    )
]


@pytest.mark.parametrize(("size", "pool", "precision", "opset"), MATRIX)
def test_the_graph_equals_timm(size: str, pool: str, precision: str, opset: int) -> None:
    encoder = vit(f"vit_{size}_patch16_224")
    proto = export(encoder, pool=pool, precision=precision, opset=opset)
    onnx.checker.check_model(proto, full_check=True)
    images = pictures(5)
    expected = oracle(encoder, images, pool)
    least, largest = CLOSE[precision]
    for batch in (images, images[:1]):
        got = run(proto, batch)
        assert got.dtype == np.float32
        assert cosines(got, expected[: len(batch)]).min() >= least
        assert np.abs(got - expected[: len(batch)]).max() <= largest * np.abs(expected).max()
    census = node_census(proto)
    assert not {"Shape", "Expand", "Concat"} & set(census) - ({"Concat"} if "+" in pool else set())
    assert (census.get("Attention", 0), census.get("Softmax", 0)) == ((2, 0) if opset == 23 else (0, 2))
    assert {entry.version for entry in proto.opset_import if not entry.domain} == {opset}


@pytest.mark.parametrize(("size", "depth"), [("tiny", 12), ("large", 24)])
def test_census_of_each_size(size: str, depth: int) -> None:
    """Six Gemms, two LayerNorms, two sums, one attention and one GELU a block, and a dozen nodes around them."""
    proto = export(vit(f"vit_{size}_patch16_224", depth=depth, embed_dim=64, num_heads=2))
    blocks = {"Gemm": 6 * depth + 1, "LayerNormalization": 2 * depth + 1, "Add": 2 * depth + 1}
    around = ("Cast", "Clip", "Div", "Pad", "Pow", "ReduceMean", "ReduceSum", "Slice", "Sqrt", "Transpose")
    census = node_census(proto)
    assert census.pop("Reshape") == 4 * depth + 5
    assert census == {**blocks, "Attention": depth, "Gelu": depth, **dict.fromkeys(around, 1)}


def test_three_inputs_of_attention_are_matrices_of_tokens() -> None:
    proto = onnx.shape_inference.infer_shapes(export(vit()))
    shapes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in proto.graph.value_info}
    attention = [node for node in proto.graph.node if node.op_type == "Attention"]
    assert [shapes[name][1:] for node in attention for name in node.input] == [[17, 192]] * 6
    assert {len(node.output) for node in attention} == {1}


VARIANTS = {
    "registers, LayerScale": {"reg_tokens": 4, "init_values": 1e-1, "no_embed_class": True},
    "no class token": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "normalised queries and keys": {"qk_norm": True},
    "normalised attention": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "normalised before the blocks": {"pre_norm": True},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "no positions": {"pos_embed": "none"},
    "other blocks": {"block_fn": timm.models.vision_transformer.ParallelScalingBlock},
    "normalised after": {"block_fn": timm.models.vision_transformer.ResPostBlock, "init_values": 1e-1},
    "embeddings normalised": {"embed_norm_layer": torch.nn.LayerNorm},
    "wide and high": {"img_size": (32, 48)},
    "an odd grid": {"img_size": (24, 40)},
}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_other_vits_of_timm(variant: str) -> None:
    encoder = vit(**VARIANTS[variant])
    height, width = encoder.patch_embed.img_size
    preprocess = Preprocess.for_size((height, width), IMAGENET_MEAN, IMAGENET_STD)
    images = pictures(3, 48)[:, :height, :width].copy()
    pool = "avg+std+avg2x2"
    proto = to_onnx(EmbeddingModule(encoder, preprocess, pool=pool).eval(), images, opset=23, output="embeddings")
    np.testing.assert_allclose(run(proto, images), oracle(encoder, images, pool), atol=2e-6)


LAYERED = ["avg@1", "avg@2", "avg@1:pre", "cls@1:pre", "avg:pre", "std@1+avg2x2@2:pre", "avg@1+avg@2+avg:pre"]


def layered_oracle(encoder, images: np.ndarray, pool: str) -> np.ndarray:
    """By hooks on the blocks of timm's model, in double precision."""
    double, outputs = timm_copy(encoder).double(), []
    hooks = [block.register_forward_hook(lambda block, given, out: outputs.append(out)) for block in double.blocks]
    mean, std = (torch.tensor(v).double().view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        double((torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255 - mean) / std)
        for hook in hooks:
            hook.remove()
        rows = []
        for part in pool.split("+"):
            name, _, layer = part.removesuffix(":pre").partition("@")
            tokens = outputs[int(layer or len(outputs)) - 1]
            tokens = tokens if part.endswith(":pre") else double.norm(tokens)
            patches = tokens[:, encoder.num_prefix_tokens :]
            grid = patches.unflatten(1, encoder.patch_embed.grid_size)
            quarters = [grid[:, r : r + 2, c : c + 2].mean((1, 2)) for r in (0, 2) for c in (0, 2)]
            by_name = {"avg": patches.mean(1), "cls": tokens[:, 0], "std": (patches.var(1, correction=0) + 1e-6).sqrt()}
            rows.append(torch.cat(quarters, 1) if name == "avg2x2" else by_name[name])
    rows = torch.cat(rows, 1)
    return (rows / rows.norm(dim=1, keepdim=True)).numpy()


@pytest.mark.parametrize("pool", LAYERED)
@pytest.mark.parametrize(
    "variant", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg", "fc_norm": False}]
)
def test_layers_are_the_outputs_of_the_blocks(pool: str, variant: dict) -> None:
    """Of the exported file, and of PyTorch's reference; the graph ends at the last layer that is taken."""
    if "cls" in pool and "class_token" in variant:
        pytest.skip("there is no class token")
    encoder = vit(depth=3, **variant)
    preprocess, images = Preprocess.for_size((32, 32), IMAGENET_MEAN, IMAGENET_STD), pictures(3)
    proto = to_onnx(EmbeddingModule(encoder, preprocess, pool=pool).eval(), images, opset=23, output="embeddings")
    wanted = layered_oracle(encoder, images, pool)
    np.testing.assert_allclose(run(proto, images), wanted, atol=2e-6)
    trained = TrainedEncoder(encoder, "vit_tiny_patch16_224", preprocess, {}, {})
    np.testing.assert_allclose(reference_embeddings(trained, images, pool=pool), wanted, atol=2e-6)
    blocks = 3 if ":pre" in pool.replace("@1:pre", "").replace("@2:pre", "") else 2 if "@2" in pool else 1
    assert node_census(proto)["Attention"] == blocks


def test_no_such_layer() -> None:
    with pytest.raises(InputError, match=r"`pool` avg@3: this model has 2 blocks"):
        check_exportable(vit(), "avg@1+avg@3")


def test_fc_norm_is_applied_after_pooling() -> None:
    """As timm does it in models that it pools by average: there the norm after the blocks is none."""
    encoder = vit(global_pool="avg")
    images = pictures(3)
    got = run(export(encoder, normalize=False), images)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        wanted = encoder((torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        tokens = encoder.forward_features((torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std)
        last = encoder.fc_norm(tokens[:, [1 + 10, 1 + 11, 1 + 14, 1 + 15]].mean(1))  # rows and columns 2 and 3 of 4 x 4
    quarters = run(export(encoder, pool="avg2x2", normalize=False), images)
    np.testing.assert_allclose(quarters[:, -192:], last, rtol=1e-4, atol=1e-5)


def test_models_that_are_refused() -> None:
    for encoder, pool, said in (
        (timm.create_model("eva02_tiny_patch14_224"), "avg", "class Eva is not known"),
        (vit(in_chans=2), "avg", "other than one or three channels"),
        (vit(class_token=False, global_pool="avg"), "cls", "--pool cls: this model has no class token; use --pool avg"),
        (vit(class_token=False, global_pool="avg"), "avg+cls", "no class token"),
        (vit(global_pool="avg"), "avg+std", "normalises behind its pooling"),
        (vit(patch_size=5), "avg", "32 x 32, which its patches do not divide"),
        (vit(patch_drop_rate=0.5), "avg", "drops patches"),
    ):
        with raises(InputError, match=said):
            check_exportable(encoder, pool)


def test_int8_rows_do_not_depend_on_their_batch() -> None:
    proto = export(vit(), precision="int8")
    images = pictures(7)
    alone = np.concatenate([run(proto, images[i : i + 1]) for i in range(7)])
    np.testing.assert_allclose(run(proto, images), alone, atol=1e-6)


def test_int8_holds_integers() -> None:
    """Every linear layer, that of the patches included: 7-bit weights, one scale an output; none stays in fp32."""
    encoder = vit()
    proto = export(encoder, precision="int8")
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    weights = {name: array for name, array in tensors.items() if name.endswith("weight.integers")}
    assert len(weights) == 13
    assert all(array.dtype == np.int8 and np.abs(array).max(axis=0).min() == 63 for array in weights.values())
    assert max(a.size for a in tensors.values() if a.dtype == np.float32) <= 17 * 192  # the positions
    embedding = tensors["embedding.weight.integers"] * tensors["embedding.weight.scale"]
    want = encoder.patch_embed.proj.weight.detach().permute(2, 3, 1, 0) / 255 / torch.tensor(IMAGENET_STD).view(3, 1)
    np.testing.assert_allclose(
        embedding, want.reshape(192, 192), atol=tensors["embedding.weight.scale"].max() / 2 + 1e-7
    )


def test_int8_is_right_on_average() -> None:
    """The biases take back what rounding moves all embeddings by."""
    encoder = vit(depth=4)
    images = pictures(64)
    moved = run(export(encoder, precision="int8", normalize=False), images) - oracle(
        encoder, images, "avg", normalize=False
    )
    assert np.linalg.norm(moved.mean(0)) < 0.5 * np.linalg.norm(moved, axis=1).mean()


def test_best_range() -> None:
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    low, high = best_range(values)
    assert values.min() <= low < -3
    assert 3 < high <= values.max()
    assert best_range(np.zeros(5, np.float32)) == (0.0, 0.0)
    # Among values that are all alike in size, none may be cut off.
    assert best_range(np.linspace(-1, 2, 3001, dtype=np.float32)) == pytest.approx((-1, 2))
    # One outlier is worth less than finer steps for all others.
    assert best_range(np.append(values, np.float32(12)))[1] < 12


def test_whitening_in_the_graph(tmp_path: Path) -> None:
    """Behind the pooling and before the L2 norm, one Gemm more; and it can be read back from the file."""
    encoder = vit()
    random = np.random.default_rng(0)
    whitening = Whitening(
        random.standard_normal((5, 192)).astype(np.float32), random.standard_normal(5).astype(np.float32), 0.9, 10, "0f"
    )
    images = pictures(3)
    rows = oracle(encoder, images, "avg", normalize=False) @ whitening.matrix.T + whitening.bias
    for precision, least in (("fp32", 1 - 1e-6), ("fp16", 0.999), ("int8", 0.95)):
        proto = export(encoder, whitening=whitening, precision=precision)
        assert cosines(run(proto, images), rows).min() >= least
        assert node_census(proto)["Gemm"] == 6 * 2 + 2
        back = read_whitening(proto, tmp_path, whitening.to_json())
        assert back is not None
        np.testing.assert_array_equal(back.matrix, whitening.matrix)
        np.testing.assert_array_equal(back.bias, whitening.bias)


def test_openvino_gives_the_same_numbers(tmp_path: Path, python: list[str]) -> None:
    """Another runtime, from another maker: standard operators are enough for it."""
    encoder = vit()
    images = pictures(3)
    np.save(tmp_path / "images.npy", images)
    protos = {}
    for precision, opset in itertools.product(("fp32", "int8"), (23, 20)):
        name = f"{precision}-{opset}"
        protos[name] = export(encoder, precision=precision, opset=opset)
        onnx.save(protos[name], tmp_path / f"{name}.onnx")
    # In a process of its own: its libraries and those of faiss do not bear each other.
    code = """if True:
        import pathlib, numpy, openvino
        core, images = openvino.Core(), numpy.load("images.npy")
        for path in pathlib.Path().glob("*.onnx"):
            compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            numpy.save(path.with_suffix(".npy"), compiled(images)[0])
    """
    subprocess.run([*python, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    for name, proto in protos.items():
        got = np.load(tmp_path / f"{name}.npy")
        assert cosines(got, run(proto, images)).min() > 0.9999
        if name.startswith("fp32"):
            np.testing.assert_allclose(got, run(proto, images), atol=2e-6)


def test_int8_of_channels_without_weights() -> None:
    """A bias survives where its weights are zero or next to it; so does a layer that never sees anything but zeros."""
    for size in (0.0, 1e-6):
        encoder = vit()
        layer = encoder.blocks[1].mlp.fc2
        layer.weight.data[:4] = size * torch.randn(4, layer.in_features)
        layer.bias.data[:4] = 3.0
        images = pictures(4)
        assert cosines(run(export(encoder, precision="int8"), images), oracle(encoder, images, "avg")).min() > 0.999
    silent = vit()
    silent.blocks[0].mlp.fc1.weight.data.zero_()
    silent.blocks[0].mlp.fc1.bias.data.zero_()
    images = pictures(4)
    assert cosines(run(export(silent, precision="int8"), images), oracle(silent, images, "avg")).min() > 0.999


def test_int8_refuses_layers_that_it_would_leave() -> None:
    with raises(InputError, match="linear layers are not known"):
        export(vit(block_fn=timm.models.vision_transformer.ParallelScalingBlock), precision="int8")
