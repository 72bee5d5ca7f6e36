"""`maekit export --verify` and the metadata: no field of them can be changed without being seen."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from maekit.config.export import ExportConfig
from maekit.encoder_file import DIGEST, METADATA_KEY, metadata_digest
from maekit.exporters.export import export
from maekit.exporters.verify import verify
from maekit.system.errors import MaekitError


def leaves(value: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a JSON object that is no object or list."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, *path, key)
    else:
        yield path


def changed(value: Any) -> Any:
    """Return another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1 if isinstance(value, int) else value * 1.01 + 1e-9
    if value in ("bicubic", "center", "avg", "fp32"):
        return {"bicubic": "bilinear", "center": "squash", "avg": "cls", "fp32": "fp16"}[value]
    return f"B{value[1:]}" if value else {"dim": 3}


def read(path: Path) -> dict[str, Any]:
    return json.loads(onnx.load(path).metadata_props[0].value)


def written(spec: dict[str, Any], model: Path, out: Path) -> Path:
    proto = onnx.load(model)
    assert proto.metadata_props[0].key == METADATA_KEY
    proto.metadata_props[0].value = json.dumps(spec)
    onnx.save(proto, out)
    return out


def edits(spec: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every change of one value, with its name."""
    for path in leaves(spec):
        edited = copy.deepcopy(spec)
        place = edited
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = changed(place[path[-1]])
        yield ".".join(map(str, path)), edited


def is_found(path: Path, *source: Path) -> bool:
    try:
        return bool(verify(path, *source, device="cpu").problems)
    except MaekitError:
        return True


@pytest.fixture(scope="module", params=["plain", "whitened"])
def exported(trained: Path, tmp_path_factory, request) -> Path:
    path = tmp_path_factory.mktemp(request.param) / "e.onnx"
    whiten = {"whiten": (str(trained / "shards"),), "whiten_dim": 8} if request.param == "whitened" else {}
    export(ExportConfig(trained / "run", path, **whiten))
    return path


def test_each_edit_of_each_field_is_found(exported: Path, tmp_path: Path) -> None:
    """On any machine, without the source."""
    sound = verify(exported, device="cpu")
    assert (sound.problems, sound.unchecked) == ((), ())
    spec = read(exported)
    names = [name for name, edited in edits(spec) if not is_found(written(edited, exported, tmp_path / "e.onnx"))]
    assert names == []
    for key in spec.keys() - {DIGEST}:
        without = {other: value for other, value in spec.items() if other != key}
        assert is_found(written(without, exported, tmp_path / "e.onnx")), key


def test_an_edit_that_mends_the_digest_is_found_by_the_graph_or_the_source(
    trained: Path, exported: Path, tmp_path: Path
) -> None:
    """What is left are figures about the export itself, which nothing but the digest holds."""
    spec = read(exported)

    def left(digest: bool, *source: Path) -> set[str]:
        names = set()
        for name, edited in edits(spec):
            if name in (DIGEST, "probe.float32"):  # the last bit of a recorded row is within the tolerance
                continue
            edited.pop(DIGEST)
            if digest:
                edited[DIGEST] = metadata_digest(edited)
            if not is_found(written(edited, exported, tmp_path / "e.onnx"), *source):
                names.add(name)
        return names

    alone, beside = left(False), left(True, trained / "run")
    for name in ("normalize", "dim", "precision", "preprocess.size.0", "preprocess.antialias"):
        assert name not in alone
    assert {name.split(".")[0] for name in beside} <= {"parity", "maekit", "whitening"}
    assert "whitening.dim" not in beside | alone
    told = verify(written({k: v for k, v in spec.items() if k != DIGEST}, exported, tmp_path / "e.onnx"), device="cpu")
    assert told.problems == ()
    for name in alone:
        assert any(name == known or name.startswith(f"{known}.") for known in told.unchecked), name
