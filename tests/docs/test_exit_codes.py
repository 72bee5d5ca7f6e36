"""The table of exit codes in docs/reliability.md: the rows that are shown `here` are run here."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from support.shards import jpeg, write_shard

from maekit.cli import app

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
TINY = (
    "--device cpu --image-size 32 --patch-size 8 --batch-size 4 --steps 1 --workers 0 --model vit_tiny_patch16_224 "
    "--no-tensorboard --set model.width=32 --set model.depth=1 --set model.heads=2 --set model.decoder_width=32 "
    "--set model.decoder_depth=1 --set model.decoder_heads=2"
)
# The situations, by the first words of their rows: what stands for INPUT, and options besides.
SITUATIONS = {
    "done": ("good", ""),
    "all already there": ("good", ""),
    "empty input": ("empty", ""),
    "shards without a sample": ("hollow", ""),
    "empty split": ("good", "--num-splits 9 --split 8"),
    "only errors": ("bad", ""),
    "some shards damaged": ("damaged", ""),
    "bad option": ("good", "--workers many"),
    "missing file": ("not-here", ""),
}
COMMANDS = {
    "pretrain": f"pretrain INPUT --out OUT {TINY}",
    "embed": "embed MODEL INPUT --out OUT",
    "check": "check INPUT --images",
    "pack": "pack INPUT-images OUT",
}

pytestmark = pytest.mark.source


def rows() -> dict[str, dict[str, str]]:
    """Return the table: situation -> command -> cell."""
    lines = PAGE.read_text(encoding="utf-8").partition("## Exit codes")[2].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    headings = [heading.strip("`") for heading in cells[0]]
    return {row[0]: dict(zip(headings, row, strict=True)) for row in cells[1:]}


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards and folders of images of each kind, in the working directory."""
    monkeypatch.chdir(tmp_path)
    samples = {f"{number}": {"jpg": jpeg(number)} for number in range(4)}
    good = write_shard(tmp_path / "good" / "a.tar", samples)
    write_shard(tmp_path / "damaged" / "a.tar", samples)
    (tmp_path / "damaged" / "b.tar").write_bytes(good.read_bytes()[:3000])
    write_shard(tmp_path / "hollow" / "a.tar", {})
    write_shard(tmp_path / "bad" / "a.tar", {f"{number}": {"jpg": b"<html>"} for number in range(40)})
    for name, content in {"good": jpeg(1), "bad": b"<html>", "empty": None, "hollow": None, "damaged": None}.items():
        (tmp_path / f"{name}-images").mkdir()
        (tmp_path / name).mkdir(exist_ok=True)
        if content:
            (tmp_path / f"{name}-images" / "a.jpg").write_bytes(content)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_code_is_that_of_the_table(
    command: str, inputs: None, trained: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shown_here = [situation for situation, row in rows().items() if row["shown by"] == "here"]
    assert [situation.partition(" (")[0] for situation in shown_here] == list(SITUATIONS)
    for number, situation in enumerate(shown_here):
        stated = re.match(r"\d+", rows()[situation][command])
        if stated is None:
            continue
        name, options = SITUATIONS[situation.partition(" (")[0]]
        out = f"out-{0 if situation == 'all already there' else number}"
        words = COMMANDS[command].replace("INPUT", name).replace("OUT", out)
        words = words.replace("MODEL", str(trained / "encoder.onnx"))
        monkeypatch.setattr(sys, "argv", ["maekit", *shlex.split(f"{words} {options}")])
        with pytest.raises(SystemExit) as ended:
            app.main()
        said = capfd.readouterr().err
        assert (ended.value.code or 0) == int(stated[0]), f"{command}, {situation}: {said}"
        assert "Traceback" not in said


def test_the_tests_that_are_named_are_there() -> None:
    for row in rows().values():
        for name in re.findall(r"`(tests/[^`]*)`", row["shown by"]):
            assert (PAGE.parents[1] / name).is_file(), name
