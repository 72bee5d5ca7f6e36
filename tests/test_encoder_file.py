"""The exported file as others may find it: weights in a second file, hostile names, damage; and what `inspect` says."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from support.errors import raises
from support.shards import jpeg

import maekit
import maekit.exporters.writing as writing
from maekit.config import IMAGENET_MEAN, IMAGENET_STD
from maekit.config.check import InspectConfig
from maekit.config.export import ExportConfig
from maekit.encoder_file import METADATA_KEY, EncoderDescription, check_external_data, read_model
from maekit.exporters.export import export
from maekit.exporters.runtime import ExportedEncoder
from maekit.exporters.verify import verify
from maekit.images import Preprocess
from maekit.inspection import inspect
from maekit.system.errors import InputError, MaekitError


@pytest.fixture
def divided(trained: Path, tmp_path: Path, monkeypatch) -> Path:
    """An export whose weights did not fit into one file: the limit is lowered instead."""
    monkeypatch.setattr(writing, "MAX_BYTES", 10_000)
    export(ExportConfig(trained / "run", tmp_path / "e" / "encoder.onnx"))
    return tmp_path / "e" / "encoder.onnx"


def test_weights_in_a_second_file(trained: Path, divided: Path, tmp_path: Path) -> None:
    """It gives the same numbers, is described, verified, and moved as two files."""
    (weights,) = divided.parent.glob("*.data")
    assert re.fullmatch(r"encoder-[0-9a-f]{16}\.onnx\.data", weights.name)
    assert weights.stat().st_size > 10 * divided.stat().st_size / 10
    data = [jpeg(i) for i in range(5)]
    whole = maekit.Embedder(trained / "encoder.onnx", device="cpu")(data)
    np.testing.assert_array_equal(maekit.Embedder(divided, device="cpu")(data), whole)
    described = inspect(InspectConfig(str(divided)))
    assert described["weights_in"] == [weights.name]
    assert described["bytes"] == divided.stat().st_size + weights.stat().st_size
    assert described["nodes"]["Attention"] == 2
    shutil.move(divided.parent, tmp_path / "moved")
    assert not verify(tmp_path / "moved" / "encoder.onnx", trained / "run", device="cpu").problems
    onnx.checker.check_model(tmp_path / "moved" / "encoder.onnx", full_check=True)


def test_the_second_file_follows_the_first(trained: Path, divided: Path, monkeypatch) -> None:
    """Another export in its place takes the weights of the old one away; a failed one leaves all as it was."""
    before = {path.name: path.read_bytes() for path in divided.parent.iterdir()}
    export(ExportConfig(trained / "run", divided))
    assert {path.name: path.read_bytes() for path in divided.parent.iterdir()} == before
    older = trained / "run" / "checkpoints" / "step-000000006"
    monkeypatch.setattr("maekit.exporters.export.measure", lambda *_, **__: (_ for _ in ()).throw(MaekitError("no")))
    with raises(MaekitError, match="no"):
        export(ExportConfig(older, divided))
    assert {path.name: path.read_bytes() for path in divided.parent.iterdir()} == before
    monkeypatch.undo()
    monkeypatch.setattr(writing, "MAX_BYTES", 10_000)
    export(ExportConfig(older, divided))
    after = {path.name for path in divided.parent.iterdir()}
    assert len(after) == 2
    assert after & set(before) == {"encoder.onnx"}
    monkeypatch.setattr(writing, "MAX_BYTES", 2_000_000_000)
    export(ExportConfig(older, divided))
    assert [path.name for path in divided.parent.iterdir()] == ["encoder.onnx"]


def test_other_weights_under_the_same_name(divided: Path) -> None:
    (weights,) = divided.parent.glob("*.data")
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    with raises(InputError, match=r"is not the file that .*encoder\.onnx was exported with"):
        maekit.Embedder(divided, device="cpu")
    weights.unlink()
    with raises(InputError, match="there is no such file beside it"):
        maekit.Embedder(divided, device="cpu")


def test_external_weights_are_those_that_were_hashed(divided: Path) -> None:
    """They are read once: what replaces the file afterwards is neither hashed nor run."""
    model = read_model(divided)
    (weights,) = divided.parent.glob("*.data")
    before = maekit.Embedder(divided, device="cpu")(jpeg(1))
    weights.write_bytes(bytes(weights.stat().st_size))
    opened = ExportedEncoder(model, "embeddings", device="cpu")
    pixels = Preprocess.for_size((32, 32), IMAGENET_MEAN, IMAGENET_STD)(jpeg(1))
    np.testing.assert_allclose(opened.encode(pixels[None]), before, atol=1e-6)
    with raises(InputError, match="is not the file that"):
        maekit.Embedder(divided, device="cpu")


def external(name: str) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[4], data_location=1)
    for key, value in (("location", name), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def initializer(tensor) -> onnx.ModelProto:
    return model([helper.make_node("Add", ["x", "w"], ["y"])], initializer=[tensor])


def attribute(tensor) -> onnx.ModelProto:
    return model([helper.make_node("Constant", [], ["w"], value=tensor), helper.make_node("Add", ["x", "w"], ["y"])])


def subgraph(tensor) -> onnx.ModelProto:
    out = helper.make_tensor_value_info("w2", 1, [4])
    nodes = [helper.make_node("Constant", [], ["w2"], value=tensor)]
    branch = helper.make_graph(nodes, "b", [], [out])
    condition = numpy_helper.from_array(np.array(True), "c")
    branches = helper.make_node("If", ["c"], ["w"], then_branch=branch, else_branch=branch)
    return model([branches, helper.make_node("Add", ["x", "w"], ["y"])], initializer=[condition])


def function(tensor) -> onnx.ModelProto:
    made = helper.make_function(
        "own", "F", [], ["w"], [helper.make_node("Constant", [], ["w"], value=tensor)], [helper.make_opsetid("", 20)]
    )
    proto = model([helper.make_node("F", [], ["w"], domain="own"), helper.make_node("Add", ["x", "w"], ["y"])])
    proto.functions.append(made)
    return proto


def model(nodes, **more) -> onnx.ModelProto:
    value = [helper.make_tensor_value_info(name, 1, [4]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], **more)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(proto, {METADATA_KEY: "{}"})
    return proto


@pytest.mark.parametrize("place", [initializer, attribute, subgraph, function])
@pytest.mark.parametrize("kind", ["../x", "absolute", "symbolic link", "hard link", "folder", "pipe", "empty", "nul"])
def test_names_that_lead_elsewhere(tmp_path: Path, kind: str, place) -> None:
    """Wherever a tensor stands in the graph: nothing outside is read, by any command."""
    secret = tmp_path / "secret"
    secret.write_bytes(np.arange(4, dtype=np.float32).tobytes())
    folder = tmp_path / "models"
    (folder / "sub").mkdir(parents=True)
    os.symlink(secret, folder / "soft")
    os.link(secret, folder / "hard")
    os.mkfifo(folder / "pipe")
    names = {
        "../x": "../secret",
        "absolute": str(secret),
        "symbolic link": "soft",
        "hard link": "hard",
        "folder": "sub",
        "empty": "",
        "nul": "a\0b",
    }
    path = folder / "evil.onnx"
    path.write_bytes(place(external(names.get(kind, kind))).SerializeToString())
    for load in (
        check_external_data,
        lambda p: maekit.Embedder(p, device="cpu"),
        lambda p: inspect(InspectConfig(str(p))),
        lambda p: inspect(InspectConfig(str(p), providers=True)),
        verify,
    ):
        with raises(InputError, match=r"keeps weights in"):
            load(path)


def test_a_plain_file_beside_it_is_none_of_ours(tmp_path: Path) -> None:
    """The name is fine, and still the digest is not recorded."""
    (tmp_path / "plain").write_bytes(bytes(16))
    (tmp_path / "m.onnx").write_bytes(initializer(external("plain")).SerializeToString())
    assert check_external_data(tmp_path / "m.onnx") == [tmp_path / "plain"]
    with raises(InputError, match="metadata is damaged"):
        maekit.Embedder(tmp_path / "m.onnx", device="cpu")


def test_a_pooling_that_there_is_none_of_is_damage() -> None:
    preprocess = Preprocess.for_size((32, 32), IMAGENET_MEAN, IMAGENET_STD).to_json()
    about = {"preprocess": preprocess, "dim": 8, "pool": "avg+std", "normalize": True}
    assert EncoderDescription.from_metadata(Path("e.onnx"), json.dumps(about), "").pool == "avg+std"
    for wrong in ("max", "avg+avg", "", None, 3):
        with raises(InputError, match=r"metadata is damaged.*must be one of avg, cls, std, avg2x2"):
            EncoderDescription.from_metadata(Path("e.onnx"), json.dumps({**about, "pool": wrong}), "")


@pytest.mark.parametrize("content", [b"", b"<html>location</html>", b"\x00" * 100, b"location"])
def test_files_that_are_no_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    for load in (lambda p: maekit.Embedder(p, device="cpu"), lambda p: inspect(InspectConfig(str(p))), verify):
        with raises(InputError, match=r"m\.onnx"):
            load(tmp_path / "m.onnx")


def test_an_export_over_a_foreign_file_leaves_its_neighbours(trained: Path, tmp_path: Path) -> None:
    """What stood under the name is replaced; files that it named are not maekit's to delete."""
    (tmp_path / "plain").write_bytes(bytes(16))
    (tmp_path / "m.onnx").write_bytes(initializer(external("plain")).SerializeToString())
    export(ExportConfig(trained / "run", tmp_path / "m.onnx"))
    assert (tmp_path / "plain").exists()
    (tmp_path / "n.onnx").write_bytes(b"<html>")
    export(ExportConfig(trained / "run", tmp_path / "n.onnx"))


def edited(path: Path, out: Path, change) -> Path:
    proto = onnx.load(path)
    change(proto)
    onnx.save(proto, out)
    return out


def test_verify_finds_a_file_that_is_not_what_it_was(trained: Path, tmp_path: Path) -> None:
    path = trained / "encoder.onnx"
    sound = verify(path, device="cpu")
    assert sound.problems == ()
    assert sound.parity is None
    assert sound.probe.max_relative_difference < 1e-6
    whole = verify(path, trained / "run", device="cpu")
    assert whole.parity is not None
    assert whole.parity.max_relative_difference < 1e-5

    def scaled(proto) -> None:
        tensor = next(t for t in proto.graph.initializer if t.name == "blocks.0.mlp.fc1.weight")
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 1.01, tensor.name))

    broken = verify(edited(path, tmp_path / "b.onnx", scaled), trained / "run", device="cpu")
    assert re.match("it is not what it was when it was exported: max relative difference", broken.problems[0])
    assert re.match("it differs from PyTorch", broken.problems[1])
    with raises(InputError, match="was exported from other weights"):
        verify(path, trained / "run" / "checkpoints" / "step-000000006", device="cpu")
    with raises(InputError, match="--parity needs the source"):
        verify(path, parity=["x"], device="cpu")

    def without_probe(proto) -> None:
        spec = json.loads(proto.metadata_props[0].value)
        del spec["probe"]
        proto.metadata_props[0].value = json.dumps(spec)

    with raises(InputError, match="older than --verify"):
        verify(edited(path, tmp_path / "c.onnx", without_probe), device="cpu")


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("pool", ["avg+cls", "avg+std", "avg2x2", "tokens"])
def test_verify_of_every_kind(trained: Path, tmp_path: Path, precision: str, pool: str) -> None:
    whiten = () if pool == "tokens" else (str(trained / "shards"),)
    options = dict(precision=precision, pool=pool, whiten=whiten, whiten_dim=8 if whiten else None)
    result = export(ExportConfig(trained / "run", tmp_path / "e.onnx", **options))
    assert result.dim == (32 if pool == "tokens" else 8)
    again = verify(tmp_path / "e.onnx", trained / "run", device="cpu")
    assert again.problems == ()
    assert again.probe.min_cosine > 0.99999
    assert again.parity is not None
    assert result.parity is not None
    assert again.parity.mean_cosine == pytest.approx(result.parity.mean_cosine, abs=1e-3)


def test_verify_needs_no_torch(trained: Path, tmp_path: Path, python: list[str]) -> None:
    """An embedding worker can see that the file does there what it did on the trainer."""
    import subprocess

    code = (
        "import sys; from maekit.exporters.verify import verify; "
        f"print(verify({str(trained / 'encoder.onnx')!r}, device='cpu').problems, 'torch' in sys.modules)"
    )
    done = subprocess.run([*python, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.split() == ["()", "False"]


def test_inspect_says_which_provider_takes_what(trained: Path) -> None:
    described = inspect(InspectConfig(str(trained / "encoder.onnx"), providers=True))
    cpu = described["providers"]["CPUExecutionProvider"]["CPUExecutionProvider"]
    assert cpu["Attention"] == 2
    cuda = described["providers"]["CUDAExecutionProvider"]
    assert "CUDAExecutionProvider" in cuda or "does not work here" in cuda
    assert "probe" not in described["maekit"]
    with raises(InputError, match=r"--providers is for \.onnx files"):
        inspect(InspectConfig(str(trained / "run"), providers=True))


def test_tokens_are_not_embedded(trained: Path, tmp_path: Path) -> None:
    export(ExportConfig(trained / "run", tmp_path / "t.onnx", pool="tokens"))
    described = inspect(InspectConfig(str(tmp_path / "t.onnx")))
    assert described["outputs"] == {"tokens": "float [batch, 16, 32]"}
    with raises(InputError, match="gives the tokens of each image"):
        maekit.Embedder(tmp_path / "t.onnx", device="cpu")
    session = onnxruntime.InferenceSession(tmp_path / "t.onnx", providers=["CPUExecutionProvider"])
    (tokens,) = session.run(["tokens"], {"images": np.zeros((2, 32, 32, 3), np.uint8)})
    np.testing.assert_allclose(np.linalg.norm(tokens, axis=-1), 1, atol=1e-5)


def test_weights_that_another_model_needs_stay(trained: Path, divided: Path, monkeypatch) -> None:
    """A copy of the file beside it names the same weights."""
    shutil.copy(divided, divided.with_name("copy.onnx"))
    export(ExportConfig(trained / "run" / "checkpoints" / "step-000000006", divided))
    maekit.Embedder(divided.with_name("copy.onnx"), device="cpu")
    assert len(list(divided.parent.glob("*.data"))) == 2
    divided.with_name("copy.onnx").unlink()
    # An export that fails while another one to the same name has finished takes nothing from it.
    original = writing.files.atomic_file

    def interrupted(path, **options):
        if path == divided:
            raise MaekitError("interrupted")
        return original(path, **options)

    monkeypatch.setattr(writing.files, "atomic_file", interrupted)
    with raises(MaekitError, match="interrupted"):
        export(ExportConfig(trained / "run" / "checkpoints" / "step-000000006", divided))
    maekit.Embedder(divided, device="cpu")


def test_what_a_killed_export_left_is_removed_in_time(trained: Path, tmp_path: Path) -> None:
    left = [tmp_path / ".e.onnx.77.0.tmp", tmp_path / "e-0123456789abcdef.onnx.data"]
    others = [tmp_path / ".f.onnx.77.0.tmp", tmp_path / "e-mine.onnx.data", tmp_path / "e.onnx.data"]
    for path in (*left, *others):
        path.write_bytes(b"x")
    export(ExportConfig(trained / "run", tmp_path / "e.onnx"))
    assert all(path.exists() for path in left)  # it may be at work yet
    for path in (*left, *others):
        os.utime(path, (0, 0))
    export(ExportConfig(trained / "run", tmp_path / "e.onnx"))
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in others)


def test_a_terminated_export_leaves_nothing(trained: Path, tmp_path: Path, python: list[str]) -> None:
    code = (
        "import os, signal, maekit.exporters.export as module; from maekit.cli.app import main; import sys; "
        "module.measure = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM); "
        f"sys.argv = ['maekit', 'export', {str(trained / 'run')!r}, '--out', 'e.onnx']; main()"
    )
    done = subprocess.run([*python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 75, done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def metadata(change) -> object:
    def edit(proto) -> None:
        entry = proto.metadata_props[0]
        spec = json.loads(entry.value)
        entry.value = change if isinstance(change, str) else json.dumps({**spec, **change})

    return edit


@pytest.mark.parametrize(
    "change",
    [
        "[" * 100_000,
        "[1]",
        "nonsense",
        {"dim": float("inf")},
        {"preprocess": None},
        {"preprocess": {"size": [float("inf"), 1]}},
        {"preprocess": {"size": [30000, 30000], "resize": [30000, 30000], "mean": [0] * 3, "std": [1] * 3}},
        {"checkpoint": "x"},
        {"checkpoint": None},
        {"whitening": {}},
        {"whitening": "x"},
        {"probe": {"shape": [8, 32], "float32": "AAAA"}},
        {"probe": {"shape": [8, 32], "float32": "%%"}},
        {"precision": "fp4"},
    ],
    ids=lambda change: str(change)[:40],
)
def test_metadata_of_another_kind(trained: Path, tmp_path: Path, change, capsys) -> None:
    """Every command says so in one line, whatever stands there."""
    path = edited(trained / "encoder.onnx", tmp_path / "e.onnx", metadata(change))
    with raises(InputError, match=METADATA_KEY):
        verify(path, trained / "run", device="cpu")
    inspect(InspectConfig(str(path)))
    if isinstance(change, str) or {"dim", "preprocess"} & set(change):
        with raises(InputError, match=METADATA_KEY):
            maekit.Embedder(path, device="cpu")


def test_inspect_of_odd_files(trained: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    from maekit.cli.inspect import command

    odd = ['[{"a": 1}, 2]', '[{"problem": 1}]', json.dumps({"model": "\x1b]0;owned\x07", "\x1b[2J": 1}), "[" * 9000]
    for number, text in enumerate(odd):
        path = edited(trained / "encoder.onnx", tmp_path / f"{number}.onnx", metadata(text))
        command(thing=str(path), providers=None, as_json=False)
    assert "\x1b" not in capsys.readouterr().out

    def of_type_99(proto) -> None:
        proto.graph.input[0].type.tensor_type.elem_type = 99

    described = inspect(InspectConfig(str(edited(trained / "encoder.onnx", tmp_path / "t.onnx", of_type_99))))
    assert described["inputs"]["images"].startswith("unknown")
