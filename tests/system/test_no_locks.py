"""File systems without POSIX locks: one owner all the same, dead with its process or by its heartbeat."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.errors import raises

from maekit.system import files, locks
from maekit.system.errors import InputError, MachineWarning
from maekit.system.locks import LockedError, owned, sole_owner, still_owns

LACK = """
import errno, fcntl, os, sys
from pathlib import Path
def lack(*_):
    raise OSError({number}, os.strerror({number}))
fcntl.lockf = lack
from maekit.system.locks import LockedError, owned, sole_owner
"""
HOLD = """
with sole_owner(Path(sys.argv[1])), owned(Path(sys.argv[1]) / "locks" / "shard"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL], ids=errno.errorcode.get)
def number(request, monkeypatch) -> int:
    def lack(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "lockf", lack)
    monkeypatch.setattr(files, "_told", set())
    return request.param


@pytest.mark.filterwarnings("ignore::maekit.system.errors.MachineWarning")
def test_one_owner_that_a_kill_frees_at_once(tmp_path: Path, number: int) -> None:
    held = tmp_path / "run"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", LACK.format(number=number) + HOLD, str(held)], **pipes) as other:
        assert other.stdout.readline() == "held\n"
        for _ in range(2):  # a refusal changes nothing
            with raises(InputError, match=f"in use by process {other.pid} on "), sole_owner(held):
                pass
        with pytest.raises(LockedError), owned(held / "locks" / "shard"):
            pass
        other.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # dead, and its parent has not yet asked
        with sole_owner(held), owned(held / "locks" / "shard"):
            assert still_owns(held / "locks" / "shard")
            with pytest.raises(LockedError), owned(held / "locks" / "shard"):
                pass
        assert other.stderr.read().count("has no locks") == 1
    with sole_owner(held):  # this process lives, and has let it go
        pass
    assert sorted(path.name for path in held.rglob("*")) == [".lock", "locks"]


def test_the_note_comes_once(tmp_path: Path, number: int) -> None:
    lock = sole_owner(tmp_path / "a")
    with pytest.warns(MachineWarning, match="has no locks"):
        lock.__enter__()
    with warnings.catch_warnings(action="error"), owned(tmp_path / "b"):
        lock.__exit__(None, None, None)


@pytest.mark.filterwarnings("ignore::maekit.system.errors.MachineWarning")
def test_another_machine_or_container_is_judged_by_its_heartbeat(tmp_path: Path, number: int) -> None:
    host, own = socket.gethostname(), locks._born(os.getpid())
    other_container = own.rpartition(" ")[0] + " 1"
    earlier = own.replace("born ", "born 9")
    for text, lives in (
        ("process 1 on elsewhere\n", True),
        (f"clearing up, process 1 on elsewhere\ntoken\n{own}\n", True),
        (f"process {os.getpid()} on {host}\ntoken\n{other_container}\n", True),
        (f"process {os.getppid()} on {host}\ntoken\n{earlier}\n", False),  # the number was given anew
        (f"process {2**22 + 5} on {host}\ntoken\n{own}\n", False),
        ("", False),
    ):
        path = tmp_path / "lock"
        path.write_text(text)
        with (tmp_path / "lock").open("r+") as file:
            assert locks._lives(file, path) is lives
        if lives:
            old = time.time() - locks.STALE_SECONDS - 5
            os.utime(path, (old, old))
        with owned(path):
            assert still_owns(path)


@pytest.mark.filterwarnings("ignore::maekit.system.errors.MachineWarning")
def test_of_many_that_start_together_one_wins(tmp_path: Path, number: int) -> None:
    """After one that was killed, too, whose lock all of them find."""
    (tmp_path / "lock").write_text(f"process {2**22 + 5} on {socket.gethostname()}\nt\n{locks._born(os.getpid())}\n")
    script = LACK.format(number=number) + (
        "try:\n    with owned(Path(sys.argv[1])): print('mine', flush=True); sys.stdin.read()\n"
        "except LockedError: print('refused', flush=True)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "lock")]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        said = list(pool.map(lambda process: process.stdout.readline(), started))
    for process in started:
        process.communicate()
    assert sorted(said) == ["mine\n"] + ["refused\n"] * 5
