"""The command line: exit codes, one line per error, what scripts read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.shards import jpeg, write_shard

import maekit
from maekit.config import load_config

pytestmark = pytest.mark.whole

TINY = [
    *("--model", "vit_tiny_patch16_224", "--image-size", "32", "--patch-size", "8", "--batch-size", "4"),
    *("--set", "model.width=32", "--set", "model.depth=1", "--set", "model.heads=2", "--workers", "0"),
    *("--set", "model.decoder_width=32", "--set", "model.decoder_depth=1", "--set", "model.decoder_heads=2"),
]


def run(cwd: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "maekit", *arguments]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == code, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    assert "Traceback" not in result.stderr
    return result


def test_the_tests_run_against_what_is_installed() -> None:
    """In the wheel run this proves that the wheel is what is tested, every sub-package of it included."""
    import maekit.cli
    import maekit.exporters

    wheel = os.environ.get("MAEKIT_WHEEL")
    if wheel:
        for module in (maekit, maekit.cli, maekit.exporters):
            assert Path(str(module.__file__)).is_relative_to(wheel)


@pytest.mark.source
def test_every_package_is_in_the_wheel() -> None:
    """A folder that pyproject.toml does not list imports from the source tree and is missing from the wheel."""
    root = Path(__file__).parents[2]
    import tomllib

    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {str(p.parent.relative_to(root)).replace("/", ".") for p in root.glob("maekit/**/__init__.py")}
    assert set(listed) == folders | {"maekit.cli", "maekit.exporters"}


def test_workflow(make_shards, tmp_path: Path) -> None:
    """check -> pretrain -> again -> inspect -> export -> inspect -> embed, and the keys that scripts read."""
    make_shards(5, 4)
    checked = json.loads(run(tmp_path, "check", "shards", "--json").stdout.splitlines()[-1])
    assert {"samples", "shards", "bytes", "damaged", "duplicates"} <= set(checked)
    assert (checked["samples"], checked["damaged"]) == (9, 0)
    pretrain = ("pretrain", "shards", "--out", "run", "--steps", "3", *TINY, "--json")
    first = run(tmp_path, *pretrain)
    summary = json.loads(first.stdout.splitlines()[-1])
    assert {"steps", "samples", "loss", "images_per_second", "data_wait"} <= set(summary)
    assert (summary["steps"], summary["samples"]) == (3, 12)
    again = run(tmp_path, *pretrain)
    assert json.loads(again.stdout.splitlines()[-1])["already_finished"]
    assert "finished" in again.stderr
    assert json.loads(run(tmp_path, "inspect", "run", "--json").stdout)["finished"]
    shown = run(tmp_path, "inspect", "run").stdout
    assert "\nloss, step 1 to 3\n" in shown
    exported = run(tmp_path, "export", "run", "--out", "e.onnx", "--json")
    summary = json.loads(exported.stdout.splitlines()[-1])
    assert {"path", "dim", "parity"} <= set(summary)
    assert "Attention 1" in run(tmp_path, "inspect", "e.onnx").stdout
    embedded = run(tmp_path, "embed", "e.onnx", "shards", "--out", "emb", "--json")
    summary = json.loads(embedded.stdout.splitlines()[-1])
    assert {"rows", "errors", "shards", "skipped", "images_per_second", "limit_share", "provider"} <= set(summary)
    assert (summary["rows"], summary["errors"], summary["shards"], summary["skipped"]) == (9, 0, 2, 0)
    refused = run(tmp_path, "pretrain", "shards", "--out", "run", "--steps", "4", *TINY, code=2)
    assert "steps = 3" in refused.stderr


def test_a_curve_in_the_terminal() -> None:
    """From the upper left to the lower right; the first steps do not flatten the rest; few points are joined."""
    from maekit.cli.curve import draw

    points = [(step, 100.0 if step < 5 else 1 + 1 / step) for step in range(1, 200)]
    label, *lines, axis = draw(points, label="loss", width=30, height=6)
    assert label == "loss, step 1 to 199"
    assert axis.endswith("└" + "─" * 30)
    first, last = (len(line.split("│")[1]) for line in (lines[0], lines[-1]))
    assert first < 5
    assert last == 30
    assert float(lines[0].split()[0]) < 1.3
    low = [line.split("│")[1] for line in draw([(0, 1.0), (10, 0.0)], label="x", width=8, height=4)[1:-1]]
    lengths = [len(line) for line in low]
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == 8
    assert len(draw([(0, 2.0), (3, 2.0)], label="x", width=8, height=4)) == 6


def test_check_exits_1_with_one_line_and_the_offset(make_shards, tmp_path: Path) -> None:
    shards = make_shards(5)
    (shards / "cut.tar").write_bytes((shards / "000.tar").read_bytes()[:3000])
    result = run(tmp_path, "check", "shards", code=1)
    assert len(result.stderr.strip().splitlines()) == 1
    assert "cut.tar  at byte" in result.stderr
    assert "5 samples in 2 shards" in result.stdout


def test_write_index(make_shards, tmp_path: Path) -> None:
    shards = make_shards(2)
    run(tmp_path, "check", "shards", "--write-index")
    assert (shards / "000.tar.index").is_file()
    assert "\n2 samples in 1 shard," in run(tmp_path, "check", "shards").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("check", "nothing"), "no such file or directory"),
        (("check", "shards", "--crc"), "give both"),
        (("pretrain", "nothing", "--out", "run"), "no such file or directory"),
        (("pretrain", "shards"), "--out"),
        (("pretrain", "shards", "--out", "run", "--model", "vit_tny_patch16_224"), "did you mean"),
        (("pretrain", "shards", "--out", "run", "--set", "model.mask_rate=0.5"), "did you mean model.mask_ratio"),
        (("pretrain", "shards", "--out", "run", "--set", "batch_size=many"), "a whole number"),
        (("pretrain", "shards", "--out", "run", "--config", "none.toml"), "cannot read the config"),
        (("pretrain", "shards", "--out", "run", "--epochs", "1", "--steps", "1"), "give one of them"),
        (("pretrain", "shards", "--out", "run", "--micro-batch", "some"), "a whole number greater than 0, or auto"),
        (("pretrain", "shards", "--out", "shards"), "is no run"),
        (("export", "shards", "--out", "e.onnx"), "neither a run"),
        (("inspect", "nothing.onnx"), "cannot read"),
        (("inspect", "shards/000.onnx"), "no ONNX file"),
        (("inspect", "shards/empty.onnx"), "no ONNX file"),
        (("inspect", "shards/readme.txt"), "none of the things"),
        (("embed", "shards", "shards", "--out", "e"), "is a directory"),
        (("embed", "nothing.onnx", "shards", "--out", "e"), "no such file"),
        (("pack", "nothing", "out"), "no such file or directory"),
        (("demo", "--out", "shards"), "no demo made"),
    ],
)
def test_bad_usage_exits_2_with_one_line(make_shards, tmp_path, monkeypatch, capsys, arguments, said: str) -> None:
    from maekit.cli.app import main

    shards = make_shards(2)
    (shards / "000.onnx").write_bytes(b"not an onnx file")
    (shards / "empty.onnx").touch()
    (shards / "readme.txt").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["maekit", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    lines = [line for line in errors if line.startswith("maekit: ")]
    assert len(lines) == 1
    assert said in lines[0]
    assert errors[-1] == lines[0]


def test_embed_exits_1_at_the_end_when_a_shard_is_damaged(make_shards, tmp_path: Path) -> None:
    shards = make_shards(3)
    run(tmp_path, "pretrain", "shards", "--out", "run", "--steps", "1", *TINY)
    run(tmp_path, "export", "run", "--out", "e.onnx")
    (shards / "a.tar").write_bytes((shards / "000.tar").read_bytes()[:3000])
    result = run(tmp_path, "embed", "e.onnx", "shards", "--out", "emb", "--json", code=1)
    assert json.loads(result.stdout.splitlines()[-1])["rows"] == 3
    assert "a.tar: damaged at byte" in result.stderr


def test_read_only_output_exits_with_the_path(make_shards, tmp_path: Path) -> None:
    make_shards(3)
    (tmp_path / "file").write_text("")
    result = run(tmp_path, "pretrain", "shards", "--out", "file/run", "--steps", "1", *TINY, code=2)
    assert "file/run" in result.stderr


def test_pack_of_a_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{name}.jpg").write_bytes(jpeg(1))
    result = run(tmp_path, "pack", "images", "out", "--json")
    assert json.loads(result.stdout.splitlines()[-1])["samples"] == 2


LOOK = ["reconstruct", "neighbours", "report", "inspect", "doctor", "demo"]


@pytest.mark.parametrize("command", ["pack", "check", "pretrain", "export", "embed", *LOOK])
def test_every_command_has_help(tmp_path: Path, command: str) -> None:
    shown = run(tmp_path, command, "--help").stdout
    assert "Usage" in shown
    if command == "export":
        assert "[batch, height, width, 3]" in " ".join(shown.split())  # brackets are markup unless escaped


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    script = """
import sys, typer.testing
from maekit.cli.app import app
for arguments in (["--help"], *([name, "--help"] for name in ("pretrain", "embed", "report", "neighbours"))):
    assert typer.testing.CliRunner().invoke(app, arguments).exit_code == 0
heavy = {"numpy", "PIL", "torch", "timm", "onnx", "onnxruntime", "pyarrow", "webdataset"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)


def test_shards_and_images_load_nothing_heavy(tmp_path: Path) -> None:
    script = """
import sys, maekit, maekit.config, maekit.images, maekit.runs
import maekit.shards.read, maekit.shards.order, maekit.checking, maekit.shards.pack, maekit.shards.spec
heavy = {"torch", "timm", "onnx", "onnxruntime", "pyarrow", "webdataset"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)


def test_config_file_then_options_then_set(make_shards, tmp_path: Path) -> None:
    make_shards(4)
    (tmp_path / "c.toml").write_text("steps = 9\nseed = 1\nbatch_size = 2\n[optimizer]\nlr = 0.5\n")
    run(
        tmp_path,
        *("pretrain", "shards", "--out", "run", *TINY, "--config", "c.toml", "--steps", "1"),
        *("--lr", "0.25", "--set", "optimizer.lr=0.125"),
    )
    config = load_config(tmp_path / "run" / "config.toml")
    assert (config.steps, config.seed, config.batch_size, config.optimizer.lr) == (1, 1, 4, 0.125)


def test_version(tmp_path: Path) -> None:
    assert run(tmp_path, "--version").stdout.strip() == f"maekit {maekit.__version__}"


def test_a_shard_key_in_any_script(tmp_path: Path) -> None:
    write_shard(tmp_path / "s" / "ü.tar", {"日本/図": {"jpg": jpeg(1)}})
    assert "\n1 sample in 1 shard," in run(tmp_path, "check", "s").stdout
