"""What is ready for a GPU, bench/gpu: its stages run on a CPU, and no part of them can stop the others."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "bench" / "gpu"
pytestmark = pytest.mark.source

PARTS = """
import json, os, subprocess, sys, time
part = sys.argv[1]
print("begun", part, *sys.argv[2:], flush=True)
if part == "good":
    print(json.dumps({"result": "ok", "headline": "all is well", "rate": 3}))
elif part == "wrong":
    print(json.dumps({"result": "failed", "headline": "too far apart"}))
    sys.exit(1)
elif part == "crashing":
    raise RuntimeError("no such kernel")
elif part == "dying":
    os.kill(os.getpid(), 9)
elif part == "hanging":
    child = subprocess.Popen(["sleep", "600"])
    open("child", "w").write(str(child.pid))
    import signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
"""


@pytest.fixture
def stages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("stages", FOLDER / "stages.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["stages"] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def test_a_part_that_fails_dies_or_hangs_does_not_stop_the_rest(tmp_path: Path, stages: ModuleType):
    """Each is noted as what it is, in both files; what it started is gone with it."""
    script, work, out = tmp_path / "parts.py", tmp_path / "work", tmp_path / "out"
    script.write_text(PARTS)
    work.mkdir()
    names = [("hanging", "good"), ("wrong", "crashing", "dying"), ("good",)]
    groups = tuple(tuple(stages.Part(name, 1.5) for name in group) for group in names)
    stages.run_stage(stages.Stage(script, groups), "check", out, work, ["--dry-run"], 60)
    rows = [json.loads(line) for line in (out / "check.jsonl").read_text().splitlines()]
    results = sorted((row["part"], row["result"]) for row in rows)
    assert results == [
        ("crashing", "failed"),
        ("dying", "failed"),
        ("good", "ok"),
        ("good", "ok"),
        ("hanging", "timed out"),
        ("wrong", "failed"),
    ]
    by_part = {row["part"]: row for row in rows}
    assert by_part["good"]["rate"] == 3
    assert by_part["crashing"]["headline"] == "exit code 1: RuntimeError: no such kernel"
    assert by_part["dying"]["headline"].startswith("exit code -9")
    child = Path("/proc", (work / "child").read_text(), "stat")
    assert not child.exists() or child.read_text().split()[2] == "Z"
    log = (out / "check.log").read_text()
    assert log.count("begun good") == 2
    assert f"begun hanging --work {work} --dry-run" in log
    table = stages.table(rows)
    assert all(row["part"] in table and row["result"] in table for row in rows)


def test_nothing_begins_after_the_time_of_a_stage(tmp_path: Path, stages: ModuleType):
    script, work = tmp_path / "parts.py", tmp_path / "work"
    script.write_text(PARTS)
    work.mkdir()
    groups = ((stages.Part("hanging", 60),), (stages.Part("good", 60),))
    rows = stages.run_stage(stages.Stage(script, groups), "speed", tmp_path, work, [], 1.6)
    assert [(row["part"], row["result"]) for row in rows] == [("hanging", "timed out"), ("good", "not reached")]


def test_every_part_of_a_stage_is_a_function_of_its_script(stages: ModuleType):
    for stage in stages.STAGES.values():
        listed = {part.name for group in stage.groups for part in group}
        text = stage.script.read_text()
        table = text[text.index("PARTS = {") :]
        assert sorted(re.findall(r'"(\w+)": \w', table)) == sorted(listed), stage.script.name


def test_dry_run(tmp_path: Path, rounds):
    """In its quick form the parts that can rot soonest; in the campaigns, all of every stage."""
    command = [str(FOLDER / "run.sh"), "check", "speed", "quality", "--dry-run", *["--quick"] * rounds(1, 0)]
    environment = {**os.environ, "OUT": str(tmp_path / "out")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for path in (tmp_path / "out").glob("*.jsonl") for line in path.read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"check", "speed", "quality"}
    assert {row["result"] for row in rows} <= {"ok", "skipped"}
    by_part = {(row["stage"], row["part"]): row for row in rows}
    assert by_part["check", "encoder"]["fp32"]["min_cosine"] > 0.99999
    assert by_part["speed", "card"]["matmul_flops"] > 0
    print(done.stdout)
