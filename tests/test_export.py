"""The exported file: what is in it, and that it equals PyTorch and timm."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import jpeg
from models import timm_embeddings

import maekit
from maekit.errors import InputError, MaekitError
from maekit.exporters.export import ExportOptions, export
from maekit.inspection import inspect


def test_the_graph_is_lean_and_describes_itself(trained: Path) -> None:
    description = inspect(str(trained / "encoder.onnx"))
    nodes = description["nodes"]
    assert nodes["Attention"] == 2
    assert not {"Shape", "Expand", "Softmax"} & set(nodes)
    assert description["inputs"] == {"images": "uint8 [batch, 32, 32, 3]"}
    assert description["outputs"] == {"embeddings": "float [batch, 32]"}
    assert description["opset"]["ai.onnx"] == 23
    own = description["maekit"]
    assert own["preprocess"]["size"] == [32, 32]
    assert own["preprocess"]["interpolation"] == "bicubic"
    assert (own["pool"], own["dim"], own["normalize"], own["precision"]) == ("avg", 32, True, "fp32")
    assert own["parity"]["max_relative_difference"] <= 1e-4
    assert own["parity"]["batch_sizes"] == [1, 3, 16]
    onnx.checker.check_model(onnx.load(trained / "encoder.onnx"), full_check=True)


def test_no_machine_path_in_the_file(trained: Path) -> None:
    data = (trained / "encoder.onnx").read_bytes()
    assert b"site-packages" not in data
    assert str(Path(maekit.__file__).parent).encode() not in data


def test_the_same_run_exports_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    export(trained / "run", tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (trained / "encoder.onnx").read_bytes()


@pytest.mark.parametrize(("pool", "normalize"), [("avg", True), ("cls", True), ("avg", False), ("cls", False)])
def test_export_equals_timm(trained: Path, tmp_path: Path, pool: str, normalize: bool) -> None:
    export(trained / "run", tmp_path / "e.onnx", ExportOptions(pool=pool, normalize=normalize))
    data = [jpeg(i) for i in range(20)]
    got = maekit.Embedder(tmp_path / "e.onnx", device="cpu")(data)
    norms = np.linalg.norm(got, axis=1)
    assert np.allclose(norms, 1, atol=1e-5) == normalize
    np.testing.assert_allclose(got / norms[:, None], timm_embeddings(trained, data, pool), atol=2e-5)


def test_runs_with_numpy_and_onnxruntime_alone(trained: Path) -> None:
    session = onnxruntime.InferenceSession(trained / "encoder.onnx", providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    together = session.run(None, {"images": images})[0]
    alone = np.concatenate([session.run(None, {"images": images[i : i + 1]})[0] for i in range(5)])
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_a_file_that_differs_from_pytorch_is_not_kept(trained: Path, tmp_path: Path, monkeypatch) -> None:
    import maekit.exporters.export as module

    original = module.to_onnx

    def disturbed(*args, **options):
        proto = original(*args, **options)
        tensor = next(t for t in proto.graph.initializer if t.name == "embedding.weight")
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 1.01, tensor.name))
        return proto

    monkeypatch.setattr(module, "to_onnx", disturbed)
    with pytest.raises(MaekitError, match="differs from PyTorch"):
        export(trained / "run", tmp_path / "e.onnx")
    assert not list(tmp_path.iterdir())


def test_export_refuses(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a run nor a checkpoint"):
        export(trained / "shards", tmp_path / "e.onnx")
    with pytest.raises(InputError, match="does not exist"):
        export(trained / "nothing", tmp_path / "e.onnx")
    with pytest.raises(InputError, match=r"ends in \.onnx"):
        export(trained / "run", tmp_path / "e.bin")
    with pytest.raises(InputError, match="--pool max"):
        export(trained / "run", tmp_path / "e.onnx", ExportOptions(pool="max"))
    with pytest.raises(InputError, match="no such file"):
        export(trained / "run", tmp_path / "e.onnx", ExportOptions(parity=(str(tmp_path / "none"),)))


def test_export_of_one_checkpoint(trained: Path, tmp_path: Path) -> None:
    older = trained / "run" / "checkpoints" / "step-000000006"
    export(older, tmp_path / "e.onnx")
    assert inspect(str(tmp_path / "e.onnx"))["maekit"]["checkpoint"]["step"] == 6
