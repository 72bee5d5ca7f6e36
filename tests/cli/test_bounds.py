"""Absurd values, names and machines: one line that names the setting and the fix, before any work."""

import errno
import itertools
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer

import maekit
import maekit.checking
from maekit.cli import app as cli
from maekit.cli.failures import described
from maekit.config.fields import settings_of, without_none

CONFIGS = [getattr(maekit, name) for name in maekit.__all__ if name.endswith("Config")]
COMMAND = typer.main.get_command(cli.app)  # once: making it anew takes longer than all that is tested
NUMBERS = ["-1", "9" * 24, "9" * 5000, "1e308", "nan", "-inf", "٣"]
TEXTS = ["", "a\nb", "x" * 5000, os.fsdecode(b"\xff\xfe"), "a\x1b[31mb"]


@pytest.fixture
def maekit_(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """The command line in this process: arguments -> exit code and what stands on standard error."""

    monkeypatch.setattr(cli, "app", COMMAND)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["maekit", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, capfd.readouterr().err  # type: ignore[return-value]

    return run


def commands() -> Iterator[tuple[list[str], Any]]:
    """Yield the words and the click command of each command but `demo`, which has a test of its own."""
    for name, command in COMMAND.commands.items():  # type: ignore[attr-defined]
        if name == "evaluate":
            yield from (([name, inner], sub) for inner, sub in command.commands.items())
        elif name != "demo":
            yield [name], command


def cases(command: Any) -> Iterator[list[str]]:
    """Yield arguments that give one option or argument of a command an absurd value, the others names of no file."""
    needed = {p.name: [*p.opts[:1], "no-such"] if p.opts[0].startswith("-") else ["no-such"] for p in command.params}
    required = {p.name: needed[p.name] for p in command.params if p.required}
    for parameter in command.params:
        if getattr(parameter, "is_flag", False) or parameter.name == "help":
            continue
        for value in (*NUMBERS, *TEXTS):
            given = [f"{parameter.opts[0]}={value}"] if parameter.opts[0].startswith("--") else [value]
            if parameter.opts[0].startswith("-") or not value.startswith("-"):
                others = (words for name, words in required.items() if name != parameter.name)
                yield [*itertools.chain(*others), *given]


@pytest.mark.parametrize(("words", "command"), [pytest.param(w, c, id=" ".join(w)) for w, c in commands()])
def test_any_option_with_any_value_is_refused_in_one_line(
    words: list[str], command: click.Command, maekit_: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every input is missing, so nothing can be done: but what is said is never a traceback, nor `unforeseen`."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for arguments in cases(command):
        code, said = maekit_(*words, *arguments)
        last = said.strip().splitlines()[-1]
        shown = f"{words} {[argument[:80] for argument in arguments]}: exit {code}: {said[-600:]}"
        assert code == 2, shown
        assert last.startswith("maekit: "), shown
        assert "╭" not in said, shown
        assert len(last) < 1000, shown
        assert "unforeseen" not in said, shown
        assert "Traceback" not in said, shown
    assert not list(tmp_path.glob("here/**/*.onnx"))


def test_every_number_is_bounded_on_both_sides() -> None:
    for config in CONFIGS:
        for key, kind, about, _ in settings_of(config):
            for number in {int, float} & set(without_none(kind)):
                if about.below == 1 << 63 or key in ("num_splits", "split"):
                    continue  # a seed; a pair that has a check of its own
                largest = 1e39 if key == "optimizer.lr" else number(10**13)
                assert about.problem(largest), f"{config.__name__} {key}"
                assert about.problem(float("nan")), f"{config.__name__} {key}"
                assert about.problem(number(-(10**13))) or key.startswith("data."), f"{config.__name__} {key}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("pretrain", "x", "--out", "y", "--steps", str(10**18)), "--steps 1000000000000000000: must be greater than"),
        (("pretrain", "x", "--out", "y", "--batch-size", str(10**12)), "at most 1048576"),
        (("pretrain", "x", "--out", "y", "--image-size", "100000"), "--image-size 100000: must be greater than 0, and"),
        (("pretrain", "x", "--out", "y", "--set", f"steps={'9' * 5000}"), "(5000 characters)': must be a whole number"),
        (("pretrain", "x", "--out", "y", "--set", f"optimizer.lr={'9' * 400}"), "must be a number"),
        (("pretrain", "x", "--out", "y", "--set", f"data.mean={'[' * 5000}"), "must be a list of 3 values"),
        (("pretrain", "x", "--out", "y", "--set", 'out="a\\u0000b"'), "no name or text may hold a NUL character"),
        (
            ("embed", "m.onnx", "x", "--out", "y", "--workers", "20000"),
            "--workers 20000: must be at least 1, and at most",
        ),
        (("check", "x", "--workers", "abc"), "--workers: "),
        (("check", "x", "--wokers", "2"), "--wokers"),
        (("embed",), "missing argument 'ENCODER.ONNX'; "),
        (("embd", "m.onnx"), "did you mean 'embed'"),
        (("check", "x", "--workers", "20000"), "--workers 20000: must be at least 1, and at most 1024"),
        (("pack", "x", "y", "--shard-mb", "1e300"), "--shard-mb 1e+300: must be at most 1000000000000"),
    ],
)
def test_the_line_names_the_setting_and_what_is_possible(arguments: tuple[str, ...], said: str, maekit_: Any) -> None:
    code, err = maekit_(*arguments)
    assert (code, err.count("\n")) == (2, 1), err
    assert said.lower() in err.lower()
    assert len(err) < 700


def raised(work: Callable[[], object]) -> BaseException:
    try:
        work()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (raised(lambda: bytearray(1 << 62)), "out of memory; use fewer --workers or a smaller --batch-size", 1),
        (raised(lambda: os.stat("x" * 5000)), "(5000 characters): File name too long", 2),
        (raised(lambda: os.stat("a\0b")), "NUL character", 2),
        (raised(lambda: os.stat("a\nb")), "a\\nb: No such file", 1),
        (OSError(errno.EMFILE, "Too many open files", "x.tar"), "x.tar: Too many open files: this process may open", 1),
        (OSError(errno.EAGAIN, "Resource temporarily unavailable"), "use fewer --workers, or raise the limit", 1),
        (OSError(errno.ENOSPC, "No space left on device", "a"), "a: No space left on device: the disk is full", 1),
        (RuntimeError("can't start new thread"), "ulimit -u", 1),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory", 1),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "out of memory", 1),
        (ImportError("libx.so.3: cannot open shared object file"), "reinstall the package that it belongs to", 1),
        (RecursionError("maximum recursion depth exceeded"), "unforeseen RecursionError", 1),
    ],
)
def test_errors_that_are_not_ours_in_one_line(error: Exception, said: str, code: int) -> None:
    line, exit_code = described(error)
    assert said in line
    assert exit_code == code
    assert "\n" not in line


def test_a_bug_names_its_place_and_how_to_report_it(
    maekit_: Any, monkeypatch: pytest.MonkeyPatch, make_shards: Any, tmp_path: Path
) -> None:
    make_shards(2)
    monkeypatch.setattr(maekit.checking, "worth_processes", lambda *_: {}["missing"])
    code, said = maekit_("check", str(tmp_path / "shards"))
    assert code == 1
    assert re.fullmatch(r"maekit: unforeseen KeyError in checking.py, line \d+: 'missing'; .*MAEKIT_DEBUG=1.*\n", said)
    monkeypatch.setenv("MAEKIT_DEBUG", "1")
    code, said = maekit_("check", str(tmp_path / "shards"))
    assert "Traceback" in said
    assert said.splitlines()[-1].startswith("maekit: unforeseen KeyError")


def test_a_working_directory_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    for command in ("check x", "doctor"):
        program = (
            f"import os, sys; os.rmdir(os.getcwd()); sys.argv[1:] = {command.split()}\n"
            "from maekit.cli.app import main\nmain()"
        )
        (tmp_path / "gone").mkdir(exist_ok=True)
        ended = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path / "gone", capture_output=True, text=True, check=False
        )
        assert ended.returncode == 2, ended.stderr
        assert ended.stderr.count("\n") == 1
        assert "the working directory is gone" in ended.stderr


@pytest.mark.parametrize(
    ("limit", "value", "said"),
    [
        (resource.RLIMIT_FSIZE, 4096, "ulimit -f"),
        (resource.RLIMIT_NOFILE, 8, "ulimit -n"),
    ],
)
def test_a_limit_of_the_shell(limit: int, value: int, said: str, make_shards: Any, tmp_path: Path) -> None:
    make_shards(3)
    ended = subprocess.run(
        [sys.executable, "-m", "maekit", "check", "shards", "--write-index", "--crc", "--images"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(limit, (value, value)),
    )
    assert ended.returncode in (0, 1, 2), ended.stderr
    assert "Traceback" not in ended.stderr
    assert "unforeseen" not in ended.stderr
    if ended.returncode:
        assert ended.stderr.strip().splitlines()[-1].startswith("maekit: ")
