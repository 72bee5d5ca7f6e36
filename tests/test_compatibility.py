"""Runs, outputs and ONNX files written by commit e787043 still resume, load and verify, and no name has changed.

tests/data/e787043 was made there with `maekit pretrain` (finished; stopped at step 4 of 8; variant: another decoder,
other masks and positions), `evaluate knn`, `evaluate finetune` (stopped at step 3 of 6), `export` (encoder.onnx,
whitened; int8.onnx, of variant) and `embed` in both layouts. shards/ holds 19 images and 2 samples without one.
"""

import json
import re
import shutil
import tarfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

import maekit
from maekit.cli.app import app

OLD = Path(__file__).parent / "data" / "e787043"
NAMES = Path(__file__).parent / "data" / "names.json"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy, as the current directory: its configs name their shards relative to that."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def run(*arguments: str, code: int = 0) -> dict[str, Any]:
    """Run a command in the current directory and return what `--json` prints."""
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == code, f"{done.exception!r} {done.output}"
    return json.loads(done.stdout.splitlines()[-1])


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    """Return all files but locks; without the time of an input, which a copy of it changes."""
    paths = (p for p in folder.rglob("*") if p.is_file() and "/.lock" not in str(p))
    return {str(p.relative_to(folder)): re.sub(rb'"input_version".*', b"", p.read_bytes()) for p in paths}


@pytest.mark.parametrize("name", ["finished", "variant"])
def test_a_finished_run_is_finished(old: Path, name: str) -> None:
    before = files(old / name)
    summary = run("pretrain", "shards", "--out", name, "--config", f"{name}/config.toml")
    assert summary["already_finished"]
    assert summary["steps"] == 8
    assert files(old / name) == before


def test_a_stopped_run_goes_on_to_the_same_end(old: Path) -> None:
    """Its eight steps are those of the run that was not stopped: samples, crops, masks and so the losses."""
    summary = run("pretrain", "shards", "--out", "stopped", "--config", "stopped/config.toml")
    assert (summary["steps"], summary["resumed_from"]) == (8, 4)
    ours, expected = rows(old / "stopped" / "metrics.jsonl"), rows(old / "finished" / "metrics.jsonl")
    assert [row["step"] for row in ours] == list(range(1, 9))
    for key in ("loss", "lr", "grad_norm"):
        # Two releases of PyTorch differ by up to 0.12 % in the norm of a gradient.
        np.testing.assert_allclose([r[key] for r in ours], [r[key] for r in expected], rtol=3e-3)
    assert [row["bad"] for row in ours] == [row["bad"] for row in expected]


def test_a_stopped_finetuning_goes_on(old: Path) -> None:
    settings = ("--steps", "6", "--batch-size", "4", "--max-bad", "0.5")
    summary = run(
        "evaluate", "finetune", "finished", "--train", "shards", "--test", "shards", "--out", "finetuned", *settings
    )
    assert summary["steps"] == 6
    assert sorted({row["step"] for row in rows(old / "finetuned" / "metrics.jsonl")}) == list(range(1, 7))


def test_an_output_is_already_there(old: Path) -> None:
    """Both layouts; not a byte of them changes."""
    for out, options in (
        ("embeddings", ("--keep", "json,cls")),
        ("embeddings-npy", ("--format", "npy", "--dtype", "float16", "--limit", "15")),
    ):
        before = files(old / out)
        summary = run("embed", "encoder.onnx", "shards", "--out", out, "--device", "cpu", "--verify", *options)
        assert (summary["shards"], summary["skipped"]) == (0, 2)
        assert summary["verified"]["problems"] == []
        assert files(old / out) == before


def test_an_onnx_file_gives_what_it_gave(old: Path) -> None:
    assert maekit.verify("encoder.onnx").problems == ()
    run("export", "--verify", "int8.onnx")
    table = pq.read_table("embeddings/000.parquet")
    with tarfile.open("shards/000.tar") as tar:
        images = [tar.extractfile(f"{key}.jpg").read() for key in table["key"].to_pylist()]
    expected = np.stack(table["embedding"].to_numpy())
    np.testing.assert_allclose(maekit.Embedder("encoder.onnx", device="cpu")(images), expected, atol=1e-4)


def test_an_old_run_is_exported_as_before(old: Path) -> None:
    """The export of today and the file of then embed alike."""
    run("export", "finished", "--out", "again.onnx", "--whiten", "shards", "--whiten-dim", "6")
    image = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)
    ours, theirs = (maekit.Embedder(path, device="cpu")(list(image)) for path in ("again.onnx", "encoder.onnx"))
    np.testing.assert_allclose(np.abs((ours * theirs).sum(1)), 1, atol=1e-3)


def test_an_evaluation_of_then_stands_in_the_report(old: Path) -> None:
    maekit.report(maekit.ReportConfig("finished"))
    assert "untrained" in Path("finished/report.html").read_text()


def test_names_that_scripts_and_files_use(old: Path) -> None:
    """Options, and the keys of TOML, JSON, records, footers and metadata, are those of data/names.json.

    A name that is new is added there by hand; one that is gone breaks somebody's script or an older file.
    """
    found = {"options": dict(options(typer.main.get_command(app), "maekit")), "keys": dict(sorted(keys(old)))}
    assert found == json.loads(NAMES.read_text()), json.dumps(found)


def options(command: Any, name: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the option names of a command and of all below it."""
    for sub, below in sorted(getattr(command, "commands", {}).items()):
        yield from options(below, f"{name} {sub}")
    flags = sorted(flag for p in command.params for flag in (*p.opts, *p.secondary_opts) if flag.startswith("-"))
    yield name, flags


def keys(old: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the keys of every kind of file that is written, and of every summary that is printed."""
    Path("pictures").mkdir()
    import onnx
    from safetensors import safe_open

    command = ("pretrain", "shards", "--out", "new", "--config", "finished/config.toml", "--val", "shards")
    yield "json of pretrain", flat(run(*command))
    yield "json of inspect RUN", flat(run("inspect", "new"))
    yield "config.toml", flat(tomllib.loads(Path("new/config.toml").read_text()))
    yield "metrics.jsonl", sorted({key for row in rows(Path("new/metrics.jsonl")) for key in row})
    checkpoint = next(Path("new/checkpoints").iterdir())
    yield "state.json", sorted(json.loads((checkpoint / "state.json").read_text()))
    yield "manifest.json", flat(json.loads((checkpoint / "manifest.json").read_text()))
    for name in ("model", "optimizer"):
        with safe_open(checkpoint / f"{name}.safetensors", "numpy") as file:
            yield f"{name}.safetensors", sorted({*file.keys(), *(file.metadata() or {})})
    with safe_open("new/encoder.safetensors", "numpy") as file:
        described = {key: value for key, value in file.metadata().items() if not value.startswith("{")}
        nested = {k: json.loads(v) for k, v in file.metadata().items() if v.startswith("{")}
        yield "encoder.safetensors", sorted({*file.keys(), *described, *flat(nested)})
    command = ("evaluate", "finetune", "new", "--train", "shards", "--test", "shards", "--out", "tuned")
    yield "json of finetune", flat(run(*command, "--steps", "1", "--batch-size", "4", "--max-bad", "0.5"))
    yield "finetune.toml", flat(tomllib.loads(Path("tuned/finetune.toml").read_text()))
    yield "start.json", flat(json.loads(Path("tuned/start.json").read_text()))
    yield "json of export", flat(run("export", "new", "--out", "new.onnx", "--whiten", "shards", "--whiten-dim", "6"))
    yield "json of inspect ONNX", flat(run("inspect", "new.onnx"))
    metadata = {entry.key: entry.value for entry in onnx.load("new.onnx").metadata_props}
    yield "ONNX metadata", flat({key: json.loads(value) for key, value in metadata.items()})
    yield "json of export --verify", flat(run("export", "--verify", "new.onnx"))
    command = ("embed", "new.onnx", "shards", "--out", "rows", "--device", "cpu", "--keep", "json", "--verify")
    yield "json of embed", flat(run(*command))
    yield "commit record", flat(json.loads(Path("rows/_maekit/000.tar.json").read_text()))
    yield "errors row", sorted(rows(next(Path("rows/_maekit/errors").rglob("*.jsonl")))[0])
    yield ".output.json", flat(json.loads(Path("rows/_maekit/.output.json").read_text()))
    schema = pq.read_schema("rows/000.parquet")
    footer = {key.decode(): json.loads(value) for key, value in schema.metadata.items() if key.startswith(b"maekit")}
    yield "parquet", [*schema.names, *flat(footer)]
    yield "json of inspect SHARDS", flat(run("inspect", "shards"))
    yield "json of check", flat(run("check", "shards", "--images", "--stats", code=1))
    Image.new("RGB", (9, 9)).save("pictures/a.png")
    yield "json of pack", flat(run("pack", "pictures", "packed"))
    for task in ("knn", "linear", "retrieval"):
        summary = run(
            "evaluate", task, "new", "--train", "shards", "--test", "shards", "--no-baselines", "--pool", "avg"
        )
        yield f"json of evaluate {task}", flat(summary)
    yield "json of neighbours", flat(run("neighbours", "rows", "--query", "0001", "--out", "page.html"))
    yield "json of doctor", sorted({"problems", "findings", "rates"} & set(run("doctor")))


def flat(values: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys of nested dictionaries; those of a list's first entry stand for all."""
    found = set()
    for key, value in values.items():
        name = f"{prefix}{key}"
        found.add(name)
        if isinstance(value, dict):
            found |= set(flat(value, f"{name}."))
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            found |= set(flat(value[0], f"{name}[]."))
    return sorted(found)
