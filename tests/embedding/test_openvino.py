"""OpenVINO beside ONNX Runtime: the same embeddings, one runtime per output, and bf16 up to the pooled vector."""

import concurrent.futures
import json
import multiprocessing
import os
import pickle
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest
from support.errors import raises
from support.models import embed_config
from support.processes import finish, start
from support.shards import jpeg
from typer.testing import CliRunner

import maekit
from maekit import openvino_runtime
from maekit.cli.app import app
from maekit.config.embed import EmbedConfig
from maekit.config.export import ExportConfig
from maekit.embedding.embed import embed
from maekit.embedding.session import EncoderSession
from maekit.encoder_probe import probe_images
from maekit.exporters.export import export
from maekit.providers import CPU, OPENVINO
from maekit.system.errors import InputError, MaekitError

pytest.importorskip("openvino")
IMAGES = [jpeg(number) for number in range(11)]


@pytest.fixture(scope="module")
def whitened(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return whitened exports by precision."""
    folder, shards = tmp_path_factory.mktemp("whitened"), (str(trained / "shards"),)
    for precision in ("fp32", "int8"):
        out = folder / f"{precision}.onnx"
        export(ExportConfig(trained / "run", out, precision=precision, whiten=shards, whiten_dim=12, force=True))
    return {path.stem: path for path in folder.glob("*.onnx")}


@pytest.fixture
def knows_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let OpenVINO emulate bf16 where the processor has none: slow, and the same rounding."""
    monkeypatch.setattr(openvino_runtime, "capabilities", lambda: ("FP32", "BF16", "INT8"))


def rows(out: Path) -> np.ndarray:
    tables = [pq.read_table(path)["embedding"].to_pylist() for path in sorted(out.glob("*.parquet"))]
    return np.array([row for table in tables for row in table], np.float32)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_it_gives_the_embeddings_of_onnx_runtime(whitened, precision: str) -> None:
    ours, theirs = (
        maekit.Embedder(whitened[precision], device="cpu", runtime=runtime) for runtime in ("openvino", "onnxruntime")
    )
    assert (ours.provider, theirs.provider) == (OPENVINO, CPU)
    assert ours.sha256 == theirs.sha256
    if precision == "fp32":
        np.testing.assert_allclose(ours(IMAGES), theirs(IMAGES), atol=2e-5)
    else:
        assert cosines(ours(IMAGES), theirs(IMAGES)).min() > 0.99


def test_a_row_depends_on_its_batch_alone(whitened) -> None:
    """For one, two or more calls at a time, from several threads, the bits are the same."""
    images = probe_images((32, 32))
    path, options = whitened["fp32"], {"device": "cpu", "threads": 1, "runtime": "openvino"}
    alone = EncoderSession(path, **options)
    batches = [images[:size] for size in (8, 4, 8, 4, 8, 8)]
    expected = [alone(batch) for batch in batches]
    for calls in (1, 2, 3):
        session = EncoderSession(path, **options, calls=calls)
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            for ours, theirs in zip(pool.map(session, batches), expected, strict=True):
                np.testing.assert_array_equal(ours, theirs)
    again = alone(images)  # in memory of its own
    assert not any(np.shares_memory(again, before) for before in expected)


def test_an_output_has_one_runtime(trained: Path, tmp_path: Path) -> None:
    """`auto` takes the one that is there; another is refused, and its version alone may change."""
    out = tmp_path / "out"
    config = embed_config(trained, out, runtime="openvino", limit=12)
    assert embed(config).provider == OPENVINO
    record = json.loads((out / "_maekit/0.tar.json").read_text())
    assert record["options"]["provider"] == OPENVINO
    assert record["runtime"].startswith("openvino 20")
    # As if by another version, the last shard still missing.
    (out / "_maekit/0.tar.json").write_text(json.dumps({**record, "runtime": "openvino 2031.1"}))
    (out / "_maekit/1.tar.json").unlink()
    again = embed(embed_config(trained, out, runtime="auto", limit=12))
    assert (again.provider, again.skipped, again.shards) == (OPENVINO, 2, 1)
    with raises(InputError, match="was made with provider = OpenVINO, and CPUExecutionProvider is asked for now"):
        embed(embed_config(trained, out, runtime="onnxruntime", limit=12))
    other = tmp_path / "other"
    embed(embed_config(trained, other, limit=12))
    assert json.loads((other / "_maekit/0.tar.json").read_text())["runtime"].startswith("onnxruntime ")
    np.testing.assert_allclose(rows(out), rows(other), atol=2e-6)
    for key, value in (("runtime", "auto"), ("overwrite", True)):
        assert embed(embed_config(trained, other, limit=12, **{"runtime": "auto", key: value})).provider == CPU


def test_an_output_of_a_former_version_goes_on(trained: Path, tmp_path: Path, monkeypatch) -> None:
    """Its records know of no runtime, and `auto` stays with ONNX Runtime where it would take OpenVINO by itself."""
    out = tmp_path / "out"
    embed(embed_config(trained, out))
    path = out / "_maekit/2.tar.json"
    record = json.loads(path.read_text())
    del record["runtime"]
    path.write_text(json.dumps(record))
    monkeypatch.setattr(openvino_runtime, "is_faster", lambda: True)
    again = embed(embed_config(trained, out, runtime="auto"))
    assert (again.provider, again.skipped) == (CPU, 3)
    fresh = embed(embed_config(trained, tmp_path / "fresh", runtime="auto"))
    assert fresh.provider == OPENVINO


def test_what_auto_takes(trained: Path, monkeypatch) -> None:
    def provider(**options) -> str:
        return maekit.Embedder(trained / "encoder.onnx", **options).provider

    assert provider() == CPU
    monkeypatch.setattr(openvino_runtime, "is_faster", lambda: True)
    session = EncoderSession(trained / "encoder.onnx")
    assert (session.provider, session.reason) == (OPENVINO, "chosen by auto: faster here than ONNX Runtime")
    assert provider(runtime="onnxruntime") == CPU
    monkeypatch.setattr(openvino_runtime, "_release", lambda: (2026, 2))
    assert provider() == CPU
    with raises(InputError, match=r"`runtime` openvino: openvino 20.* does not compute Attention rightly; pip install"):
        provider(runtime="openvino")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert provider() == CPU
    with raises(InputError, match=r"`runtime` openvino: OpenVINO is not installed; pip install 'maekit\[openvino\]'"):
        provider(runtime="openvino")


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_bf16_ends_at_the_pooled_vector(whitened, knows_bf16, precision: str) -> None:
    """A whitening in bf16 would be several times farther off than the encoder in bf16 is."""
    exact = maekit.Embedder(whitened[precision], device="cpu", runtime="openvino")(IMAGES)
    ours = maekit.Embedder(whitened[precision], device="cpu", precision="bf16")(IMAGES)
    assert 1e-7 < np.abs(ours - exact).max() < 0.1
    assert cosines(ours, exact).min() > 0.99
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)  # the norm of a bf16 vector is off by 1e-3
    proto = onnx.load(whitened[precision])
    matrix = onnx.numpy_helper.to_array(next(t for t in proto.graph.initializer if t.name == "whitening.weight"))
    graph = openvino_runtime._core().read_model(whitened[precision].read_bytes())
    encoder, head = openvino_runtime._split_at_whitening(graph)
    pooled = np.random.default_rng(0).normal(size=(3, matrix.shape[1])).astype(np.float32)
    compiled = openvino_runtime._core().compile_model(head, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    bias = onnx.numpy_helper.to_array(next(t for t in proto.graph.initializer if t.name == "whitening.bias"))
    expected = pooled @ matrix.T + bias
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(compiled(pooled)[0], expected, atol=1e-5)
    assert encoder.outputs[0].partial_shape[1].get_length() == matrix.shape[1]


def test_bf16_is_part_of_the_output(trained: Path, tmp_path: Path, knows_bf16) -> None:
    out = tmp_path / "out"
    result = embed(embed_config(trained, out, runtime="auto", precision="bf16"))
    assert result.provider == OPENVINO
    assert json.loads((out / "_maekit/.output.json").read_text())["precision"] == "bf16"
    with raises(InputError, match="was made with precision = bf16, and None is asked for now"):
        embed(embed_config(trained, out, runtime="auto"))
    embed(embed_config(trained, tmp_path / "fp32", runtime="openvino"))
    assert cosines(rows(out), rows(tmp_path / "fp32")).min() > 0.999
    assert (rows(out) != rows(tmp_path / "fp32")).any()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--precision", "bf16"], "--precision bf16: this processor has no bf16 arithmetic"),
        (["--precision", "bf16", "--runtime", "onnxruntime"], "--precision bf16 is computed by OpenVINO; leave out"),
        (["--runtime", "openvino", "--device", "cuda"], "--runtime openvino is for the CPU, and --device is cuda"),
        (["--precision", "bf16", "--device", "cuda:1"], "--precision bf16 is for the CPU"),
        (["--runtime", "openvino", "--provider-option", "a=1"], "--provider-option is for the CUDA provider"),
        (["--runtime", "tensorrt"], "must be one of auto, onnxruntime, openvino"),
    ],
)
def test_bad_usage(trained: Path, tmp_path: Path, monkeypatch, options: list[str], said: str) -> None:
    from maekit.cli.options import with_flags

    monkeypatch.setattr(openvino_runtime, "capabilities", lambda: ("FP32",))
    arguments = [
        "embed",
        str(trained / "encoder.onnx"),
        str(trained / "shards"),
        "--out",
        str(tmp_path / "o"),
        *options,
    ]
    refused = CliRunner().invoke(app, arguments)
    text = with_flags(str(refused.exception)) + refused.output
    assert refused.exit_code != 0
    assert said in text, text
    assert not (tmp_path / "o").exists()


def test_a_file_that_gives_something_else_there_is_refused(trained: Path, tmp_path: Path, knows_bf16) -> None:
    """Held against the embeddings it recorded; without them, against ONNX Runtime."""
    proto = onnx.load(trained / "encoder.onnx")
    entry = next(entry for entry in proto.metadata_props if entry.key == "maekit")
    spec = json.loads(entry.value)

    def save(**changes) -> Path:
        entry.value = json.dumps({key: value for key, value in {**spec, **changes}.items() if value is not None})
        onnx.save(proto, tmp_path / "m.onnx")
        return tmp_path / "m.onnx"

    assert maekit.Embedder(save(probe=None), runtime="openvino").provider == OPENVINO
    recorded = maekit.Embedder(trained / "encoder.onnx")(list(probe_images((32, 32))))
    from maekit.encoder_probe import rows_to_json

    wrong = save(probe=rows_to_json(recorded * np.float32(1.001)))
    with raises(InputError, match=r"m\.onnx gives other embeddings in OpenVINO than it recorded .* use `runtime=onnx"):
        maekit.Embedder(wrong, runtime="openvino")
    maekit.Embedder(wrong, runtime="openvino", precision="bf16")  # a thousandth is what bf16 rounds by
    with raises(InputError, match="cosine at least -.*; use `precision=fp32`"):
        maekit.Embedder(save(probe=rows_to_json(-recorded)), precision="bf16")
    maekit.Embedder(wrong, runtime="onnxruntime")  # as before
    with raises(InputError, match=r"metadata is damaged: embeddings of shape \(2, 31\)"):
        maekit.Embedder(save(probe=rows_to_json(recorded[:, 1:])), runtime="openvino")


def test_pickled_and_in_a_spawned_process(whitened) -> None:
    embedder = maekit.Embedder(whitened["fp32"], device="cpu", runtime="openvino")
    again = pickle.loads(pickle.dumps(embedder))
    assert again.provider == OPENVINO
    np.testing.assert_array_equal(again(IMAGES), embedder(IMAGES))
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        np.testing.assert_array_equal(pool.submit(embedder, IMAGES).result(120), embedder(IMAGES))


CODE = """if True:
    import os, sys
    import numpy as np
    import maekit
    from maekit import openvino_runtime
    from maekit.system.errors import MaekitError
    openvino_runtime.is_faster = lambda: True
    path, images = sys.argv[1], list(np.load(sys.argv[2]))
    embedder, asked = maekit.Embedder(path), maekit.Embedder(path, runtime="openvino")
    before = embedder(images), asked(images)
    if not (pid := os.fork()):
        assert np.abs(embedder(images) - before[0]).max() < 1e-5
        assert (embedder.provider, maekit.Embedder(path).provider) == ("CPUExecutionProvider",) * 2
        for again in (lambda: asked(images), lambda: maekit.Embedder(path, runtime="openvino")):
            try:
                again()
            except MaekitError as error:
                print(error, flush=True)
            else:
                os._exit(3)
        del embedder, asked
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (embedder(images) == before[0]).all() and embedder.provider == "OpenVINO"
"""


def test_after_a_fork(whitened, tmp_path: Path, python: list[str]) -> None:
    """OpenVINO would hang there: `auto` goes on in ONNX Runtime, what was asked for says so; the parent goes on."""
    np.save(tmp_path / "images.npy", probe_images((32, 32)))
    done = subprocess.run(
        [*python, "-c", CODE, str(whitened["fp32"]), str(tmp_path / "images.npy")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONFAULTHANDLER": "1"},
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "runs on OpenVINO, which a forked process cannot use: start the processes by spawn" in first
    assert "`runtime` openvino: this process was forked from one that had started OpenVINO" in second


def test_several_processes_write_what_one_writes(trained: Path, tmp_path: Path) -> None:
    """One process per device, from one that has not started OpenVINO; and with other numbers of decoders."""
    shards = {"shards": (str(trained / "shards"),), "runtime": "openvino", "batch_size": 8}
    runs = {
        "one": {"device": "cpu"},
        "two": {"devices": ("cpu", "cpu")},
        "more": {"device": "cpu", "workers": 3},
    }
    for name, changes in runs.items():
        config = EmbedConfig(str(trained / "encoder.onnx"), out=str(tmp_path / name), **shards, **changes)
        assert finish(start(config, tmp_path / "log")) == [0]
    names = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert len(names) > 6
    for other in ("two", "more"):
        for name in names:
            assert (tmp_path / other / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), (other, name)


def test_weights_in_a_second_file_stay_in_onnx_runtime(trained: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("maekit.exporters.writing.MAX_BYTES", 1000)
    export(ExportConfig(trained / "run", tmp_path / "large.onnx"))
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(openvino_runtime, "is_faster", lambda: True)
    assert maekit.Embedder(tmp_path / "large.onnx").provider == CPU
    with raises(InputError, match="keeps weights in a second file, which OpenVINO would read anew"):
        maekit.Embedder(tmp_path / "large.onnx", runtime="openvino")


def test_what_is_no_encoder(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_bytes(b"no model")
    with raises(InputError, match=r"text\.onnx: OpenVINO cannot load this file: "):
        maekit.Embedder(tmp_path / "text.onnx", runtime="openvino")
    proto = onnx.load(trained / "encoder.onnx")
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "other.onnx")
    with raises(InputError, match="not written by `maekit export`"):
        maekit.Embedder(tmp_path / "other.onnx", runtime="openvino")


def test_it_is_shown(trained: Path) -> None:
    shown = CliRunner().invoke(app, ["inspect", str(trained / "encoder.onnx"), "--providers"]).stdout
    assert "OpenVINO" in shown
    assert "FP32" in shown
    found = maekit.doctor(maekit.DoctorConfig(str(trained / "encoder.onnx"), seconds=0.1)).findings
    values = {finding.subject: finding.value for finding in found}
    assert values["OpenVINO"].endswith("taken by `runtime=openvino` only")
    assert values["model"].startswith("runs in onnxruntime ")


def test_it_fails_in_one_line(trained: Path, monkeypatch) -> None:
    session = EncoderSession(trained / "encoder.onnx", device="cpu", runtime="openvino")
    with raises(MaekitError, match=r"encoder\.onnx failed on OpenVINO: "):
        session(np.zeros((1, 7, 7, 3), np.uint8))
