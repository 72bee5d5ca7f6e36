"""docs/tutorial.md runs from its first block to its last, as it is printed; one number is made smaller."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs" / "tutorial.md"
SHORT = ("epochs = 50\n", "epochs = 2\n")  # the page says so
SETTINGS = "small.toml"

pytestmark = pytest.mark.source


def blocks() -> list[tuple[str, str]]:
    """Return (language, text) of every fenced block, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", DOCS.read_text(encoding="utf-8"), re.M | re.S)


def command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from maekit.cli.app import main

    name, *arguments = shlex.split(line)
    assert name == "maekit"
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    code: Any = 0
    try:
        main()
    except SystemExit as done:
        code = done.code
    assert not code, f"{line}: exit {code}"


def assert_said(expected: str, said: str) -> None:
    """Each line of what the page shows was printed, whatever its numbers are."""
    printed = [" ".join(line.split()) for line in said.splitlines()]
    for line in expected.splitlines():
        # A number, alone or with others: also where a speed decides which stage is named.
        pattern = re.sub(r"\d[\d.,e-]*\d|\d", "NUMBER", " ".join(line.split()))
        pattern = (
            re.escape(pattern)
            .replace("NUMBER", r"\d[\d.,e-]*")
            .replace(r"bottleneck:\ the\ model", r"bottleneck: [\w ]+")
        )
        assert any(re.fullmatch(pattern, found) for found in printed), f"{line!r} is not in\n{said}"


def test_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    left: dict[str, Any] = {}
    said = ""
    kinds = [kind for kind, _ in blocks()]
    assert {"python", "sh", "text", "toml"} == set(kinds)
    for kind, text in blocks():
        if kind == "toml":
            assert text.count(SHORT[0]) == 1
            Path(SETTINGS).write_text(text.replace(*SHORT), encoding="utf-8")
        elif kind == "sh":
            said = ""
            for line in text.splitlines():
                command(line, monkeypatch)
                said += capsys.readouterr().out
        elif kind == "python":
            exec(compile(text, f"docs/tutorial.md, block {kinds.index(kind)}", "exec"), left)
            said = capsys.readouterr().out
        elif "similarity" in left and "index" not in left:
            assert len(said.splitlines()) == len(text.splitlines()) == 10  # which are nearest is the training's affair
        else:
            assert_said(text, said)
    # DuckDB and faiss find the same, and the page of neighbours is there.
    assert left["found"] == [key for _, key, _, _ in left["nearest"]]
    assert left["similarities"][0].tolist() == pytest.approx([row[3] for row in left["nearest"]], abs=1e-5)
    assert (tmp_path / "neighbours.html").stat().st_size > 10_000


def test_it_says_what_the_test_changes() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert all(f"`{line.strip()}`" in text for line in SHORT)
