"""Closed, full and broken standard streams: the work goes on to its end, and its exit code is told."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MAEKIT = f"{sys.executable} -m maekit"
CASES = [">&-", "2>&-", "<&- >&- 2>&-", "> /dev/full", "2> /dev/full", "> /dev/full 2> /dev/full", "2>&1 | head -0"]


def shell(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", f"set -o pipefail; {line}"]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr
    return result


@pytest.mark.parametrize("case", CASES)
def test_the_work_is_done_whatever_the_streams(trained: Path, tmp_path: Path, case: str) -> None:
    done = shell(f"{MAEKIT} embed {trained}/encoder.onnx {trained}/shards --out out --verify {case}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 3


@pytest.mark.parametrize(
    ("case", "code"), [*zip(CASES, (0, 0, 0, 1, 0, 1, 0), strict=True), ("--json >&-", 1), ("--json > /dev/full", 1)]
)
def test_what_is_only_printed_is_the_result(trained: Path, tmp_path: Path, case: str, code: int) -> None:
    """A report that finds no room is lost, and so is a JSON line without a place; a reader that left has read."""
    done = shell(f"{MAEKIT} check {trained}/shards {case}", tmp_path)
    assert done.returncode == code, done.stderr
    if code and "2>" not in case:
        assert done.stderr.splitlines()[-1].startswith("maekit: cannot write to standard output: ")


def test_a_command_with_an_output_needs_no_standard_output_but_for_json(trained: Path, tmp_path: Path) -> None:
    line = f"{MAEKIT} embed {trained}/encoder.onnx {trained}/shards --out out --json > /dev/full"
    done = shell(line, tmp_path)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        1,
        "maekit: cannot write to standard output: No space left on device",
    )


@pytest.mark.parametrize(("case", "code"), [("| head -1", 0), (">&-", 0), ("2>&-", 0), ("> /dev/full", 1)])
def test_help(tmp_path: Path, case: str, code: int) -> None:
    assert shell(f"{MAEKIT} --help {case}", tmp_path).returncode == code


def test_a_file_opened_later_gets_no_standard_descriptor(tmp_path: Path) -> None:
    """What is printed or warned of would go into it."""
    script = (
        "import os\nfrom maekit.cli.program import program\n"
        "with program(ends=True):\n    os.write(3, str(os.open('f', os.O_CREAT | os.O_WRONLY)).encode())\n"
    )
    done = shell(f'{sys.executable} -c "{script}" 3> out <&- >&- 2>&-', tmp_path)
    assert done.returncode == 0
    assert int((tmp_path / "out").read_text()) > 2


def test_a_slow_reader_of_a_pipe_that_does_not_block_gets_all(trained: Path, tmp_path: Path) -> None:
    """As some programs leave the pipes of their children."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    script = "from maekit.cli.program import program\nwith program(ends=True):\n    print('x' * 1_000_000)\n"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stdout=writer)
    os.close(writer)
    with open(reader) as file:
        assert len(file.read()) == 1_000_001
    assert process.wait() == 0


def test_the_json_line_comes_whole(trained: Path, tmp_path: Path) -> None:
    done = shell(f"{MAEKIT} check {trained}/shards --json 2> /dev/full", tmp_path)
    assert json.loads(done.stdout.splitlines()[-1])["samples"] == 30
