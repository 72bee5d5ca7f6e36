"""Runs the parts of a stage, each in a process of its own with a time limit, and notes what came of each.

    python bench/gpu/stages.py STAGE... [--dry-run] [--quick] [--seconds N] [--only PART...]

`run.sh` beside this says what the stages are. A stage is groups of parts. Groups run one after the other, the parts of
a group at the same time; what is timed has a group of its own. A part is `python STAGE.py PART`. What it prints goes to
STAGE.log; its last line, a JSON object, goes to STAGE.jsonl. A part that fails, hangs or says nothing is noted as such.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_POLL_SECONDS, _TERM_SECONDS = 0.05, 3.0


@dataclass(frozen=True)
class Part:
    """One thing to find out.

    Attributes:
        name: a function of the stage's script.
        seconds: its time limit on a GPU machine with 16 cores.
        quick: whether it belongs to the quick form of a dry run.
    """

    name: str
    seconds: float
    quick: bool = False


@dataclass(frozen=True)
class Stage:
    """Parts, and the script that holds their functions."""

    script: Path
    groups: tuple[tuple[Part, ...], ...]


STAGES: Mapping[str, Stage] = {
    "check": Stage(
        HERE / "check.py",
        (
            (Part("data", 15, quick=True), Part("doctor", 60)),
            (Part("losses", 110), Part("resume", 120), Part("encoder", 60, quick=True)),
            (Part("embedding", 45), Part("memory", 45), Part("devices", 30, quick=True)),
        ),
    ),
    "speed": Stage(
        HERE / "speed.py",
        (
            (Part("data", 15),),
            (Part("card", 20, quick=True),),
            # Not timed: what the compiler makes here, the timed parts find in its cache.
            (Part("compile_base", 75), Part("compile_large", 75), Part("encoder", 75)),
            (Part("step_base", 40),),
            (Part("train", 45),),
            (Part("session", 60),),
            (Part("embedding", 40),),
            (Part("step_large", 40),),
            (Part("decoding", 20),),
        ),
    ),
    "quality": Stage(
        HERE / "quality.py",
        (
            (Part("data", 20, quick=True),),
            (Part("rate", 45),),
            (Part("train", 110),),
            (Part("neighbours", 60), Part("linear", 60)),
        ),
    ),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="+", choices=STAGES, metavar="STAGE")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny sizes")
    parser.add_argument("--quick", action="store_true", help="of a dry run, only the parts that keep it from rotting")
    parser.add_argument("--seconds", type=float, default=150.0, help="time limit of each stage (default: %(default)g)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts alone")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "build/gpu")))
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="maekit-gpu-") as folder:
        for name in options.stages:
            work = Path(folder) / name
            work.mkdir()
            flags = ["--dry-run"] * options.dry_run + ["--quick"] * options.quick
            # A CPU of two cores takes longer over tiny sizes than a GPU machine over real ones.
            limit = 900.0 if options.dry_run else options.seconds
            wanted = STAGES[name]
            rows += run_stage(
                Stage(wanted.script, _chosen(wanted.groups, options)), name, options.out, work, flags, limit
            )
    print(table(rows), flush=True)
    return 1 if any(row["result"] not in ("ok", "skipped") for row in rows) else 0


def _chosen(groups: tuple[tuple[Part, ...], ...], options: argparse.Namespace) -> tuple[tuple[Part, ...], ...]:
    """Return the groups with the parts that were asked for."""
    kept = [[part for part in group if part.quick or not options.quick] for group in groups]
    if options.only:
        # The images and the card come first whatever is asked for: other parts read what they leave.
        kept = [[part for part in group if part.name in (*options.only, "data", "card", "encoder")] for group in kept]
    seconds = 8 if options.dry_run else 1
    return tuple(tuple(Part(p.name, p.seconds * seconds, p.quick) for p in group) for group in kept if group)


def run_stage(stage: Stage, name: str, out: Path, work: Path, flags: list[str], limit: float) -> list[dict[str, Any]]:
    """Run all parts of a stage; return a row for each, which `out/NAME.jsonl` holds as well.

    Args:
        stage: what to run.
        name: of the stage.
        out: where STAGE.jsonl and STAGE.log are, appended to.
        work: a folder that the parts share.
        flags: passed on to each part.
        limit: seconds after which no part begins, and those that run are stopped.
    """
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + limit
    rows = []
    for group in stage.groups:
        running = []
        for part in group:
            left = deadline - time.monotonic()
            if left > 1:
                running.append(_Running(part, stage.script, work, flags, min(part.seconds, left)))
            else:
                rows.append(_note(out, name, {"part": part.name, "result": "not reached", "seconds": 0.0}, ""))
        try:
            while running:
                for one in [one for one in running if one.has_ended()]:
                    running.remove(one)
                    rows.append(_note(out, name, one.row(), one.log()))
                time.sleep(_POLL_SECONDS)
        finally:
            for one in running:
                one.kill()
    return rows


class _Running:
    """A part at work."""

    def __init__(self, part: Part, script: Path, work: Path, flags: list[str], seconds: float) -> None:
        self._part = part
        self._log = work / f"{part.name}.log"
        command = [sys.executable, str(script.absolute()), part.name, "--work", str(work), *flags]
        self._began, self._limit = time.monotonic(), seconds
        self._timed_out = False
        with open(self._log, "wb") as log:
            # A session of its own, so that all that it started can be stopped with it.
            self._process = subprocess.Popen(
                command, cwd=work, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )

    def has_ended(self) -> bool:
        """Whether it is over; past its limit it is asked to end, and then made to."""
        if self._process.poll() is not None:
            return True
        over = time.monotonic() - self._began - self._limit
        if over > 0:
            self._timed_out = True
            self._signal(signal.SIGKILL if over > _TERM_SECONDS else signal.SIGTERM)
        return False

    def kill(self) -> None:
        """End it, and all that it started."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def log(self) -> str:
        """Return what it printed."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def row(self) -> dict[str, Any]:
        """Return what came of it."""
        self._signal(signal.SIGKILL)  # what it left running
        said: dict[str, Any] = {}
        lines = self.log().strip().splitlines()
        try:
            last = json.loads(lines[-1]) if lines else None
            said = last if isinstance(last, dict) and "result" in last else {}
        except json.JSONDecodeError:
            pass
        seconds = round(time.monotonic() - self._began, 1)
        if self._timed_out:
            said = {"result": "timed out", "headline": f"after {self._limit:.0f} s"}
        elif not said:
            last_line = lines[-1] if lines else "it said nothing"
            said = {"result": "failed", "headline": f"exit code {self._process.returncode}: {last_line}"}
        return {"part": self._part.name, **said, "seconds": seconds}


def _note(out: Path, stage: str, row: dict[str, Any], log: str) -> dict[str, Any]:
    """Append what came of a part to the two files, and see that it is on the disk."""
    row = {"stage": stage, **row}
    for path, text in (
        (out / f"{stage}.log", f"==== {row['part']}: {row['result']} after {row['seconds']} s\n{log.rstrip()}\n\n"),
        (out / f"{stage}.jsonl", json.dumps(row) + "\n"),
    ):
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    print(f"{stage} {row['part']}: {row['result']} ({row['seconds']} s) {row.get('headline', '')}", flush=True)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Return one line for each part."""
    width = max(60, shutil.get_terminal_size((160, 24)).columns) - 42
    lines = [f"\n{'stage':8} {'part':14} {'result':11} {'s':>5}"]
    for row in rows:
        headline = str(row.get("headline", ""))[:width]
        lines.append(f"{row['stage']:8} {row['part']:14} {row['result']:11} {row['seconds']:5.0f} {headline}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
