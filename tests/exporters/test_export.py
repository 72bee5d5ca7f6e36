"""The exported file: what is in it, and that it equals PyTorch and timm."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pyarrow.parquet as pq
import pytest
from support.errors import raises
from support.models import timm_embeddings
from support.shards import jpeg, write_shard

import maekit
import maekit.exporters.parity as parity
from maekit.config.check import InspectConfig
from maekit.config.embed import EmbedConfig
from maekit.config.export import ExportConfig
from maekit.config.fields import choices_of, settings_of
from maekit.exporters.export import export
from maekit.exporters.sampling import Sample
from maekit.images import Preprocess
from maekit.inspection import inspect
from maekit.system.errors import InputError, MaekitError
from maekit.vectors.whitening import fit_whitening

pytestmark = pytest.mark.whole


def test_the_graph_is_lean_and_describes_itself(trained: Path) -> None:
    description = inspect(InspectConfig(str(trained / "encoder.onnx")))
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
    export(ExportConfig(trained / "run", tmp_path / "again.onnx"))
    assert (tmp_path / "again.onnx").read_bytes() == (trained / "encoder.onnx").read_bytes()


@pytest.mark.parametrize(("pool", "normalize"), [("avg", True), ("cls", True), ("avg", False), ("cls", False)])
def test_export_equals_timm(trained: Path, tmp_path: Path, pool: str, normalize: bool) -> None:
    export(ExportConfig(trained / "run", tmp_path / "e.onnx", pool=pool, normalize=normalize))
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
    with raises(MaekitError, match="differs from PyTorch"):
        export(ExportConfig(trained / "run", tmp_path / "e.onnx"))
    assert not list(tmp_path.iterdir())


def test_export_refuses(trained: Path, tmp_path: Path) -> None:
    with raises(InputError, match="neither a run nor a checkpoint"):
        export(ExportConfig(trained / "shards", tmp_path / "e.onnx"))
    with raises(InputError, match="does not exist"):
        export(ExportConfig(trained / "nothing", tmp_path / "e.onnx"))
    with raises(InputError, match=r"ends in \.onnx"):
        export(ExportConfig(trained / "run", tmp_path / "e.bin"))
    with raises(InputError, match="--pool max"):
        export(ExportConfig(trained / "run", tmp_path / "e.onnx", pool="max"))
    with raises(InputError, match="no such file"):
        export(ExportConfig(trained / "run", tmp_path / "e.onnx", parity=(str(tmp_path / "none"),)))


def test_export_of_one_checkpoint(trained: Path, tmp_path: Path) -> None:
    older = trained / "run" / "checkpoints" / "step-000000006"
    export(ExportConfig(older, tmp_path / "e.onnx"))
    assert inspect(InspectConfig(str(tmp_path / "e.onnx")))["maekit"]["checkpoint"]["step"] == 6


def test_whitening_of_a_run(trained: Path, tmp_path: Path) -> None:
    """Over its sample, the embeddings of the exported file have mean 0 and nearly one variance in every direction."""
    shards = str(trained / "shards")
    result = export(ExportConfig(trained / "run", tmp_path / "w.onnx", whiten=(shards,), whiten_dim=6, normalize=False))
    own = inspect(InspectConfig(str(tmp_path / "w.onnx")))["maekit"]
    assert own["dim"] == result.dim == 6
    assert own["whitening"] == result.whitening
    assert own["whitening"]["images"] == 30
    assert 0.5 < own["whitening"]["explained_variance"] < 1
    out = maekit.embed(EmbedConfig(str(tmp_path / "w.onnx"), (shards,), str(tmp_path / "out"), device="cpu"))
    assert out.rows == 30
    rows = np.concatenate(
        [
            np.stack(pq.read_table(path)["embedding"].to_numpy(zero_copy_only=False))
            for path in sorted((tmp_path / "out").glob("*.parquet"))
        ]
    )
    covariance = np.cov(rows.T, bias=True)
    np.testing.assert_allclose(rows.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(covariance - np.diag(np.diag(covariance)), 0, atol=1e-3)
    # The shrinkage takes little of the largest directions and more of the smaller ones.
    assert np.all((np.diag(covariance) > 0.9) & (np.diag(covariance) < 1.0001))


def test_whitening_against_a_plain_computation() -> None:
    random = np.random.default_rng(0)
    rows = (random.standard_normal((400, 12)) @ random.standard_normal((12, 12)) + 3).astype(np.float32)
    parts = np.split(rows, [7, 100])
    made = fit_whitening(parts, None, hashlib.sha256(b"x"))
    assert (made.dim, made.images, made.sample_sha256) == (12, 400, hashlib.sha256(b"x").hexdigest())
    centred = rows - rows.mean(0, dtype=np.float64)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    variances = singular**2 / len(rows)
    wanted = centred @ directions.T / np.sqrt(variances + 1e-4 * variances[0])
    got = rows @ made.matrix.T + made.bias
    np.testing.assert_allclose(np.abs(got), np.abs(wanted), atol=2e-3)
    assert made.explained_variance == pytest.approx(1)
    fewer = fit_whitening(parts, 3, hashlib.sha256())
    np.testing.assert_allclose(fewer.matrix, made.matrix[:3], atol=1e-6)
    assert fewer.explained_variance == pytest.approx(variances[:3].sum() / variances.sum())


def test_whitening_leaves_out_what_has_no_variance() -> None:
    """A LayerNorm without an affine part leaves one direction empty; n images span n - 1 directions."""
    rows = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    rows -= rows.mean(axis=1, keepdims=True)
    assert fit_whitening([rows], None, hashlib.sha256()).dim == 7
    assert fit_whitening([rows[:4]], None, hashlib.sha256()).dim == 3
    with raises(InputError, match="vary in 3 directions"):
        fit_whitening([rows[:4]], 4, hashlib.sha256())
    with raises(InputError, match="not finite"):
        fit_whitening([np.full((5, 3), np.nan, np.float32)], None, hashlib.sha256())
    with raises(InputError, match="all the same"):
        fit_whitening([np.ones((5, 3), np.float32)], None, hashlib.sha256())
    with raises(InputError, match="at least 2 readable images"):
        fit_whitening([rows[:1]], None, hashlib.sha256())


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_other_precisions(trained: Path, tmp_path: Path, precision: str) -> None:
    """Smaller files, within their gate, with rows that hardly move; the same run gives the same bytes."""
    options = dict(precision=precision)
    result = export(ExportConfig(trained / "run", tmp_path / "a.onnx", **options))
    export(ExportConfig(trained / "run", tmp_path / "b.onnx", **options))
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert (tmp_path / "a.onnx").stat().st_size < 0.8 * (trained / "encoder.onnx").stat().st_size
    assert inspect(InspectConfig(str(tmp_path / "a.onnx")))["maekit"]["precision"] == precision
    assert result.parity is not None
    assert result.parity.min_cosine > 0.99
    data = [jpeg(i) for i in range(20)]
    got = maekit.Embedder(tmp_path / "a.onnx", device="cpu")(data)
    assert ((got * timm_embeddings(trained, data)).sum(1) > 0.99).all()


@pytest.mark.parametrize(
    ("precision", "figure"), [("fp32", "max_relative_difference"), ("fp16", "min_cosine"), ("int8", "mean_cosine")]
)
def test_each_precision_has_its_gate(trained: Path, tmp_path: Path, monkeypatch, precision: str, figure: str) -> None:
    """A file that fails is not kept, but by force: then it says so."""
    limit = 0.0 if precision == "fp32" else 1.1
    monkeypatch.setitem(parity.GATES, precision, parity.Gate(figure, limit))
    said = f"differs from PyTorch: {figure.replace('_', ' ')}"
    with raises(MaekitError, match=said):
        export(ExportConfig(trained / "run", tmp_path / "e.onnx", precision=precision))
    assert not list(tmp_path.iterdir())
    result = export(ExportConfig(trained / "run", tmp_path / "e.onnx", precision=precision, force=True))
    assert result.warning is not None
    assert figure.replace("_", " ") in result.warning
    assert (tmp_path / "e.onnx").exists()


def test_the_gates() -> None:
    kinds = {key: kind for key, kind, *_ in settings_of(ExportConfig)}
    assert tuple(parity.GATES) == choices_of(kinds["precision"])
    fine = parity.Parity(128, (1, 3, 16), 1e-5, 0.9995, 0.995, 10, 1.0, "CPU")
    assert {name: (gate.figure, gate.limit) for name, gate in parity.GATES.items()} == {
        "fp32": ("max_relative_difference", 1e-4),
        "fp16": ("min_cosine", 0.999),
        "int8": ("mean_cosine", 0.99),
    }
    assert all(gate.problem(fine) is None for gate in parity.GATES.values())
    nan = float("nan")
    bad = parity.Parity(128, (1, 3, 16), nan, nan, nan, 10, 0.0, "CPU")
    assert all(gate.problem(bad) for gate in parity.GATES.values())


def test_measure_counts_neighbours_and_looks_at_every_batch_size() -> None:
    random = np.random.default_rng(0)
    expected = random.standard_normal((40, 8)).astype(np.float32)
    images = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1).repeat(3, axis=3)

    def exact(batch):
        return expected[batch[:, 0, 0, 0]]

    same = parity.measure(exact, images, expected, provider="CPU")
    assert (same.max_relative_difference, same.neighbour_agreement, same.neighbours) == (0, 1, 10)
    assert same.min_cosine == pytest.approx(1)

    def wrong_alone(batch):
        return exact(batch) * (2 if len(batch) == 1 else 1) if len(batch) != 3 else -exact(batch)

    found = parity.measure(wrong_alone, images, expected, provider="CPU")
    assert 1 < found.max_relative_difference <= 2
    assert found.min_cosine == pytest.approx(-1)
    assert found.neighbour_agreement == 1  # that of all images, in batches of 16
    shuffled = parity.measure(lambda batch: exact((batch + 1) % 40), images, expected, provider="CPU")
    assert shuffled.neighbour_agreement < 0.5
    few = parity.measure(lambda b: exact(b), images[:2], expected[:2], provider="CPU")
    assert (few.images, few.neighbours) == (2, 1)


def test_a_whitening_is_fitted_on_the_images_that_are_chosen(trained: Path, tmp_path: Path) -> None:
    """Of samples with several images; without a choice it is refused."""
    both = {str(number): {"depth.png": jpeg(50), "rgb.png": jpeg(number)} for number in range(12)}
    write_shard(tmp_path / "several.tar", both)
    alone = {str(number): {"jpg": jpeg(number)} for number in range(12)}
    write_shard(tmp_path / "alone.tar", alone)

    def digest(shards: str, image: str | None) -> str:
        whiten = (str(tmp_path / shards),)
        config = ExportConfig(trained / "run", tmp_path / f"{image}.onnx", whiten=whiten, whiten_dim=2, image=image)
        whitening = export(config).whitening
        assert whitening is not None
        return whitening["sample_sha256"]

    assert digest("several.tar", "rgb.png") == digest("alone.tar", None)
    with raises(InputError, match=r"several.tar: the sample '0' has several images \(depth.png; rgb.png\)"):
        digest("several.tar", None)


def test_samples_are_spread_and_skip_what_cannot_be_read(tmp_path: Path) -> None:
    samples = {f"{i:03d}": {"jpg": jpeg(i) if i % 4 else b"no image"} for i in range(40)}
    write_shard(tmp_path / "s" / "a.tar", samples)
    preprocess = Preprocess.for_size((32, 32), (0.5,) * 3, (0.5,) * 3)
    sample = Sample([str(tmp_path / "s")], preprocess, 10)
    images = np.concatenate(list(sample))
    assert images.shape == (10, 32, 32, 3)
    every = {preprocess(jpeg(i)).tobytes(): i for i in range(40) if i % 4}
    numbers = [every[image.tobytes()] for image in images]
    assert len(set(numbers)) == 10
    assert max(numbers) - min(numbers) > 20
    assert sample.digest.hexdigest() == hashlib.sha256(images.tobytes()).hexdigest()
    assert len(np.concatenate(list(Sample([str(tmp_path / "s")], preprocess, 1000)))) == 30


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": "bf16"}, "--precision bf16: must be one of fp32, fp16, int8"),
        ({"opset": 17}, "--opset 17: must be one of 18"),
        ({"opset": 24}, "--opset 24"),
        ({"format": "torchscript"}, "--format torchscript"),
        ({"whiten_dim": 5}, "--whiten-dim 5: needs --whiten"),
        ({"whiten": ("x",), "whiten_dim": 0}, "must be at least 1"),
        ({"whiten": ("x",), "whiten_images": 1}, "--whiten-images 1"),
        ({"whiten_images": 100}, "--whiten-images 100: needs --whiten"),
        ({"format": "timm", "force": True}, "--force is not for --format timm"),
        ({"whiten": ("x",), "pool": "tokens"}, "--whiten is for embeddings"),
        ({"model": "vit_tiny_patch16_224"}, "says itself which model it is"),
    ],
)
def test_impossible_options(trained: Path, tmp_path: Path, options: dict, said: str) -> None:
    with raises(InputError, match=re.escape(said)):
        export(ExportConfig(trained / "run", tmp_path / "e.onnx", **options))
    assert not list(tmp_path.iterdir())


def test_the_command(trained: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    from maekit.cli.app import main

    def maekit_(*arguments: str) -> tuple[int, list[str], list[str]]:
        monkeypatch.setattr("sys.argv", ["maekit", "export", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out.splitlines(), printed.err.splitlines()

    monkeypatch.chdir(tmp_path)
    run = str(trained / "run")
    code, out, _ = maekit_(
        *(run, "--out", "e.onnx", "--whiten", str(trained / "shards"), "--whiten-dim", "8"),
        *("--precision", "int8", "--pool", "avg+cls", "--opset", "20", "--json"),
    )
    summary = json.loads(out[-1])
    assert (code, summary["path"], summary["dim"], summary["whitening"]["dim"]) == (0, "e.onnx", 8, 8)
    assert summary["parity"]["mean_cosine"] >= 0.99
    _, _, notes = maekit_(run, "--out", "p.onnx")
    assert any("--whiten" in line for line in notes)  # the way to better vectors is told
    code, out, _ = maekit_(run, "--verify", "e.onnx", "--device", "cpu", "--json")
    assert code == 0
    assert "e.onnx is sound on CPUExecutionProvider" in out
    assert json.loads(out[-1])["problems"] == []
    for arguments, said in (
        ([], "needs a source and --out"),
        ([run], "needs a source and --out"),
        ([run, "--out", "x.onnx", "--device", "cpu"], "--device is for --verify"),
        (["--verify", "e.onnx", "--out", "x.onnx"], "--out does not go with --verify"),
        (["--verify", "e.onnx", "--pool", "cls"], "--pool does not go with --verify"),
        (["--verify", "none.onnx"], "No such file"),
        (["--verify", "e.onnx", "--device", "tpu"], "--device tpu"),
    ):
        code, _, errors = maekit_(*arguments)
        assert (code, len(errors)) == (2, 1)
        assert said in errors[0]
