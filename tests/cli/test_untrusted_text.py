"""Names and words of others, as the command line and the pages show them."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from support.pages import parse
from support.shards import jpeg, write_shard

from maekit.cli.show import Bar, plain, print_table, say
from maekit.encoder_file import METADATA_KEY
from maekit.pages.html import document, facts, picture, table
from maekit.runs import RunDirectory
from maekit.system.text import printable

OBEYED = "\x00\x07\x1b\x7f\x9b\u200b\u200e\u200f\u202e\u2066\u2069\ufeff\U000e0041"
HOSTILE = [
    "\x1b[2J\x1b]0;owned\x07",
    "gnp\u202egpj",
    "zero\u200bwidth\ufeff",
    "\u2066isolate",
    "two\nlines\r",
    "[red]x[/]",
    "[/]",
    ":cat:",
    "\x9b31m",
]


def run(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "maekit", *arguments]
    ran = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert "Traceback" not in ran.stderr
    assert not set(OBEYED) & set(ran.stdout + ran.stderr)
    return ran


def test_what_is_no_sign_is_spelled_out() -> None:
    assert [printable(name) for name in HOSTILE[:5]] == [
        r"\x1b[2J\x1b]0;owned\x07",
        r"gnp\u202egpj",
        r"zero\u200bwidth\ufeff",
        r"\u2066isolate",
        r"two\nlines\r",
    ]
    assert printable("Größe 東京\u3000👍 עברית [red] \\x1b") == "Größe 東京\u3000👍 עברית [red] \\x1b"
    assert printable("\udcff\ud83d") == r"\udcff\ud83d"
    assert not set(OBEYED) & set(printable("".join(map(chr, range(0x2100)))))


@pytest.mark.parametrize("name", HOSTILE)
def test_every_door_of_the_command_line(name: str, capsys) -> None:
    from rich.console import Console

    say(name)
    say(name, error=True)
    print_table((name,), [(name,)])
    shown = capsys.readouterr()
    assert [line.rstrip() for line in (shown.out + shown.err).splitlines()] == [plain(name)] * 4
    bar, terminal = Bar(), io.StringIO()
    bar._console = Console(file=terminal, width=200)
    bar.note(name)
    bar.start(name, 3)
    bar.figures({"binds": name})
    bar.stop()
    assert terminal.getvalue().count(plain(name)) == 3


def test_hostile_names_through_the_commands(trained: Path, tmp_path: Path) -> None:
    names = [name.replace("\n", "").replace("\r", "") for name in HOSTILE]
    images = {f"{name}-{i}": {"jpg": jpeg(i) if i else b"\x1b[2J"} for name in names for i in range(2)}
    write_shard(tmp_path / "shards" / f"{names[0].replace('/', '')}.tar", images)
    write_shard(tmp_path / "shards" / "[red]x[].tar", {"[/]": {"\x1b[2Jbin": b"1", "jpg": jpeg(5)}})
    (tmp_path / "shards" / "\x1b[1mcut.tar").write_bytes(b"\x1b[2J" * 300)
    model = str(trained / "encoder.onnx")
    assert r"\x1b[1mcut.tar" in run(tmp_path, "check", "shards", "--images").stderr
    listed = json.loads(run(tmp_path, "check", "shards", "--images", "--json").stdout.splitlines()[-1])
    assert {failure["key"] for failure in listed["images"]["examples"]} == {f"{name}-0" for name in names}
    run(tmp_path, "embed", model, "shards", "--out", "out", "--device", "cpu")
    run(tmp_path, "embed", model, "shards", "--out", "out", "--device", "cpu", "--verify")
    run(tmp_path, "inspect", "out")
    errors = "".join(path.read_text() for path in (tmp_path / "out/_maekit/errors").glob("*.jsonl"))
    assert {json.loads(line)["key"] for line in errors.splitlines()} == {f"{name}-0" for name in names}
    run(tmp_path, "neighbours", "out", "--query", f"{names[1]}-1", "--out", "page.html", "--shards", "shards")
    assert r"gnp\u202egpj-1" in parse(tmp_path / "page.html").text
    assert not set(OBEYED) & set((tmp_path / "page.html").read_text())
    for name in (names[0], names[1]):
        assert printable(name) in run(tmp_path, "inspect", f"no{name}").stderr
        assert printable(name)[:9] in "".join(run(tmp_path, "check", "shards", f"--{name}").stderr)
        run(tmp_path, name)


def test_defects_warnings_and_logs_of_libraries(tmp_path: Path) -> None:
    script = """
import logging, sys, warnings
import maekit.cli.app as cli
def fail(**options):
    said = "\\x1b[2J of https://bob:s3cr3t@host/x.tar?sig=s3cr3t"
    warnings.warn(said)
    logging.getLogger("library").error(said)
    raise ValueError(said)
cli.app = fail
cli.main()
"""
    debug = {**os.environ, "MAEKIT_DEBUG": "1"}  # the traceback, too
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, cwd=tmp_path, env=debug, capture_output=True, text=True, check=False)
    assert ran.stderr.count(r"\x1b[2J of https://***@host/x.tar?***") == 4
    assert "s3cr3t" not in ran.stderr
    assert "\nTraceback (most recent call last):\n" in ran.stderr


def test_words_of_an_onnx_file_and_a_config(trained: Path, tmp_path: Path) -> None:
    proto = onnx.load(trained / "encoder.onnx")
    for entry in proto.metadata_props:
        if entry.key == METADATA_KEY:
            entry.value = json.dumps({**json.loads(entry.value), "model": "".join(HOSTILE), HOSTILE[0]: HOSTILE})
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "\x1b[2J"
    onnx.save(proto, tmp_path / "x.onnx")
    assert r"\x1b[2J\x1b]0;owned\x07" in run(tmp_path, "inspect", "x.onnx").stdout
    config = (trained / "run" / "config.toml").read_text()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.toml").write_text(config.replace('shards = ["', 'shards = ["\\u001b[2J\\u202e'))
    assert r"\x1b[2J\u202e" in run(tmp_path, "inspect", "run").stdout
    assert RunDirectory(tmp_path / "run").config().shards[0].startswith("\x1b[2J\u202e")
    run(tmp_path, "report", "run", "--device", "cpu")
    assert not set(OBEYED) & set((tmp_path / "run/report.html").read_text())


def test_pages_show_names_and_do_not_obey_them(tmp_path: Path) -> None:
    import numpy as np

    black = np.zeros((8, 8, 3), np.uint8)
    parts = [facts([(name, name) for name in HOSTILE]), table(HOSTILE, [HOSTILE]), picture(black, HOSTILE[1])]
    (tmp_path / "x.html").write_bytes(document(HOSTILE[0], "\udcff https://bob:s3cr3t@h?s3cr3t", parts))
    page = parse(tmp_path / "x.html")
    assert not set(OBEYED) & set(page.source)
    assert "s3cr3t" not in page.source
    assert page.cells == [[printable(name) for name in HOSTILE]] * 2
