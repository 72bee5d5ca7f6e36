"""One owner of a directory: a second is refused, and a killed one leaves nothing behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from support.errors import raises

from maekit.system.errors import InputError
from maekit.system.locks import sole_owner

HOLD = """
import os, sys
from pathlib import Path
from maekit.system.locks import sole_owner
with sole_owner(Path(sys.argv[1])):
    if os.fork() == 0:  # a worker: it does not inherit the lock, and outlives its parent
        os.close(1)
        sys.stdin.read()
        os._exit(0)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_killed_owner_frees_a_directory_even_if_its_workers_live(tmp_path: Path) -> None:
    held = tmp_path / "new" / "run"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(held)], **pipes) as other:
        assert other.stdout.readline() == "held\n"
        said = f"run is in use by process {other.pid} on {os.uname().nodename}; wait"
        with raises(InputError, match=said), sole_owner(held):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
        with sole_owner(held):
            assert (held / ".lock").read_text() == f"process {os.getpid()} on {os.uname().nodename}\n"
    assert (held / ".lock").exists()


def test_a_directory_in_which_nothing_was_written_goes_again(tmp_path: Path) -> None:
    with sole_owner(tmp_path / "empty"):
        pass
    assert not (tmp_path / "empty").exists()
    (tmp_path / "old").mkdir()
    for name in ("old", "used"):
        with sole_owner(tmp_path / name):
            (tmp_path / name / "file").touch()
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == [".lock", "file"]
    (tmp_path / "file").touch()
    with raises(InputError, match="cannot write to"), sole_owner(tmp_path / "file"):
        pass
