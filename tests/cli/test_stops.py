"""Signals to the command line: at any moment of a start, several at once, and those that nohup ignores."""

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from maekit.runs import RunDirectory

TINY = [
    *("--model", "vit_tiny_patch16_224", "--image-size", "32", "--patch-size", "8", "--batch-size", "4"),
    *("--set", "model.width=32", "--set", "model.depth=1", "--set", "model.heads=2", "--workers", "1"),
    *("--set", "model.decoder_width=32", "--set", "model.decoder_depth=1", "--set", "model.decoder_heads=2"),
    *("--set", "run.tensorboard=false", "--set", "run.log_every=1"),
]


def start(cwd: Path, *arguments: str, through: Sequence[str] = ()) -> subprocess.Popen[str]:
    command = [*through, sys.executable, "-m", "maekit", *arguments]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    # Whoever runs the tests may ignore hang-ups.
    asked = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=cwd, text=True, start_new_session=True, preexec_fn=asked, **streams)
    # The interpreter itself takes a moment before it can catch anything; this one is caught last.
    status = Path(f"/proc/{process.pid}/status")
    while not int(status.read_text().split("SigCgt:")[1].split()[0], 16) >> (signal.SIGUSR1 - 1) & 1:
        assert process.poll() is None
        time.sleep(0.01)
    return process


def pretrain(cwd: Path, *, steps: int = 100_000, through: Sequence[str] = ()) -> subprocess.Popen[str]:
    return start(cwd, "pretrain", "shards", "--out", "run", "--steps", str(steps), *TINY, through=through)


def until_steps(cwd: Path, process: subprocess.Popen[str], steps: int = 2) -> None:
    metrics, until = cwd / "run" / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < steps:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.01)


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Return exit code and last line; the whole group is gone, workers included."""
    said = process.communicate(timeout=60)[1]
    assert "Traceback" not in said, said
    until = time.monotonic() + 5
    while time.monotonic() < until:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.01)
    else:
        pytest.fail("a worker is left")
    return process.returncode, said.splitlines()[-1]


@pytest.fixture
def running(make_shards, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Return a training that has taken steps, in `tmp_path`."""
    make_shards(9, 7)
    process = pretrain(tmp_path)
    until_steps(tmp_path, process)
    yield process
    process.kill()


def test_sigterm_at_any_moment_of_a_start(make_shards, tmp_path: Path, rounds) -> None:
    """75 with one line, nothing left that the next start trips over."""
    make_shards(9, 7)
    moments, said = rounds(5, 30), []
    for number in range(moments):
        process = pretrain(tmp_path)
        time.sleep(4 * number / moments)  # on an idle machine, a start takes 4 seconds
        os.killpg(process.pid, signal.SIGTERM)
        code, line = end(process)
        assert code == 75, line
        said.append(line)
        assert "stopped by SIGTERM" in line
        assert not list(tmp_path.rglob(".*.tmp"))
    print(f"\n{moments} signals: all 75")
    # The next start takes up the steps that were taken.
    steps = max([int(line.split("after step ")[1].split()[0]) for line in said if "after step" in line], default=0)
    process = pretrain(tmp_path)
    until_steps(tmp_path, process, steps + 1)
    process.terminate()
    assert end(process)[0] == 75


def test_a_signal_that_the_main_thread_cannot_hear(tmp_path: Path) -> None:
    """In one long call, and inside of what catches every error."""
    script = (
        "import os, signal, threading, time\nfrom maekit.cli.program import program\n"
        "from maekit.system.files import atomic_file\nfrom pathlib import Path\n"
        "with program(ends=True), atomic_file(Path('f')):\n    print(flush=True)\n    try:\n"
        "        signal.pthread_sigmask(signal.SIG_BLOCK, [15])\n        threading.Event().wait()\n"
        "    except BaseException:\n        os._exit(2)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "\n"
    process.send_signal(signal.SIGTERM)
    before = time.monotonic()
    assert process.wait(30) == 75
    assert time.monotonic() - before < 5
    assert process.stderr.read() == "maekit: stopped by SIGTERM; run the same command again to go on\n"
    assert not list(tmp_path.iterdir())


def test_a_signal_while_the_interpreter_shuts_down(tmp_path: Path) -> None:
    """Everything is saved and said: it changes neither the exit code nor what stands on the screen."""
    script = (
        "import atexit, gc, os, signal\nfrom maekit.cli.program import program\n"
        "with program(ends=True):\n"
        "    @atexit.register\n    def interrupted():\n"
        "        gc.collect()\n        os.kill(os.getpid(), signal.SIGINT)\n"
        "        for step in range(10**6): pass\n    raise SystemExit(75)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (75, "", "")


def test_three_at_once_are_one(running: subprocess.Popen[str], tmp_path: Path) -> None:
    for _ in range(3):
        os.killpg(running.pid, signal.SIGINT)
        time.sleep(0.03)
    code, line = end(running)
    assert code == 75
    assert "stopped by SIGINT after step" in line
    newest = RunDirectory(tmp_path / "run").newest_valid()
    assert newest is not None
    assert f"after step {newest.step} of" in line


def test_a_hangup_stops_what_nohup_does_not_protect(make_shards, tmp_path: Path) -> None:
    make_shards(9, 7)
    process = pretrain(tmp_path, through=["nohup"])
    until_steps(tmp_path, process, 1)
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGUSR1)
    code, line = end(process)
    assert (code, "stopped by SIGUSR1 after step" in line) == (75, True)


@pytest.mark.parametrize("command", ["check", "export", "embed", "pack", "evaluate"])
def test_other_commands(trained: Path, tmp_path: Path, command: str) -> None:
    """What has nothing to save ends the same way: the same command does it."""
    shards, model = str(trained / "shards"), str(trained / "encoder.onnx")
    arguments = {
        "check": ["check", shards],
        "export": ["export", str(trained / "run"), "--out", "e.onnx"],
        "embed": ["embed", model, shards, "--out", "out"],
        "pack": ["pack", str(tmp_path), "out"],
        "evaluate": ["evaluate", "knn", model, "--train", shards, "--test", shards],
    }
    process = start(tmp_path, *arguments[command])
    process.send_signal(signal.SIGHUP)
    code, line = end(process)
    assert (code, "stopped by SIGHUP" in line) == (75, True)
    assert not list(tmp_path.iterdir())
