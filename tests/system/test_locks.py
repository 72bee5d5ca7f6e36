"""A lock has one owner: on one machine, between machines, and after the owner died."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maekit.system import locks
from maekit.system.locks import LockedError, owned, still_owns


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    """On one machine the kernel decides, whatever a dead process left; of another machine, the file's time does."""
    path = tmp_path / "locks" / "a"
    script = f"""
from pathlib import Path
from maekit.system.locks import LockedError, owned
try:
    with owned(Path({str(path)!r})):
        print("had it")
except LockedError as held:
    print(held.owner)
"""

    def other() -> str:
        done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    with owned(path):
        assert other() == f"process {os.getpid()} on {os.uname().nodename}"
        assert still_owns(path)
        with pytest.raises(LockedError), owned(path):
            pass
        path.unlink()
        path.write_text("")  # taken over by another machine, while this one stood still
        assert not still_owns(path)
    assert other() == "had it"
    assert not path.exists()
    path.write_text(f"process 1 on {os.uname().nodename}\n")  # killed here
    assert other() == "had it"
    path.write_text("process 1 on elsewhere\n")
    assert other().startswith("process 1 on elsewhere")
    old = time.time() - locks.STALE_SECONDS - 5
    os.utime(path, (old, old))
    assert other() == "had it"


def test_a_lock_shows_that_its_owner_lives(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(locks, "_heart", None)
    path = tmp_path / "lock"
    with owned(path):
        os.utime(path, (0, 0))
        until = time.monotonic() + 10
        while path.stat().st_mtime < time.time() - 60:
            assert time.monotonic() < until
            time.sleep(0.01)
